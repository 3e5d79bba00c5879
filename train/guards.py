"""What is looked for in every step: a loss or gradient that is not finite, and a loss that leaps.

All ranks see the same numbers, so that all of them decide alike; rank 0 says so, once an episode.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

import torch

from crossguard.configs.errors import JobError
from crossguard.configs.schema import TrainConfig
from crossguard.data.loading.collate import Batch
from crossguard.train.ranks import Ranks
from crossguard.train.refusals import Refusals
from crossguard.train.tracking import Tracker

if TYPE_CHECKING:
    from crossguard.train.loop import TrainState

# Losses that a loss is compared with, and how many there must be.
WINDOW, ENOUGH = 100, 30
# The standard deviation of a normal distribution over its median absolute deviation.
NORMAL = 1.4826
# The least deviation: losses that hardly differ from step to step would otherwise make a leap of any difference.
LEAST_SHARE, LEAST = 0.1, 0.01


class Guards:
    """Watches the steps of one start; what it counts is kept in `state`.

    Args:
        train: max_skipped_steps and spike_threshold.
        state: the counts; they go on after a resume.
        ranks: all of them.
        refusals: names the samples of a step that is skipped.
        tracker: gets the alerts.
    """

    def __init__(self, train: TrainConfig, state: TrainState, ranks: Ranks, refusals: Refusals, tracker: Tracker):
        self._train, self._state, self._ranks, self._refusals, self._tracker = train, state, ranks, refusals, tracker

    def skipped(
        self, step: int, loss: float, grad_norm: float, batches: list[Batch], losses: list[torch.Tensor]
    ) -> str:
        """Count and explain the step if it had to be skipped; all ranks call it after each.

        Args:
            step: its number.
            loss: that of the step.
            grad_norm: that of the step.
            batches: this rank's samples.
            losses: of each element of each batch, float[B, P].

        Returns:
            What is not finite, "loss" or "gradient"; empty where all is well.
        """
        state = self._state
        if math.isfinite(loss) and math.isfinite(grad_norm):
            state.skipped_in_a_row = 0
            return ""
        what = "gradient" if math.isfinite(loss) else "loss"
        self._name_samples(what, step, batches, losses)
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row == 1:
            self._ranks.say(
                f"train: warning: the {what} of step {step} is not finite; the step is skipped and changes nothing;"
                f" quarantine.jsonl names its samples; {self._train.max_skipped_steps} such steps in a row"
                " (train.max_skipped_steps) stop training"
            )
        return what

    def check(self, step: int) -> None:
        """After a step is logged.

        Raises:
            JobError: on every rank, when too many steps in a row were skipped.
        """
        count = self._state.skipped_in_a_row
        if count < self._train.max_skipped_steps:
            return
        reason = (
            f"{count} steps in a row, up to step {step}, were skipped (train.max_skipped_steps) since their loss or "
            "gradient was not finite"
        )
        self._tracker.alert("training stopped", reason)
        raise JobError(
            f"train: {reason}; look at their samples, which quarantine.jsonl names, or begin anew (train.restart=true)"
            " with a lower train.lr, with train.grad_clip or with train.precision=fp32; the last checkpoint is good"
        )

    def spikes(self, step: int, loss: float) -> bool:
        """Whether the loss leaps out of those before it, with a warning when it begins to; all ranks call it."""
        state, threshold = self._state, self._train.spike_threshold
        if not threshold or not math.isfinite(loss):
            return False
        usual, far = typical(state.recent_losses)
        state.recent_losses = [*state.recent_losses, loss][-WINDOW:]
        spike = loss > usual + threshold * far
        if spike and not state.in_spike:
            about = (
                f"the loss of step {step} is {loss:.4g}, {(loss - usual) / far:.0f} deviations above {usual:.4g}, the "
                "median before it"
            )
            self._ranks.say(
                f"train: warning: {about} (train.spike_threshold); `crossguard shards preview step={step}` with the "
                "arguments of this job shows its samples"
            )
            self._tracker.alert("loss spike", about)
        state.in_spike = spike
        return spike

    def close(self) -> None:
        """Say how many steps were skipped."""
        if count := self._state.skipped_steps:
            self._ranks.say(
                f"train: warning: {count} of {self._state.step} steps were skipped, as their loss or gradient was not "
                "finite; metrics.jsonl shows which, quarantine.jsonl names their samples"
            )

    def _name_samples(self, what: str, step: int, batches: list[Batch], losses: list[torch.Tensor]) -> None:
        """Those whose own loss is not finite, on whichever rank; all of the step where there is none."""
        own = [(~loss.isfinite().all(1)).tolist() for loss in losses]
        known = self._ranks.any(any(map(any, own)))
        reason = "its loss is not finite" if known else f"in a batch whose {what} is not finite"
        for batch, bad in zip(batches, own, strict=True):
            for post, position, named in zip(batch.ids, batch.positions.tolist(), bad, strict=True):
                if named or not known:
                    place = {"split": "train", "step": step, "position": position, "stage": "train"}
                    self._refusals.write({"id": post, **place, "reason": reason})


def typical(losses: list[float]) -> tuple[float, float]:
    """The median of losses and a robust deviation from it, both infinite where too few losses are known."""
    if len(losses) < ENOUGH:
        return math.inf, math.inf
    usual = median(losses)
    deviation = NORMAL * median(abs(loss - usual) for loss in losses)
    return usual, max(deviation, LEAST_SHARE * abs(usual), LEAST)
