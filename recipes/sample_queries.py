"""`crossguard shards preview` and `crossguard shards exposure`: what a step holds, and which steps held a sample."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossguard.configs.arguments import take
from crossguard.configs.errors import UserError
from crossguard.configs.saved import load_config
from crossguard.configs.schema import Config
from crossguard.recipes.job import Job
from crossguard.train.checkpoint_folder import checkpoints_of, latest_checkpoint, read_state, step_of

if TYPE_CHECKING:  # numpy and torch wait until the arguments are known to be right
    from crossguard.data.loading.order import SampleOrder
    from crossguard.data.loading.reader import ShardReader
    from crossguard.data.loading.refused import Refused


def preview(argv: list[str]) -> None:
    """Print the ids of any step of a job, past or to come."""
    own, rest = take(argv, "step")
    if not own.get("step", "").isdigit() or int(own["step"]) < 1:
        raise UserError(f"step={own.get('step', '')}: say step=N with N from 1")
    step = int(own["step"])
    config = Job.from_arguments(rest).config
    from crossguard.data.loading import queries
    from crossguard.data.loading.plan import unreadable_rows

    reader, order, refused, done = open_run(config)
    refused = refused.add(unreadable_rows(reader, time.time()), done + 1)
    print(json.dumps({"step": step, "ids": queries.preview(reader, order, refused, step)}, ensure_ascii=False))


def exposure(argv: list[str]) -> None:
    """Print every step of a run that consumed a sample, and every checkpoint that has learned from it."""
    own, ids = take(argv, "run_dir", "data.shards")
    if len(ids) != 1 or "run_dir" not in own:
        raise UserError("shards exposure: say `crossguard shards exposure SAMPLE_ID run_dir=DIR`")
    config = load_config(Path(own["run_dir"]) / "config.yaml")
    config.run_dir, config.data.shards = own["run_dir"], own.get("data.shards", config.data.shards)
    print(json.dumps(_exposure(config, ids[0]), ensure_ascii=False))


def _exposure(config: Config, sample: str) -> dict[str, Any]:
    from crossguard.data.loading import queries

    run_dir = Path(config.run_dir)
    reader, order, refused, done = open_run(config)
    if not done:
        raise UserError(f"{run_dir}: no checkpoint, nothing has learned from any sample yet")
    row = reader.row_of(sample)
    if row is None:
        raise UserError(f"{sample}: not among the training samples in {reader.place}")
    steps = queries.exposure(order, refused, row, done)
    learned = [path.name for path in checkpoints_of(run_dir) if steps and step_of(path) >= steps[0]]
    found: dict[str, Any] = {"id": sample, "steps": steps, "checkpoints": learned}
    if order.first_step > 1:  # train.new_order: what came before is not known any more
        found["searched_from_step"] = order.first_step
    return found


def open_run(config: Config) -> tuple[ShardReader, SampleOrder, Refused, int]:
    """Reader and order of a run, what it does not read, and the steps done."""
    from crossguard.data.loading.plan import continue_order, open_folders, plan_training
    from crossguard.data.loading.refused import Refused
    from crossguard.data.taxonomy import Taxonomy
    from crossguard.train.encode import PostEncoder

    run_dir = Path(config.run_dir)
    checkpoint = latest_checkpoint(run_dir)
    saved = read_state(checkpoint) if checkpoint else None
    refused = Refused.load(checkpoint) if checkpoint else Refused.none()
    encode = PostEncoder(config.model, Taxonomy.from_config(config.taxonomy))
    done = saved["step"] if saved else 0
    folders = open_folders(config)
    reader, order, refused = continue_order(
        lambda first_step: plan_training(config, folders, run_dir, encode, first_step=first_step),
        saved["order"] if saved else None,
        refused,
        done,
        new_order=config.train.new_order,
    )
    return reader, order, refused, done
