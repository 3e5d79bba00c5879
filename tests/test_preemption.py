"""Preemption: all ranks stop after one step, save it, and go on as if they had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_models import run_ranks
from rank_preemption import PHASES, STEP_OF
from rank_training import write_shards

HERE = Path(__file__).parent
TIMES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe, posts and shards."""
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder)
    return folder


def test_a_signal_to_one_rank_stops_all_after_one_step_and_changes_nothing(folder: Path) -> None:
    """In every phase of training, evaluation and saving, the first time it comes and the last; two signals each time."""
    printed = run_ranks(2, HERE / "rank_preemption.py", str(folder), str(TIMES), "0")
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    evaluated = [case for case in found if case["phase"] == "stage=evaluate"]
    assert len(evaluated) == TIMES
    assert all(case["stopped"] == [True, True] and case["equal"] for case in evaluated)
    trained = [case for case in found if case not in evaluated]
    assert len(trained) == len(PHASES) * TIMES
    for case in trained:
        assert None not in case["stopped"], case
        # Passed on where the ranks talk next: in the same step, or, where that has been, in the one after.
        asked_in = STEP_OF[case["phase"]](case["number"])
        assert case["stopped"][0] in (asked_in, asked_in + 1), case
        assert len(set(case["stopped"])) == 1, case
        assert case["ended"], case
        assert case["equal"], case
