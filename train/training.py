"""The train stage on one rank: takes the run directory, puts the parts together, resumes, runs the loop."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crossguard.configs.resume import check_resumable
from crossguard.configs.saved import as_plain, save_config
from crossguard.configs.schema import Config
from crossguard.data.loading.loader import TrainLoader
from crossguard.data.loading.order import SampleOrder, micro_batches
from crossguard.data.loading.refused import FILE_NAME, Refused
from crossguard.train import checkpoint_folder, preemption, watchdog
from crossguard.train.checkpoint import load_checkpoint, newest_valid
from crossguard.train.checkpoint_saving import CheckpointSaver
from crossguard.train.engine import Engine
from crossguard.train.inputs import Inputs, open_inputs
from crossguard.train.loop import TrainLoop, TrainState, out_of_patience, state_from
from crossguard.train.metrics_log import cut_after
from crossguard.train.objectives import build_objective
from crossguard.train.random_state import seed_rank
from crossguard.train.ranks import Ranks
from crossguard.train.refusals import Refusals
from crossguard.train.run_lock import run_lock
from crossguard.train.starting_model import starting_model
from crossguard.train.step_log import StepLog
from crossguard.train.tracking import Tracker, open_tracker
from crossguard.train.validation import open_validation


def run_training(config: Config, ranks: Ranks) -> None:
    """Train to `train.max_steps`, going on from the newest checkpoint; nothing happens when that is there already.

    Raises:
        UserError: the configuration, the shards or a checkpoint do not fit together.
        JobError: the run directory is in use, a loss is not finite, or the disk refuses a checkpoint.
        Preempted: a rank was asked to stop; all ranks have stopped after the same step, which is saved.
    """
    run_dir = Path(config.run_dir)
    with run_lock(run_dir, ranks):
        with preemption.holding():  # Files are moved aside one after the other.
            ranks.on_first(lambda: _clean(run_dir, config))
        checkpoint = newest_valid(run_dir, ranks)
        saved = checkpoint_folder.read_state(checkpoint) if checkpoint else None
        if saved is not None:
            check_resumable(saved["config"], as_plain(config), config.run_dir, new_order=config.train.new_order)
        refused = Refused.load(checkpoint) if checkpoint else Refused.none()
        inputs = open_inputs(config, ranks, saved["step"] if saved else 0, saved["order"] if saved else None, refused)
        last_step = _last_step(config, inputs.order)
        state = TrainState(step=0, schedule_steps=config.train.schedule_steps or last_step)
        if saved is not None:
            state = state_from(saved)
        if not state.evaluation_due and (state.step >= last_step or out_of_patience(state, config)):
            ranks.say(f"train: done before, at step {state.step}")
            return
        if last_step > state.schedule_steps:
            ranks.say(
                f"train: the learning rate stays at its end after step {state.schedule_steps} (train.schedule_steps of"
                " the first start does not move on resume); to extend a schedule, set it before the first start"
            )
        engine = _open_engine(config, ranks, inputs, checkpoint)
        ranks.on_first(lambda: _open_run_dir(run_dir, config, state))
        tracker = open_tracker(config, saved["tracker_run_id"] if saved else None, first=ranks.is_first)
        _train(config, engine, inputs, state, last_step, tracker)


def _train(config: Config, engine: Engine, inputs: Inputs, state: TrainState, last_step: int, tracker: Tracker) -> None:
    """The steps that are left."""
    run_dir, ranks = Path(config.run_dir), engine.ranks
    refusals = Refusals(run_dir, inputs, config.train.max_refused, ranks)

    def save(best: bool) -> None:
        refusals.agree()
        saver.save(_about(config, inputs, state, tracker), {FILE_NAME: inputs.refused.encode()}, best=best)

    saver = CheckpointSaver(
        run_dir, engine, keep_last=config.checkpoint.keep_last, in_background=config.checkpoint.async_save
    )
    with (
        preemption.holding(),
        StepLog(run_dir, config.train, ranks, tracker) as log,
        contextlib.closing(refusals),
        watchdog.resting_after(),
        saver,
    ):
        refusals.open(state.step + 1)
        loader = TrainLoader(
            inputs.reader,
            inputs.order,
            inputs.encode,
            rank=ranks.rank,
            world_size=ranks.world_size,
            micro_batch_size=config.train.micro_batch_size,
            num_workers=config.train.num_workers,
            start_step=state.step + 1,
            end_step=last_step,
            on_refused=refusals.write,
        )
        TrainLoop(
            config,
            engine,
            build_objective(config.train.loss),
            loader,
            state,
            last_step=last_step,
            log=log,
            refusals=refusals,
            validate=open_validation(config, engine, inputs.encode, inputs.folder, log, refusals.write),
            save=save,
        ).run()


def _about(config: Config, inputs: Inputs, state: TrainState, tracker: Tracker) -> dict[str, Any]:
    """What a checkpoint says, beside weights and optimizer."""
    position = state.step * inputs.order.batch_size
    return asdict(state) | {
        "position": position,
        "order": inputs.order.state(inputs.reader.manifest_hash, position),
        "config": as_plain(config),
        "taxonomy": inputs.encode.taxonomy.to_json(),
        "tracker_run_id": tracker.run_id,
    }


def _open_engine(config: Config, ranks: Ranks, inputs: Inputs, checkpoint: Path | None) -> Engine:
    """The model under DeepSpeed, restored where there is a checkpoint."""
    encode = inputs.encode
    micro_batch_size, _ = micro_batches(config.train.batch_size, ranks.world_size, config.train.micro_batch_size)
    model = starting_model(config, ranks, encode, micro_batch_size)
    seed_rank(config.seed, ranks.rank)
    engine = Engine(model, config, ranks, micro_batch_size)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, engine, config.seed)
        ranks.say(f"train: going on after step {state['step']}")
    return engine


def _clean(run_dir: Path, config: Config) -> None:
    """Rank 0: a fresh start where one is asked for, and no remains of a killed save."""
    if config.train.restart:
        checkpoint_folder.move_aside(run_dir)
    checkpoint_folder.remove_staging(run_dir)
    checkpoint_folder.point(run_dir)


def _open_run_dir(run_dir: Path, config: Config, state: TrainState) -> None:
    """Rank 0: the configuration in force, and no lines of steps that will come again."""
    save_config(config, run_dir / "config.yaml")
    cut_after(run_dir, state.step, evaluated=not state.evaluation_due)


def _last_step(config: Config, order: SampleOrder) -> int:
    """max_steps, or the step that completes max_epochs when that comes first."""
    if config.train.max_epochs is None:
        return config.train.max_steps
    return min(config.train.max_steps, math.ceil(config.train.max_epochs / order.epoch(1)))
