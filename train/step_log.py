"""What each step says about itself: to metrics.jsonl, to samples/ and to the tracker."""

from __future__ import annotations

import time
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from crossguard.configs.errors import OutOfMemory, Preempted
from crossguard.configs.schema import TrainConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.metrics_log import LineLog, metrics_file, samples_file
from crossguard.train.ranks import Ranks
from crossguard.train.tracking import Tracker

if TYPE_CHECKING:
    from crossguard.train.loop import StepResult


class StepLog:
    """Rank 0 logs numbers, every rank its samples. Speed and waiting are means since the line before."""

    def __init__(self, run_dir: Path, train: TrainConfig, ranks: Ranks, tracker: Tracker):
        self._train, self._ranks, self._tracker = train, ranks, tracker
        self._metrics = LineLog(metrics_file(run_dir)) if ranks.is_first else None
        self._samples = LineLog(samples_file(run_dir, ranks.rank)) if train.log_samples else None
        self._process = psutil.Process()
        self._start_window()

    def step(self, step: int, result: StepResult, batches: list[Batch], waited: float) -> None:
        """A step is done; `waited` seconds of it passed before its samples were there."""
        if self._samples is not None:
            self._samples.write({"step": step, "ids": [post for batch in batches for post in batch.ids]})
        self._steps += 1
        self._waited += waited
        events: dict[str, Any] = {"skipped": result.skipped} if result.skipped else {}
        events |= {"spike": True} if result.spike else {}
        if self._metrics is None or (step % self._train.log_every and not events):
            return
        seconds = time.perf_counter() - self._since
        self._write(
            {
                "split": "train",
                "step": step,
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "samples_per_second": self._steps * self._train.batch_size / seconds,
                "data_wait": self._waited / seconds,
                "memory_mb": self._memory_mb(),
            }
            | events
        )
        self._start_window()

    def evaluation(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        """An evaluation is done; nested metrics become dotted names. Its time is not that of the steps."""
        if self._metrics is not None:
            self._write({"split": split, "step": step, **flat(metrics)})
        self._start_window()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close files and tracker. A job that was preempted has not failed: it goes on, as it does without memory."""
        for log in (self._metrics, self._samples):
            if log is not None:
                log.close()
        self._tracker.close(failed=error is not None and not isinstance(error, Preempted | OutOfMemory))

    def _write(self, line: dict[str, Any]) -> None:
        assert self._metrics is not None
        # JSON has no number that is not finite.
        odd = {name: None for name, value in line.items() if isinstance(value, float) and not isfinite(value)}
        line = line | odd
        self._metrics.write(line)
        numbers = {name: value for name, value in flat(line).items() if name != "step"}
        self._tracker.log({f"{line['split']}/{name}": value for name, value in numbers.items()}, line["step"])

    def _start_window(self) -> None:
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def _memory_mb(self) -> float:
        """Peak memory of the GPU, or resident memory of the process without one, in MiB."""
        if self._ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return float(self._process.memory_info().rss) / 2**20


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Dotted name -> number; what is not a number is left out."""
    leaves: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f"{prefix}{name}."))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            leaves[f"{prefix}{name}"] = value
    return leaves
