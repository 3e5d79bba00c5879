"""What each stage does. Heavy parts are imported inside, so that a wrong configuration is answered at once."""

from __future__ import annotations

import json

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.resume import check_resumable
from crossguard.configs.saved import as_plain
from crossguard.launchers import launch, world_sizes
from crossguard.recipes.job import Job
from crossguard.train.checkpoint_folder import checkpoint_folders, latest_checkpoint, read_state

# Groups that got worse, in the message of a failed comparison.
MOST_LISTED = 5


def build(job: Job) -> None:
    """Write the shards; those that belong behind a URL are written into the run directory first."""
    from crossguard.data.shards.build import build_shards
    from crossguard.data.shards.manifest import FILE_NAME
    from crossguard.data.shards.publish import publish
    from crossguard.data.shards.storage import local_path

    location = job.config.shards_location
    folder = local_path(location)
    staging = job.run_dir / "shards-staging"
    if folder is None and job.config.build.append and job.has_shards and not (staging / FILE_NAME).exists():
        raise UserError(
            f"{staging}: not here; build.append=true needs the shards as they were built before they were put behind "
            f"{location}: copy them from there into this folder, or build all anew with data.shards=NEW_URL"
        )
    manifest = build_shards(job.config, folder or staging, job.run_dir / "quarantine.jsonl")
    if folder is None:
        publish(staging, manifest, location)
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest.splits.items())
    version = f" (version {manifest.version})" if manifest.parent else ""
    print(f"build: {counts} posts in {len(manifest.shards)} shards{version} -> {location}", flush=True)
    left_out = {**manifest.left_out, "missing or corrupt media, see quarantine.jsonl": manifest.refused}
    if any(left_out.values()):
        named = ", ".join(f"{count:,} ({rule})" for rule, count in left_out.items() if count)
        print(f"build: left out: {named}", flush=True)


def train(job: Job) -> None:
    """Train on the ranks of the launcher; goes on by itself where a run directory has checkpoints."""
    check_splits(job, training=True)
    check_ranks(job)
    launch(["stage=train", *job.arguments], job.config.launcher, job.config.train.batch_size, job.run_dir)


def evaluate(job: Job) -> None:
    """Score every held-out split and write the report."""
    check_splits(job)
    _need_checkpoint(job, "evaluate")
    launch(["stage=evaluate", *job.arguments], job.config.launcher, 0, job.run_dir)  # Any number of ranks will do.
    print(f"evaluate: report -> {job.run_dir / 'report' / 'report.html'}", flush=True)
    if job.config.evaluation.against is not None:
        _check_not_worse(job)


def export(job: Job) -> None:
    """Write the bundle of the best checkpoint."""
    from crossguard.train.export.bundle import write_bundle

    _need_checkpoint(job, "export")
    print(f"export: bundle -> {write_bundle(job.config, job.run_dir)}", flush=True)


def check_ranks(job: Job) -> None:
    """What the ranks would refuse, before any of them starts."""
    from crossguard.data.loading.order import micro_batches

    config = job.config
    for ranks in world_sizes(config.launcher):
        micro_batches(config.train.batch_size, ranks, config.train.micro_batch_size)
    newest = latest_checkpoint(job.run_dir)
    if newest is not None and not config.train.restart:
        saved = read_state(newest)["config"]
        check_resumable(saved, as_plain(config), config.run_dir, new_order=config.train.new_order)


def check_splits(job: Job, *, training: bool = False) -> None:
    """Whether the shards are there and have the splits that the configuration names, before hours of training."""
    from crossguard.data.shards.folder import ShardFolder
    from crossguard.train.evaluation.splits import check_trained_splits, evaluated_splits

    if not job.has_shards:
        raise UserError(
            f"{job.config.shards_location}: no shards here; run `crossguard build` with the same arguments first"
        )
    manifest = ShardFolder.open(job.config.shards_location, job.config.data.cache).manifest
    if training:
        check_trained_splits(job.config, manifest)
    if not training or job.config.evaluation.splits:
        evaluated_splits(job.config, manifest)


def _check_not_worse(job: Job) -> None:
    """End the job where a group got worse than in the run that it is compared with."""
    from crossguard.train.evaluation.compare import in_words

    metrics = json.loads((job.run_dir / "report" / "metrics.json").read_text(encoding="utf-8"))
    worse, against = metrics["against"]["worse"], job.config.evaluation.against
    if worse:
        listed = "; ".join(in_words(one) for one in worse[:MOST_LISTED])
        more = f"; and {len(worse) - MOST_LISTED} more" if len(worse) > MOST_LISTED else ""
        raise JobError(
            f"evaluate: worse than {against} by more than evaluation.margin={job.config.evaluation.margin:g}: "
            f"{listed}{more}; see the report"
        )
    print(f"evaluate: no group is worse than in {against}", flush=True)


def _need_checkpoint(job: Job, stage: str) -> None:
    if not checkpoint_folders(job.run_dir):
        raise UserError(
            f"{job.run_dir}: no checkpoint to {stage}; run `crossguard train` with the same arguments first"
        )
