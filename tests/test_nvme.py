"""Optimizer states on NVMe: steps, checkpoints and averages are those of states in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from rank_models import alone, run_ranks
from rank_nvme import CASES, new_engine

from crossguard.configs.errors import UserError
from crossguard.configs.schema import ZeroConfig

HERE = Path(__file__).parent
SECONDS_TO_BUILD = 900


@pytest.mark.nvme
@pytest.mark.parametrize("ranks", [1, 2])
def test_states_on_nvme_train_as_those_in_memory_and_resume(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, HERE / "rank_nvme.py", str(tmp_path), timeout=SECONDS_TO_BUILD)
    for number, found in enumerate(json.loads((tmp_path / "found.json").read_text())):
        assert found.keys() == CASES.keys()
        for of_rank in found.values():
            assert of_rank.pop("swapped") == [True, True, False, False]
            files = of_rank.pop("files")
            assert any(file.endswith(f"rank{number}") for file in files)
            assert len({file.split("/")[0] for file in files}) == 1, "in a folder of the run"
            assert all(of_rank.values()), of_rank
    assert not list((tmp_path / "nvme").iterdir()), "what is not needed any more is left"


def test_without_the_operator_nvme_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"device=nvme: .*libaio"):
        new_engine(alone(), tmp_path, device="nvme", nvme_path=str(tmp_path / "nvme"))


@pytest.mark.parametrize(
    ("stage", "block", "expected"),
    [
        (2, {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}, "only ZeRO-3 .*say zero=3"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "nvme_path: missing"),
        (3, {"offload_param": {"device": "nvme", "nvme_path": "/nvme"}}, "offload_param.device=nvme: .*use cpu"),
    ],
)
def test_nvme_where_it_cannot_be_is_refused(stage: int, block: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ZeroConfig(stage, {"zero_optimization": block})
