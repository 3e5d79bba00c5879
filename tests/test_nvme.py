"""Optimizer states on NVMe: steps, checkpoints and averages are those of states in memory."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from rank_models import alone, run_ranks
from rank_nvme import CASES, new_engine

from crossguard.configs.errors import UserError
from crossguard.configs.schema import ZeroConfig
from crossguard.train import nvme
from crossguard.train.nvme import nvme_settings, open_swap_folder

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
            assert of_rank.pop("fragment files") == 3, "each swapped sub-group is written by itself"
            files = of_rank.pop("files")
            assert any(file.endswith(f"rank{number}") for file in files)
            assert len({file.split("/")[0] for file in files}) == 1, "in a folder of the run"
            assert all(of_rank.values()), of_rank
    assert not list((tmp_path / "nvme").iterdir()), "what is not needed any more is left"


def test_without_the_operator_nvme_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"device=nvme: .*libaio"):
        new_engine(alone(), tmp_path, device="nvme", nvme_path=str(tmp_path / "nvme"))


def test_there_is_a_buffer_for_each_of_what_is_updated_at_once() -> None:
    offload = {"device": "nvme", "nvme_path": "/nvme", "pipeline_read": True}
    offload |= {"buffer_count": "auto"}
    made = nvme_settings({"stage": 3, "offload_optimizer": offload, "sub_group_size": None}, "run", averages=True)
    assert made["offload_optimizer"]["buffer_count"] == 10
    assert made["sub_group_size"] < 1e9, "DeepSpeed's, which takes as much memory as the states of most models"
    with pytest.raises(UserError, match=r"buffer_count=7: .*at least 8"):
        nvme_settings({"stage": 3, "offload_optimizer": {**offload, "buffer_count": 7}}, "run", averages=False)


def writes_directly(folder: Path) -> bool:
    """Past the cache, as DeepSpeed does."""
    try:
        os.close(os.open(folder / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_the_folder_is_looked_at_before_deepspeed_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    answer = 0
    system = SimpleNamespace(mlock=lambda _, size: locked.append(size.value) or answer)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: system)  # The limit is the machine's.
    monkeypatch.setattr(nvme, "_build_operator", lambda: None)
    if not hasattr(os, "O_DIRECT") or not writes_directly(tmp_path):
        pytest.skip("temporary files lie on a file system without O_DIRECT")

    def open_folder(folder: Path) -> None:
        offload = {"device": "nvme", "nvme_path": str(folder / "crossguard-1"), "buffer_count": 5}
        zero = {"offload_optimizer": offload, "sub_group_size": float(1 << 18)}
        optimizer = torch.optim.AdamW([torch.zeros(1 << 18, requires_grad=True) for _ in range(4)])
        open_swap_folder(zero, optimizer, alone(), averages=True)

    killed = tmp_path / "crossguard-1" / "zero_stage_3" / "optimizer" / "rank7"
    killed.mkdir(parents=True)
    open_folder(tmp_path)
    assert not list((tmp_path / "crossguard-1").iterdir()), "of a killed run of more ranks"
    assert locked == [5 * 4 * 2 * (1 << 18)], "two parameters are updated at once"
    answer = -1
    with pytest.raises(UserError, match=r"device=nvme: 10 MiB of buffers cannot be locked .*ulimit -l"):
        open_folder(tmp_path)
    answer = 0
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"nvme_path=.*file: Not a directory; name a folder"):
        open_folder(tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=19 << 20))
    with pytest.raises(UserError, match=r"nvme_path=.*: 19 MiB are free there and optimizer states take 20; free some"):
        open_folder(tmp_path)


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
