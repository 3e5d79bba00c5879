"""The stages of a job (build, train, evaluate, export): what each reads and writes, and when it need not run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossguard.configs.saved import as_plain, fingerprint, select
from crossguard.data.shards.files import write_atomic
from crossguard.launchers import one_node
from crossguard.recipes import artefacts, work
from crossguard.recipes.job import Job

Hashes = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """One step of a job.

    Attributes:
        name: as on the command line.
        keys: the configuration that it reads; paths, ranks, workers and the tracker are never among them.
        inputs: hashes of the artefacts that it reads.
        outputs: hashes of the artefacts that it wrote; empty while there are none.
        work: does it.
    """

    name: str
    keys: tuple[str, ...]
    inputs: Callable[[Job], Hashes]
    outputs: Callable[[Job], Hashes]
    work: Callable[[Job], None]


BUILD = Stage(
    "build",
    (
        "taxonomy",
        "data.source",
        "data.limit",
        "data.columns",
        "data.options",
        "build.samples_per_shard",
        "build.max_refused",
        "build.splits",
    ),
    artefacts.posts,
    artefacts.manifest,
    work.build,
)
TRAIN = Stage(
    "train",
    (
        "seed",
        "taxonomy",
        "data.mixing.temperature",
        "data.mixing.max_repeats",
        "data.mixing.weights",
        "data.mixing.changes",
        "model",
        "train.max_steps",
        "train.max_epochs",
        "train.batch_size",
        "train.lr",
        "train.weight_decay",
        "train.betas",
        "train.warmup_steps",
        "train.min_lr_ratio",
        "train.schedule_steps",
        "train.grad_clip",
        "train.layer_decay",
        "train.lr_factors",
        "train.freeze",
        "train.ema_decay",
        "train.precision",
        "train.loss",
        "train.attacks",
        "train.patience",
        "checkpoint.metric",
        "checkpoint.mode",
        "evaluation.every_steps",
        "evaluation.max_validation_posts",
    ),
    artefacts.trained_on,
    artefacts.checkpoint,
    work.train,
)
EVALUATE = Stage(
    "evaluate",
    (
        "taxonomy",
        "model",
        "evaluation.splits",
        "evaluation.min_positives",
        "evaluation.slices",
        "evaluation.calibration",
        "evaluation.actions",
        "evaluation.margin",
        "evaluation.false_positive_cost",
        "evaluation.false_negative_cost",
        "evaluation.metrics",
        "evaluation.references",
        "evaluation.attacks",
        "evaluation.max_attacked_posts",
        "evaluation.show_texts",
        "evaluation.modality_subsets",
    ),
    artefacts.evaluated_on,
    artefacts.report,
    work.evaluate,
)
EXPORT = Stage("export", ("taxonomy", "model", "description"), artefacts.evaluated, artefacts.bundle, work.export)


def run_stage(stage: Stage, job: Job) -> bool:
    """Run a stage unless its record says that nothing it reads or wrote has changed since.

    Returns:
        Whether it had to run.
    """
    record_file = job.run_dir / "stages" / f"{stage.name}.json"
    record = _record(stage, job)
    outputs = stage.outputs(job)
    if outputs and not job.config.train.restart and _read(record_file) == {**record, "outputs": outputs}:
        return False
    stage.work(job)
    # With the inputs as they were before: what changed while the work went on is work for the next run. Other nodes may
    # not see yet what this one has written.
    if one_node.is_here(job.config.launcher):
        _write(record_file, {**record, "outputs": stage.outputs(job)})
    return True


def _record(stage: Stage, job: Job) -> dict[str, Any]:
    read = {"config": select(as_plain(job.config), stage.keys), "inputs": stage.inputs(job)}
    return {"stage": stage.name, **read, "fingerprint": fingerprint(read)}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
