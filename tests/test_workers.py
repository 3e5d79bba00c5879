"""Processes that read: what they hand over, how they fail, and what they never load."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from open_files import open_files
from worker_tasks import Arrays

from crossguard.configs.errors import JobError
from crossguard.data.loading import transport
from crossguard.data.loading.collate import collate
from crossguard.data.loading.encoded import EncodedSample
from crossguard.data.loading.transport import Places
from crossguard.data.loading.workers import results

NO_TORCH = "import sys, crossguard.data.loading.loader, crossguard.train.encode; sys.exit('torch' in sys.modules)"


def delivered(tasks: list[int], workers: int, ahead: int = 2) -> list[dict[str, Any]]:
    with closing(results(Arrays(), tasks, workers, ahead=ahead)) as parts:
        return list(parts)


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 3), (3, 2)])
def test_results_are_whole_and_in_order(workers: int, ahead: int) -> None:
    here, there = delivered(list(range(100)), 0), delivered(list(range(100)), workers, ahead)
    assert [part["task"] for part in there] == list(range(100))
    for one, other in zip(here, there, strict=True):
        for name in ("none", "square", "turned"):
            assert one[name].dtype == other[name].dtype
            assert np.array_equal(one[name], other[name])


def test_fewer_tasks_than_workers() -> None:
    assert [part["task"] for part in delivered([5], 3)] == [5]
    assert delivered([], 2) == []


def test_a_worker_that_is_killed_ends_the_job() -> None:
    with pytest.raises(JobError, match=r"has ended \(status -9\).*lower train.num_workers"):
        delivered([1, 2, -1, 3, 4, 5, 6, 7], 2)


def test_an_error_in_a_worker_comes_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="unexpected"):
        delivered([1, -2, 3], 2)


def test_nothing_stays_open() -> None:
    delivered([1, 2, 3], 2)  # starts the server
    before = open_files()
    for _ in range(3):
        delivered([1, 2, 3], 2)
    assert not open_files() - before


def test_a_result_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PLACE_BYTES", 1 << 16)
    places = Places(2)
    sizes = places.put(1, np.arange(1000))
    assert np.array_equal(places.get(1, sizes), np.arange(1000))
    with pytest.raises(JobError, match="lower train.micro_batch_size"):
        places.put(0, np.arange(10_000))


def test_workers_never_import_torch() -> None:
    assert subprocess.run([sys.executable, "-c", NO_TORCH], check=False).returncode == 0


def test_the_memory_of_a_batch_is_used_again_only_when_nothing_refers_to_it() -> None:
    def batch(value: int) -> torch.Tensor:
        image = np.full((3, 8, 8), value, dtype=np.uint8)
        sample = EncodedSample("a", "und", None, [image], np.zeros(1, dtype=np.float32))
        return collate([sample], pad_id=0, image_size=8, num_labels=1).pixels

    kept = [batch(value)[:, :, 2:] for value in range(10)]
    assert [int(part.unique()) for part in kept] == list(range(10))
    place = kept.pop().data_ptr()
    assert place - 2 * 8 * 3 == batch(10).data_ptr()
    assert [int(part.unique()) for part in kept] == list(range(9))
