"""What is minimised beside the labels: every term against formulas written down independently, on any ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_models import run_ranks

HERE = Path(__file__).parent


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_stages_and_micro_batches_equal_one_batch(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, HERE / "rank_objectives.py", str(tmp_path), str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["apart"]) == 8
    for name, case in found["apart"].items():
        assert case["numbers"] < 1e-6, (name, case)
        assert case["weights"] < 1e-6, (name, case)
    for line in found["told"]:
        assert all(value > 1e-4 for value in line.values()), line
