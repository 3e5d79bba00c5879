"""The training loop: fetch, forward and backward, step, log, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch

from crossguard.configs.errors import Preempted
from crossguard.configs.progress import progress
from crossguard.configs.schema import Config
from crossguard.data.loading.collate import Batch
from crossguard.train import phases, preemption, watchdog
from crossguard.train.engine import Engine
from crossguard.train.guards import Guards
from crossguard.train.micro_batch import MicroBatch
from crossguard.train.objectives.objective import Objective
from crossguard.train.objectives.term import LOSS
from crossguard.train.optimizer import learning_rate
from crossguard.train.refusals import Refusals
from crossguard.train.step_log import StepLog
from crossguard.train.throughput import Work


@dataclass
class TrainState:
    """What the loop counts, beside weights and optimizer; kept in every checkpoint."""

    # Steps done.
    step: int
    # Horizon of the learning rate.
    schedule_steps: int
    # The best value of the validation metric so far, and the metric's name.
    best: float | None = None
    best_metric: str = ""
    # Evaluations since the best one.
    evaluations_without_better: int = 0
    # The evaluation of this step has been left for the next start.
    evaluation_due: bool = False
    # Steps that changed nothing, since their loss or gradient was not finite: all of them, and the last ones in a row.
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    # The last losses, and whether the very last one leapt out of those before it.
    recent_losses: list[float] = field(default_factory=list)
    in_spike: bool = False
    # Weights of the languages, where group DRO keeps them.
    group_weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """One step over all ranks."""

    # Of the labels.
    loss: float
    grad_norm: float
    lr: float
    work: Work
    # What was minimised beside it, by name.
    terms: dict[str, float] = field(default_factory=dict)
    # What was not finite, "loss" or "gradient", so that nothing was changed.
    skipped: str = ""
    # The loss leapt out of those before it.
    spike: bool = False


class TrainLoop:
    """Runs the steps from `state.step + 1` to `last_step`.

    Args:
        config: the recipe.
        engine: the model under DeepSpeed.
        objective: what is minimised.
        loader: yields, for each step, this rank's micro-batches.
        state: where to start; moves on.
        last_step: the last step to do.
        log: tells metrics.jsonl, samples/ and the tracker.
        refusals: counts the samples that are damaged.
        guards: look at loss and gradient of each step.
        micro_batch: takes note when a step does not fit into memory.
        validate: evaluates on the validation split: the metric that decides, or None where it is not defined.
        save: writes a checkpoint; True marks the best so far.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        objective: Objective,
        loader: Iterable[list[Batch]],
        state: TrainState,
        *,
        last_step: int,
        log: StepLog,
        refusals: Refusals,
        guards: Guards,
        micro_batch: MicroBatch,
        validate: Callable[[int], float | None] | None,
        save: Callable[[bool], None],
    ):
        self.config, self.engine, self.objective, self.loader, self.state = config, engine, objective, loader, state
        self.last_step, self.log, self.refusals, self.validate, self.save = last_step, log, refusals, validate, save
        self.guards, self.micro_batch = guards, micro_batch
        # A rank was asked to stop: the same on all of them.
        self._stop = False
        # What all ranks together have counted in the coming step, where they have said so.
        self._counts: list[float] | None = None

    def run(self) -> None:
        """Train.

        Raises:
            JobError: too many losses or gradients in a row are not finite, a checkpoint cannot be written, or not even
                a single post fits into memory.
            OutOfMemory: a step does not fit into memory; the next start takes fewer posts at once.
            Preempted: a rank was asked to stop; on all ranks after the same step, which is saved.
        """
        state, speak = self.state, self.engine.ranks.is_first
        self.engine.train()
        with progress("train", self.last_step, "steps", done=state.step, speak=speak) as shown:
            if state.evaluation_due:
                self._evaluate_and_save(saved=True)
            steps = pairwise(chain(self.loader, [[]]))  # Nothing follows the last one.
            while state.step < self.last_step and not out_of_patience(state, self.config):
                phases.enter(phases.DATA)
                batches, following = next(steps)
                with self.micro_batch.fitting():
                    result = self.train_step(state.step + 1, batches, following)
                watchdog.arm()
                phases.enter(phases.LOG)
                state.step += 1
                self.log.step(state.step, result, batches)
                self.guards.check(state.step)
                self._evaluate_and_save()
                shown.advance(note=f"loss {result.loss:.4f}")

    def train_step(self, step: int, batches: list[Batch], following: list[Batch]) -> StepResult:
        """One optimizer step: the loss is the sum over the known labels of the global batch, divided by their number;
        other terms have denominators of their own, counted over all ranks alike.

        So it depends neither on ranks nor on micro-batches. A batch without any known label has loss 0. Where loss or
        gradient is not finite, all ranks leave weights and moments as they are. The ranks talk once, about the loss of
        this step and what they count in `following`, the batches of the next: it is known before their first backward.
        """
        engine, ranks = self.engine, self.engine.ranks
        lr = learning_rate(step, self.config.train, self.state.schedule_steps)
        if self._counts is None:  # No step before this one has asked.
            phases.enter(phases.WAITING)
            self._counts = ranks.sum(torch.tensor(self._count(batches), dtype=torch.float64)).tolist()
        damaged, posts, tokens, places, kiloflops, *counts = map(int, self._counts)
        self.refusals.check(damaged)
        objective = self.objective.of_step(counts, ranks.device)
        mine = self._count(following)
        batches = [batch.to(ranks.device) for batch in batches]

        losses: list[torch.Tensor] = []
        means = torch.zeros(len(counts), dtype=torch.float64, device=ranks.device)
        for batch in batches:
            phases.enter(phases.FORWARD)
            loss, part, elements = objective(engine, batch)
            phases.enter(phases.BACKWARD)
            engine.backward(loss)
            means += part
            losses.append(elements)

        phases.enter(phases.WAITING)
        told = torch.cat([objective.total(means)[None], means, means.new_tensor([preemption.asked(), *mine])])
        grad_norm, (total, *of_all) = engine.step(lr, told)
        asked, *coming = of_all[len(counts) :]
        self._stop, self._counts = bool(asked), coming if following else None
        skipped = self.guards.skipped(step, total, grad_norm, batches, losses)
        spike = self.guards.spikes(step, total)
        numbers = objective.numbers(of_all[: len(counts)])
        if not skipped:
            objective.learn(of_all[: len(counts)])
        work = Work(posts, tokens, places, kiloflops)
        return StepResult(numbers.pop(LOSS), grad_norm, lr, work, numbers, skipped, spike)

    def _count(self, batches: list[Batch]) -> list[int]:
        """This rank's damaged samples, work and denominators of a step's batches, which are still on the host."""
        return [self.refusals.take(), *self.log.work(batches).counts(), *self.objective.counts(batches)]

    def _evaluate_and_save(self, *, saved: bool = False) -> None:
        """After a step; or at the start, when the checkpoint (`saved`) of the step has been left without an evaluation.

        Raises:
            Preempted: a rank was asked to stop, up to the end of the save; the step is saved.
        """
        state, step, last = self.state, self.state.step, self.state.step == self.last_step
        every = self.config.evaluation.every_steps
        state.evaluation_due = self.validate is not None and bool(every) and (saved or last or step % every == 0)
        best = state.evaluation_due and self._evaluate(step)
        every = self.config.checkpoint.every_steps
        save = self._stop or best or last or (every and step % every == 0) or out_of_patience(state, self.config)
        if save and not (saved and state.evaluation_due):
            phases.enter(phases.CHECKPOINT)
            self.save(best)
            self._stop = self._stop or self.engine.ranks.any(preemption.asked())
        if self._stop:
            raise Preempted(f"train: stopped after step {step}, which is saved; start again and it goes on")

    def _evaluate(self, step: int) -> bool:
        """Whether this evaluation is the best so far; it stays due when a rank is asked to stop before its end."""
        if self.validate is None or self._stop:
            return False
        phases.enter(phases.EVALUATION)
        best = False
        with suppress(Preempted):
            best = self._is_best(self.validate(step))
            self.state.evaluation_due = False
        self.engine.train()
        self._stop = self.engine.ranks.any(preemption.asked())
        return best

    def _is_best(self, value: float | None) -> bool:
        state, wanted = self.state, self.config.checkpoint
        if state.best_metric != wanted.metric:  # Values of another metric say nothing about this one.
            state.best, state.best_metric, state.evaluations_without_better = None, wanted.metric, 0
        if value is None:  # Not defined on these posts: neither better nor worse.
            return False
        better = state.best is None or (value > state.best if wanted.mode == "max" else value < state.best)
        state.best = value if better else state.best
        state.evaluations_without_better = 0 if better else state.evaluations_without_better + 1
        return better


def out_of_patience(state: TrainState, config: Config) -> bool:
    """Early stopping: enough evaluations without a better one."""
    return config.train.patience is not None and state.evaluations_without_better >= config.train.patience


def state_from(saved: dict[str, Any]) -> TrainState:
    """The counts that a checkpoint holds."""
    return TrainState(**{name: saved[name] for name in TrainState.__dataclass_fields__ if name in saved})
