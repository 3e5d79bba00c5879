"""Hashes of what the stages hand to each other; empty where an artefact is not there yet."""

from __future__ import annotations

import hashlib
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.recipes.job import Job
from crossguard.train.checkpoint_folder import best_checkpoint, latest_checkpoint
from crossguard.train.checkpoint_manifest import MANIFEST

Hashes = dict[str, str]


def posts(job: Job) -> Hashes:
    """What the source would read."""
    from crossguard.data.sources import fingerprint_of, open_source
    from crossguard.data.taxonomy import Taxonomy

    if not job.config.data.has_posts:
        raise UserError("data.path: not set; build needs data.path=FILE_OR_FOLDER of posts")
    taxonomy = Taxonomy.from_config(job.config.taxonomy)
    source = open_source(job.config.data, taxonomy, job.config.seed)
    return {"posts": fingerprint_of(source, job.config.data)}


def manifest(job: Job) -> Hashes:
    """The shards."""
    from crossguard.data.shards.folder import read_manifest

    return {"manifest": read_manifest(job.config.shards_location).sha256} if job.has_shards else {}


def trained_on(job: Job) -> Hashes:
    """The shards, and those that are mixed in."""
    from crossguard.data.shards.folder import read_manifest

    further = {name: read_manifest(location) for name, location in job.config.data.mixing.datasets.items()}
    return manifest(job) | {f"manifest of {name}": found.sha256 for name, found in further.items()}


def checkpoint(job: Job) -> Hashes:
    """The newest checkpoint and the best one, by the manifest inside each."""
    return _checkpoint(job.run_dir)


def trained(job: Job) -> Hashes:
    """Shards and checkpoints, those of the ablations as well."""
    hashes = {**manifest(job), **checkpoint(job)}
    for folder in sorted((job.run_dir / "ablations").glob("*")):
        hashes |= {f"ablations/{folder.name}/{name}": value for name, value in _checkpoint(folder).items()}
    return hashes


def evaluated_on(job: Job) -> Hashes:
    """Shards, checkpoints, the functional suite, and the predictions of the run that they are compared with."""
    from crossguard.configs.schema import DataConfig
    from crossguard.data.sources import fingerprint_of, open_source
    from crossguard.data.taxonomy import Taxonomy

    hashes = trained(job)
    if job.config.evaluation.suite is not None:
        cases = DataConfig(path=job.config.evaluation.suite)
        if not Path(job.config.evaluation.suite).exists():
            raise UserError(f"evaluation.suite={job.config.evaluation.suite}: no such file or folder")
        source = open_source(cases, Taxonomy.from_config(job.config.taxonomy), job.config.seed)
        hashes["suite"] = fingerprint_of(source, cases)
    if job.config.evaluation.against is not None:
        earlier = Path(job.config.evaluation.against) / "predictions"
        files = sorted(earlier.glob("*.parquet"))
        if not files:
            raise UserError(f"evaluation.against: {earlier}: no predictions; run `crossguard evaluate` there first")
        hashes |= {f"against/{file.name}": _hash(file) for file in files}
    return hashes


def report(job: Job) -> Hashes:
    """Figures and predictions."""
    files = [job.run_dir / "report" / name for name in ("metrics.json", "report.html")]
    if not all(file.exists() for file in files):
        return {}
    files += sorted((job.run_dir / "predictions").glob("*.parquet"))
    return {file.relative_to(job.run_dir).as_posix(): _hash(file) for file in files}


def evaluated(job: Job) -> Hashes:
    """The checkpoints and what was measured on them."""
    return {**checkpoint(job), **report(job)}


def bundle(job: Job) -> Hashes:
    """The exported files."""
    folder = job.run_dir / "bundle"
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return {file.relative_to(job.run_dir).as_posix(): _hash(file) for file in files}


def _checkpoint(run_dir: Path) -> Hashes:
    found = {"latest": latest_checkpoint(run_dir), "best": best_checkpoint(run_dir)}
    return {name: f"{path.name}:{_hash(path / MANIFEST)}" for name, path in found.items() if path is not None}


def _hash(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]
    except FileNotFoundError:
        raise UserError(f"{file}: missing; the run directory is damaged") from None
