"""The evaluate stage: scores every held-out split with the run's model and its ablations, measures, reports."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from crossguard.configs.resume import check_same_model
from crossguard.configs.saved import as_plain, load_config
from crossguard.configs.schema import Config, ModelConfig
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.taxonomy import Taxonomy
from crossguard.train import watchdog
from crossguard.train.checkpoint import best_valid, load_weights
from crossguard.train.checkpoint_folder import checkpoints_of, read_state, step_of
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.measure import MODEL, Posts, Scored, measure
from crossguard.train.evaluation.scoring import score_split
from crossguard.train.evaluation.slices import read_fields
from crossguard.train.evaluation.splits import evaluated_splits
from crossguard.train.inputs import warn_of_lost
from crossguard.train.metrics_log import LineLog
from crossguard.train.ranks import Ranks
from crossguard.train.run_lock import run_lock
from crossguard.train.trained import load_trained

# id -> field -> value.
Fields = dict[str, dict[str, str]]


def run_evaluation(config: Config, ranks: Ranks) -> None:
    """Write predictions/, report/metrics.json and report/report.html of a trained run; all ranks call it.

    Scores are computed in fp32 from the best checkpoint's weights, also those of each ablation in `ablations/`.

    Raises:
        UserError: no checkpoint, a split that does not exist, shards or checkpoint of something else.
        JobError: the run directory is in use.
        Preempted: a rank was asked to stop; nothing is half-written.
    """
    run_dir = Path(config.run_dir)
    with run_lock(run_dir, ranks):
        checkpoint = best_valid(run_dir, ranks)
        check_same_model(read_state(checkpoint)["config"], as_plain(config), str(checkpoint))
        posts = _open_posts(config, ranks)
        watchdog.arm()
        fields = _read_fields(config, posts, ranks)
        scored = {MODEL: _score(run_dir, checkpoint, config.model, config, posts, fields, ranks)}
        ablations = ranks.on_first(
            lambda: [path for name in config.ablations if checkpoints_of(path := run_dir / "ablations" / name)]
        )
        for folder in ablations:
            model = load_config(folder / "config.yaml").model
            scored[folder.name] = _score(folder, best_valid(folder, ranks), model, config, posts, fields, ranks)
        if ranks.is_first:
            measure(run_dir, step_of(checkpoint), config, posts, scored, [folder.name for folder in ablations])


def _open_posts(config: Config, ranks: Ranks) -> Posts:
    folder = ranks.on_first(lambda: ShardFolder.open(config.shards_location, config.data.cache))
    manifest = folder.manifest
    taxonomy = Taxonomy.from_config(config.taxonomy)
    manifest.check_taxonomy(taxonomy)
    ranks.on_first(lambda: warn_of_lost(folder, ranks))
    splits = evaluated_splits(config, manifest)
    now = ranks.broadcast(time.time())  # One clock decides which posts have expired.
    readers = {split: ShardReader([folder], split) for split in manifest.splits}
    rows = {split: reader.readable_rows(now) for split, reader in readers.items()}
    return Posts(folder, taxonomy, readers, rows, splits)


def _read_fields(config: Config, posts: Posts, ranks: Ranks) -> dict[str, Fields]:
    """What slices need to know about the posts of each split; every rank reads its share."""
    found: dict[str, Fields] = {}
    for split in posts.splits:
        own = posts.rows[split][ranks.rank :: ranks.world_size]
        parts = ranks.gather(read_fields(posts.readers[split], own, config.evaluation.slices))
        found[split] = {post: fields for part in parts for post, fields in part.items()}
    return found


def _score(
    run_dir: Path,
    checkpoint: Path,
    model_config: ModelConfig,
    config: Config,
    posts: Posts,
    fields: dict[str, Fields],
    ranks: Ranks,
) -> Scored:
    """Predictions of the checkpoint in `run_dir` on every split; rank 0 writes them there."""
    encode = PostEncoder(model_config, posts.taxonomy)
    model = load_trained(model_config, encode, load_weights(checkpoint), checkpoint).to(ranks.device)
    refused: list[dict[str, Any]] = []
    scored = {}
    for split in posts.splits:
        predictions = score_split(
            model,
            encode,
            posts.readers[split],
            posts.rows[split],
            ranks,
            config.evaluation.batch_size,
            num_workers=config.train.num_workers,
            on_refused=refused.append,
            title=f"evaluate {run_dir.name} on {split}",
        )
        scored[split] = predictions.with_fields(fields[split])
        if ranks.is_first:
            scored[split].write(run_dir / "predictions" / f"{split}.parquet")
    everyone = list(itertools.chain(*ranks.gather(refused)))
    if everyone and ranks.is_first:
        _quarantine(run_dir / "quarantine.jsonl", everyone)
        ranks.say(f"evaluate: {len(everyone)} posts cannot be read and were not scored; see {run_dir}/quarantine.jsonl")
    return scored


def _quarantine(file: Path, refused: list[dict[str, Any]]) -> None:
    """Name the posts that could not be read; once, however often a run is evaluated."""
    named = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    log = LineLog(file)
    for post in refused:
        if json.dumps(post, ensure_ascii=False) not in named:
            log.write(post)
    log.close()
