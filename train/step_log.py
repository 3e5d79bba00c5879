"""What each step says about itself: to metrics.jsonl, to samples/ and to the tracker."""

from __future__ import annotations

import time
from contextlib import ExitStack
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from crossguard.configs.errors import OutOfMemory, Preempted
from crossguard.configs.schema import TrainConfig
from crossguard.data.loading.collate import Batch
from crossguard.train import phases
from crossguard.train.compute import Compute
from crossguard.train.metrics_log import TRAIN, LineLog, metrics_file, samples_file
from crossguard.train.ranks import Ranks
from crossguard.train.throughput import Throughput, Work
from crossguard.train.tracking import Tracker

if TYPE_CHECKING:
    from crossguard.train.loop import StepResult


# Seconds between two training lines that the tracker is told: to W&B one takes as long as a small step does.
BETWEEN_TOLD = 1.0
# Seconds that a look at the process's memory is good for: it costs more than writing a line.
MEMORY_KNOWN = 1.0


class StepLog:
    """Rank 0 logs numbers, every rank its samples.

    Args:
        run_dir: where files go.
        train: what is logged.
        ranks: all of them.
        tracker: is told the same numbers; where lines come fast, not all of them.
        compute: what the ranks together could do, where that is known.
    """

    def __init__(
        self, run_dir: Path, train: TrainConfig, ranks: Ranks, tracker: Tracker, compute: Compute | None = None
    ):
        self._train, self._ranks, self._tracker, self._compute = train, ranks, tracker, compute
        self._metrics = LineLog(metrics_file(run_dir)) if ranks.is_first else None
        self._samples = LineLog(samples_file(run_dir, ranks.rank)) if train.log_samples else None
        # When the tracker was told, and the training line that it was not.
        self._told_at = float("-inf")
        self._untold: dict[str, Any] | None = None
        self._process = psutil.Process()
        self._resident, self._looked_at = 0.0, float("-inf")
        self._throughput = Throughput(ranks.device, compute)
        self._open = ExitStack()

    def work(self, batches: list[Batch]) -> Work:
        """This rank's share of a step, for `step` to be given that of all ranks; the batches are still on the host."""
        return Work.of(batches, self._compute)

    def step(self, step: int, result: StepResult, batches: list[Batch]) -> None:
        """A step is done."""
        if self._samples is not None:
            self._samples.write({"step": step, "ids": [post for batch in batches for post in batch.ids]})
        events: dict[str, Any] = {"skipped": result.skipped} if result.skipped else {}
        events |= {"spike": True} if result.spike else {}
        if self._metrics is None:
            return
        self._throughput.add(result.work)
        if step % self._train.log_every and not events:
            return
        self._write(
            {
                "split": TRAIN,
                "step": step,
                "loss": result.loss,
                **result.terms,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                **self._throughput.take(),
                "memory_mb": self._memory_mb(),
            }
            | events
        )

    def evaluation(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        """An evaluation is done; nested metrics become dotted names."""
        if self._metrics is not None:
            self._tell_untold()
            self._write({"split": split, "step": step, **flat(metrics)})

    def __enter__(self) -> StepLog:
        if self._metrics is not None:
            self._open.enter_context(phases.listening(self._throughput.times.enter))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close files and tracker. A job that was preempted has not failed: it goes on, as it does without memory."""
        self._open.close()
        self._tell_untold()
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
        self._untold = line
        ordinary = line["split"] == TRAIN and not {"skipped", "spike"} & line.keys()
        if not ordinary or time.monotonic() - self._told_at >= BETWEEN_TOLD:
            self._tell_untold()

    def _tell_untold(self) -> None:
        if self._untold is None:
            return
        line, self._untold, self._told_at = self._untold, None, time.monotonic()
        numbers = {name: value for name, value in flat(line).items() if name != "step"}
        self._tracker.log({f"{line['split']}/{name}": value for name, value in numbers.items()}, line["step"])

    def _memory_mb(self) -> float:
        """Peak memory of the GPU, or resident memory of the process without one, in MiB."""
        if self._ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if time.monotonic() - self._looked_at >= MEMORY_KNOWN:
            self._resident, self._looked_at = self._process.memory_info().rss / 2**20, time.monotonic()
        return self._resident


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Dotted name -> number; what is not a number is left out."""
    leaves: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f"{prefix}{name}."))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            leaves[f"{prefix}{name}"] = value
    return leaves
