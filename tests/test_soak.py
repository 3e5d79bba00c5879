"""What `make soak` does at length, once briefly: kills and requests to stop at random moments, under the real launcher."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from rank_training import write_shards
from soak import kills, stops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe, posts and shards."""
    folder = tmp_path_factory.mktemp("soak")
    write_shards(folder)
    return folder


def test_kills_while_ranks_and_stage_change_lose_nothing(folder: Path) -> None:
    """2, 1 and 2 ranks: the order of samples, and the loss of every step."""
    kills.changing(folder, 3, random.Random(0))


def test_requests_to_stop_end_all_ranks_at_one_step(folder: Path) -> None:
    """In training, evaluation and saving: status 75, and results as without them, bit for bit."""
    stops.stop_often(folder, 1, random.Random(0))
