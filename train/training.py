"""The train stage on one rank: takes the run directory, puts the parts together, resumes, runs the loop."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.resume import check_resumable
from crossguard.configs.saved import as_plain, save_config
from crossguard.configs.schema import Config
from crossguard.data.loading.embeddings import Embeddings
from crossguard.data.loading.loader import TrainLoader
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.refused import FILE_NAME, Refused
from crossguard.train import checkpoint_folder, phases, preemption
from crossguard.train.checkpoint import load_checkpoint, newest_valid
from crossguard.train.checkpoint_copies import CheckpointCopies
from crossguard.train.checkpoint_saving import CheckpointSaver
from crossguard.train.compute import find_compute
from crossguard.train.determinism import deterministic
from crossguard.train.embeddings import EmbeddingCache
from crossguard.train.engine import Engine
from crossguard.train.guards import Guards
from crossguard.train.inputs import Inputs, open_inputs
from crossguard.train.loop import TrainLoop, TrainState, out_of_patience, state_from
from crossguard.train.metrics_log import cut_after
from crossguard.train.micro_batch import MicroBatch
from crossguard.train.objectives.opening import Beside, open_objective
from crossguard.train.profiling import profiling
from crossguard.train.random_state import seed_rank
from crossguard.train.ranks import Ranks
from crossguard.train.refusals import Refusals
from crossguard.train.run_lock import run_lock
from crossguard.train.start_from import Earlier, start_from
from crossguard.train.starting_model import starting_model
from crossguard.train.step_log import StepLog
from crossguard.train.tracking import Tracker, open_tracker
from crossguard.train.validation import open_validation


def run_training(config: Config, ranks: Ranks) -> None:
    """Train to `train.max_steps`, going on from the newest checkpoint; nothing happens when that is there already.

    Raises:
        UserError: the configuration, the shards or a checkpoint do not fit together.
        JobError: the run directory is in use, losses are not finite, or the disk refuses a checkpoint.
        OutOfMemory: a step does not fit into memory; the next start takes fewer posts at once.
        Preempted: a rank was asked to stop; all ranks have stopped after the same step, which is saved.
    """
    run_dir = Path(config.run_dir)
    with deterministic(config.train.deterministic), run_lock(run_dir, ranks):
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
        beside = Beside.open(config, ranks, inputs, saved.get("beside", {}) if saved else None)
        micro_batch = MicroBatch(config, ranks)
        engine = _open_engine(config, ranks, inputs, checkpoint, micro_batch)
        ranks.on_first(lambda: _open_run_dir(run_dir, config, state))
        tracker = open_tracker(config, saved["tracker_run_id"] if saved else None, first=ranks.is_first)
        try:
            _train(config, engine, inputs, beside, state, last_step, tracker, micro_batch)
        finally:
            # The process ends: closing the engine would wait for a device, or for ranks, that may be what has failed.
            engine.remove_swap_files()


def _train(
    config: Config,
    engine: Engine,
    inputs: Inputs,
    beside: Beside,
    state: TrainState,
    last_step: int,
    tracker: Tracker,
    micro_batch: MicroBatch,
) -> None:
    """The steps that are left."""
    run_dir, ranks = Path(config.run_dir), engine.ranks
    refusals = Refusals(run_dir, inputs, config.train.max_refused, ranks)
    guards = Guards(config.train, state, ranks, refusals, tracker)

    def save(best: bool) -> None:
        refusals.agree()
        saver.save(_about(config, inputs, beside, state, tracker), {FILE_NAME: inputs.refused.encode()}, best=best)

    cache = _open_cache(config, engine, inputs)
    embeddings = None if cache is None else cache.of(inputs.reader)
    # Of the encoders, which take most of it, nothing is computed then.
    compute = None if cache is not None else find_compute(config, ranks)
    saver = _open_saver(config, engine)
    with (
        preemption.holding(),
        profiling(run_dir, ranks) if config.train.profile else contextlib.nullcontext(),
        StepLog(run_dir, config.train, ranks, tracker, compute) as log,
        contextlib.closing(refusals),
        contextlib.closing(guards),
        phases.resting_after(),
        saver,
    ):
        refusals.open(state.step + 1)
        steps = range(state.step + 1, last_step + 1)
        loader = _open_loader(config, inputs, ranks, micro_batch, steps, refusals, embeddings)
        TrainLoop(
            config,
            engine,
            open_objective(config, ranks, inputs.reader.shards, state.group_weights),
            beside.attached(loader, state.step + 1, ranks),
            state,
            last_step=last_step,
            log=log,
            refusals=refusals,
            guards=guards,
            micro_batch=micro_batch,
            validate=open_validation(config, engine, inputs.encode, inputs.folder, log, refusals.write, cache),
            save=save,
        ).run()


def _open_cache(config: Config, engine: Engine, inputs: Inputs) -> EmbeddingCache | None:
    """What stands in for the posts; from then on no more is read of them than it leaves out."""
    if not config.train.cache_embeddings:
        return None
    cache = EmbeddingCache(config, engine, inputs.encode, inputs.reader.folders)
    inputs.encode = cache.beside
    return cache


def _open_loader(
    config: Config,
    inputs: Inputs,
    ranks: Ranks,
    micro_batch: MicroBatch,
    steps: range,
    refusals: Refusals,
    embeddings: Embeddings | None,
) -> TrainLoader:
    """This rank's share of the steps."""
    return TrainLoader(
        inputs.reader,
        inputs.order,
        inputs.encode,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch_size=micro_batch.size,
        num_workers=config.train.num_workers,
        start_step=steps.start,
        end_step=steps.stop - 1,
        on_refused=refusals.write,
        embeddings=embeddings,
    )


def _about(config: Config, inputs: Inputs, beside: Beside, state: TrainState, tracker: Tracker) -> dict[str, Any]:
    """What a checkpoint says, beside weights and optimizer."""
    position = state.step * inputs.order.batch_size
    return asdict(state) | {
        "position": position,
        "order": inputs.order.state(inputs.reader.manifest_hash, position),
        "beside": beside.files,
        "config": as_plain(config),
        "taxonomy": inputs.encode.taxonomy.to_json(),
        "tokenizer": inputs.encode.tokenizer.fingerprint,
        "tracker_run_id": tracker.run_id,
    }


def _open_engine(
    config: Config, ranks: Ranks, inputs: Inputs, checkpoint: Path | None, micro_batch: MicroBatch
) -> Engine:
    """The model under DeepSpeed, restored where there is a checkpoint."""
    encode = inputs.encode
    model = starting_model(config, ranks, encode, micro_batch.size)
    if config.model.start_from and checkpoint is None:
        earlier = Earlier.open(Path(config.model.start_from), ranks)
        ranks.say(start_from(earlier, config.model, model, encode, ranks))
    seed_rank(config.seed, ranks.rank)
    engine = Engine(model, config, ranks, micro_batch.size)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, engine, config.seed)
        ranks.say(f"train: going on after step {state['step']}")
    return engine


def _open_saver(config: Config, engine: Engine) -> CheckpointSaver:
    wanted = config.checkpoint
    run_dir, copies = Path(config.run_dir), _copies(config)
    return CheckpointSaver(run_dir, engine, keep_last=wanted.keep_last, in_background=wanted.async_save, copies=copies)


def _copies(config: Config) -> CheckpointCopies | None:
    return CheckpointCopies(config.checkpoint.copy_to) if config.checkpoint.copy_to else None


def _clean(run_dir: Path, config: Config) -> None:
    """Rank 0: a fresh start where one is asked for, and only there; no remains of a killed save; what others saved."""
    copies = _copies(config)
    newest = copies.newest_state() if copies is not None else None
    if config.train.restart and newest is not None:
        raise UserError(
            f"train.restart=true: checkpoint.copy_to={config.checkpoint.copy_to} holds checkpoints of the run that is"
            " to begin anew; name another folder, or empty that one"
        )
    if config.train.restart:
        checkpoint_folder.move_aside(run_dir)
    checkpoint_folder.remove_staging(run_dir)
    if copies is not None and newest is not None:
        check_resumable(newest["config"], as_plain(config), copies.url, new_order=config.train.new_order)
        for taken in copies.take(run_dir):
            print(f"train: {taken.name} is taken from {copies.url}", file=sys.stderr, flush=True)
    checkpoint_folder.check_not_lost(run_dir)
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
