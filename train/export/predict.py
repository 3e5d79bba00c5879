"""Scoring posts with a bundle: on CPU or GPU, without DeepSpeed, with the scores that the evaluation would give."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from crossguard.configs.errors import UserError
from crossguard.configs.schema import BuildConfig, Config, DataConfig, TaxonomyConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.manifest import Manifest
from crossguard.data.sources import Record, Source, open_source
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.scoring import score_split
from crossguard.train.export.bundle import Bundle, load_bundle
from crossguard.train.metrics_log import LineLog
from crossguard.train.ranks import Ranks

_WORKSPACE = ".predict-"


def predict(bundle_dir: Path, data: DataConfig, output: Path, batch_size: int) -> str:
    """Score posts and write a table with columns id, language, score.<policy>, label.<policy>, calibrated.<policy> (the
    probability of a violation), action.<policy> (null where the bundle has no threshold for the language), and, for
    policies with a severity, severity.<policy> (the level to be expected) and severity_label.<policy>.

    Posts go through the checks of a build (wrong lines, consent, expiry, restricted classes, damaged media) and the
    same reading as in training, by way of temporary shards beside `output`; labels may be absent. Posts that may not be
    read are left out and counted; those whose media is missing or damaged are named in `<output>.quarantine.jsonl`.

    Args:
        bundle_dir: what `crossguard export` wrote.
        data: where the posts are.
        output: a Parquet file.
        batch_size: posts in a forward pass.

    Returns:
        A sentence about what was written.

    Raises:
        UserError: the bundle or the posts are wrong.
    """
    if not output.parent.is_dir():
        raise UserError(f"output={output}: the folder does not exist")
    bundle = load_bundle(bundle_dir)
    quarantine = output.with_name(f"{output.name}.quarantine.jsonl")
    quarantine.unlink(missing_ok=True)
    with _workspace(output.parent) as folder:
        shards_dir = folder / "shards"
        manifest = _build(bundle, data, shards_dir, quarantine)
        predictions = _score(bundle, ShardFolder(str(shards_dir), manifest), quarantine, batch_size)
    predictions.write(output, _decided(bundle, predictions))
    said = [f"{len(predictions)} posts -> {output}"]
    said += [f"{count} left out ({rule})" for rule, count in manifest.left_out.items() if count]
    if quarantine.exists():
        said.append(f"{len(quarantine.read_bytes().splitlines())} refused -> {quarantine}")
    return "; ".join(said)


def _decided(bundle: Bundle, predictions: Predictions) -> dict[str, pa.Array]:
    """The columns that are decided from scores."""
    calibrated, actions = bundle.decisions.calibrated(predictions), bundle.decisions.actions(predictions)
    columns = {}
    for column, policy in enumerate(predictions.policies):
        columns[f"calibrated.{policy}"] = pa.array(calibrated[:, column], pa.float64())
        columns[f"action.{policy}"] = pa.array(list(actions[:, column]), pa.string())
    return columns


@contextlib.contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A temporary folder. A kernel lock says that it is in use, so that those of killed predictions can be removed."""
    with contextlib.ExitStack() as held:
        # A folder that is not locked yet would be taken for that of a killed prediction.
        with _locked(parent, waiting=True):
            for old in parent.glob(f"{_WORKSPACE}*"):
                with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(old):
                    shutil.rmtree(old)
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=_WORKSPACE, dir=parent)))
            held.enter_context(_locked(folder))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, *, waiting: bool = False) -> Iterator[None]:
    """Hold the lock of a folder; raises BlockingIOError where another process does, or is `waiting` for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _build(bundle: Bundle, data: DataConfig, shards_dir: Path, quarantine: Path) -> Manifest:
    config = Config(
        recipe="predict",
        taxonomy=_taxonomy_config(bundle.taxonomy),
        data=data,
        # Whatever can be scored is scored; what cannot is named. One process: for a few posts, starting others would
        # take longer than the work.
        build=BuildConfig(num_workers=1, max_refused=1.0, splits={"posts": 1.0}),
    )
    source = _LabelsOptional(open_source(data, bundle.taxonomy, config.seed))
    return build_shards(config, shards_dir, quarantine, source=source)


def _score(bundle: Bundle, folder: ShardFolder, quarantine: Path, batch_size: int) -> Predictions:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    alone = Ranks(rank=0, local_rank=0, world_size=1, device=device)
    model = bundle.model.to(device)
    refused = LineLog(quarantine)
    parts = []
    for split in folder.manifest.splits:
        reader = ShardReader([folder], split)
        rows = np.arange(len(reader))
        parts.append(
            score_split(
                model, bundle.encode, reader, rows, alone, batch_size, on_refused=refused.write, title="predict"
            )
        )
    refused.close()
    return Predictions.gather(bundle.taxonomy.names, parts)


class _LabelsOptional:
    """A source whose posts need no labels: without any, all of them are unknown."""

    def __init__(self, source: Source):
        self.source = source

    def records(self) -> Iterator[Record]:
        for record in itertools.starmap(Record, self.source.records()):
            unlabeled = record.raw is not None and record.raw.get("labels") is None
            yield record._replace(raw={**(record.raw or {}), "labels": {}}) if unlabeled else record

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def _taxonomy_config(taxonomy: Taxonomy) -> TaxonomyConfig:
    policies = [PolicyConfig(**asdict(policy)) for policy in taxonomy.policies]
    return TaxonomyConfig(taxonomy.name, taxonomy.version, policies)
