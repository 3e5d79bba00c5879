"""How fast training is: posts, tokens and floating-point operations a second, and where the time goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from crossguard.data.loading.collate import Batch
from crossguard.train import phases
from crossguard.train.compute import Compute
from crossguard.train.phase_times import PhaseTimes

# Phase -> its share of the time in metrics.jsonl.
SHARES = {
    phases.DATA: "time.data",
    phases.FORWARD: "time.forward",
    phases.BACKWARD: "time.backward",
    phases.WAITING: "time.waiting",
    phases.STEP: "time.step",
    phases.LOG: "time.log",
    phases.CHECKPOINT: "time.checkpoint",
    phases.EVALUATION: "time.evaluation",
}
# Training stands still in them.
APART = (phases.CHECKPOINT, phases.EVALUATION)


@dataclass
class Work:
    """What was worked on. Counts add up over micro-batches, ranks and steps."""

    posts: int = 0
    # Of text, and places for them in the batches, padding included.
    tokens: int = 0
    places: int = 0
    # Floating-point operations in thousands, so that those of any step are an int64; 0 where nobody asks for them.
    kiloflops: int = 0

    @classmethod
    def of(cls, batches: list[Batch], compute: Compute | None) -> Work:
        """One rank's share of a step; its batches are still on the host."""
        read = [batch for batch in batches if not batch.embeddings]
        return cls(
            posts=sum(len(batch) for batch in batches),
            tokens=sum(int(batch.text_mask.count_nonzero()) for batch in read),
            places=sum(batch.text_mask.numel() for batch in read),
            kiloflops=0 if compute is None else sum(round(compute.flops.of(batch) / 1e3) for batch in batches),
        )

    def counts(self) -> list[int]:
        """For a sum over ranks."""
        return [self.posts, self.tokens, self.places, self.kiloflops]

    def add(self, other: Work) -> None:
        """More was worked on."""
        self.posts += other.posts
        self.tokens += other.tokens
        self.places += other.places
        self.kiloflops += other.kiloflops


class Throughput:
    """Adds up work and time between two lines of the log.

    Args:
        device: its clock is asked.
        compute: what the ranks together could do, where that is known.
    """

    def __init__(self, device: torch.device, compute: Compute | None):
        self._compute = compute
        self.times = PhaseTimes(device)
        self._work = Work()

    def add(self, work: Work) -> None:
        """A step is done; `work` is that of all ranks."""
        self._work.add(work)

    def take(self) -> dict[str, float]:
        """The numbers since the last call.

        Rates are those of training: checkpoints and evaluations are left out of their time. Shares are of all the time
        that passed.
        """
        seconds = self.times.take()
        passed = sum(seconds.values())
        training = passed - sum(seconds.get(phase, 0.0) for phase in APART)
        work, self._work = self._work, Work()
        numbers: dict[str, Any] = {"samples_per_second": work.posts / training}
        if work.places:  # None where embeddings stand in for texts.
            numbers["tokens_per_second"] = work.tokens / training
            numbers["padding"] = 1 - work.tokens / work.places
        if self._compute is not None:
            numbers["mfu"] = work.kiloflops * 1e3 / (training * self._compute.peak)
        numbers["data_wait"] = seconds.get(phases.DATA, 0.0) / training
        return numbers | {key: seconds.get(phase, 0.0) / passed for phase, key in SHARES.items()}
