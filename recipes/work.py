"""What each stage does. Heavy parts are imported inside, so that a wrong configuration is answered at once."""

from __future__ import annotations

from crossguard.configs.errors import UserError
from crossguard.configs.resume import check_resumable
from crossguard.configs.saved import as_plain
from crossguard.launchers import launch, num_procs
from crossguard.recipes.job import Job
from crossguard.train.checkpoint_folder import latest_checkpoint, read_state


def build(job: Job) -> None:
    """Write the shards."""
    from crossguard.data.shards.build import build_shards

    manifest = build_shards(job.config, job.shards_dir, job.run_dir / "quarantine.jsonl")
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest.splits.items())
    version = f" (version {manifest.version})" if manifest.parent else ""
    print(f"build: {counts} posts in {len(manifest.shards)} shards{version} -> {job.shards_dir}", flush=True)
    left_out = {**manifest.left_out, "missing or corrupt media, see quarantine.jsonl": manifest.refused}
    if any(left_out.values()):
        named = ", ".join(f"{count:,} ({rule})" for rule, count in left_out.items() if count)
        print(f"build: left out: {named}", flush=True)


def train(job: Job) -> None:
    """Train on the ranks of the launcher; goes on by itself where a run directory has checkpoints."""
    _need_shards(job)
    check_ranks(job)
    launch(["stage=train", *job.arguments], job.config.launcher)


def evaluate(job: Job) -> None:
    """Score every held-out split and write the report."""
    _need_shards(job)
    _need_checkpoint(job, "evaluate")
    launch(["stage=evaluate", *job.arguments], job.config.launcher)
    print(f"evaluate: report -> {job.run_dir / 'report' / 'report.html'}", flush=True)


def export(job: Job) -> None:
    """Write the bundle of the best checkpoint."""
    from crossguard.train.export.bundle import write_bundle

    _need_checkpoint(job, "export")
    print(f"export: bundle -> {write_bundle(job.config, job.run_dir)}", flush=True)


def check_ranks(job: Job) -> None:
    """What the ranks would refuse, before any of them starts."""
    from crossguard.data.loading.order import micro_batches

    config = job.config
    micro_batches(config.train.batch_size, num_procs(config.launcher), config.train.micro_batch_size)
    newest = latest_checkpoint(job.run_dir)
    if newest is not None and not config.train.restart:
        check_resumable(read_state(newest)["config"], as_plain(config), config.run_dir)


def _need_shards(job: Job) -> None:
    if not job.has_shards:
        raise UserError(f"{job.shards_dir}: no shards here; run `crossguard build` with the same arguments first")


def _need_checkpoint(job: Job, stage: str) -> None:
    if latest_checkpoint(job.run_dir) is None:
        raise UserError(
            f"{job.run_dir}: no checkpoint to {stage}; run `crossguard train` with the same arguments first"
        )
