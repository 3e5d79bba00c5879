"""The evaluate stage: scores every held-out split with the run's model and its ablations, measures, reports."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from crossguard.configs.resume import check_same_model
from crossguard.configs.saved import as_plain, load_config
from crossguard.configs.schema import Config, ModelConfig
from crossguard.configs.schema.model import source_of
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.taxonomy import Taxonomy
from crossguard.train import watchdog
from crossguard.train.checkpoint import best_valid
from crossguard.train.checkpoint_folder import checkpoints_of, read_state, step_of
from crossguard.train.encode import PostEncoder
from crossguard.train.evaluation.disguise import Disguise
from crossguard.train.evaluation.findings import in_words
from crossguard.train.evaluation.measure import MODEL, Posts, Scored, Scores, measure
from crossguard.train.evaluation.operations import operations
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.sampling_prior import Trained
from crossguard.train.evaluation.scoring import score_split
from crossguard.train.evaluation.slices import read_fields
from crossguard.train.evaluation.splits import evaluated_splits, shown_split
from crossguard.train.evaluation.suite import FIELDS, suite_readers
from crossguard.train.evaluation.tracked import track_report
from crossguard.train.inputs import warn_of_lost
from crossguard.train.metrics_log import LineLog
from crossguard.train.models import Classifier
from crossguard.train.models.withheld import Withheld
from crossguard.train.ranks import Ranks
from crossguard.train.run_lock import run_lock
from crossguard.train.stored_weights import load_weights
from crossguard.train.tracking import open_tracker
from crossguard.train.trained import load_trained

# id -> field -> value.
Fields = dict[str, dict[str, str]]


def run_evaluation(config: Config, ranks: Ranks) -> None:
    """Write predictions/, report/metrics.json and report/report.html of a trained run, and tell its tracker; all ranks
    call it.

    Scores are computed in fp32 from the best checkpoint's weights, also those of each ablation in `ablations/`.

    Raises:
        UserError: no checkpoint, a split that does not exist, shards or checkpoint of something else.
        JobError: the run directory is in use.
        Preempted: a rank was asked to stop; nothing is half-written.
    """
    run_dir = Path(config.run_dir)
    with run_lock(run_dir, ranks):
        checkpoint = best_valid(run_dir, ranks)
        state = read_state(checkpoint)
        check_same_model(state["config"], as_plain(config), str(checkpoint))
        posts = _open_posts(config, ranks)
        watchdog.arm()
        fields = _read_fields(config, posts, ranks)
        with suite_readers(config, run_dir, ranks) as cases:
            model = Scorer.load(run_dir, checkpoint, config.model, config, posts, ranks)
            suite = [model.score_suite(reader) for reader in cases]
            scored = {MODEL: model.score(posts, fields)}
            subsets = model.score_subsets(posts) if config.evaluation.modality_subsets else {}
            disguised = {MODEL: model.score_disguised(posts)}
        ablations = _trained_ablations(config, ranks)
        computed = {MODEL: model.operations(posts)} if ablations else {}
        for folder in ablations:
            architecture = load_config(folder / "config.yaml").model
            ablated = Scorer.load(folder, best_valid(folder, ranks), architecture, config, posts, ranks)
            scored[folder.name] = ablated.score(posts, fields)
            disguised[folder.name] = ablated.score_disguised(posts)
            computed[folder.name] = ablated.operations(posts)
        if ranks.is_first:
            scores = Scores(scored, disguised, suite, subsets, computed)
            trained = Trained.of(state["config"], checkpoint, step_of(checkpoint))
            found = measure(run_dir, trained, config, posts, scores)
            tracker = open_tracker(config, state["tracker_run_id"], first=True)
            track_report(tracker, *found)
            tracker.close()


def _trained_ablations(config: Config, ranks: Ranks) -> list[Path]:
    """The run directories of those that have a checkpoint."""
    folders = [Path(config.run_dir) / "ablations" / name for name in config.ablations]
    return ranks.on_first(lambda: [folder for folder in folders if checkpoints_of(folder)])


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


@dataclass
class Scorer:
    """A trained model that scores posts on all ranks."""

    run_dir: Path
    model: Classifier
    encode: PostEncoder
    config: Config
    ranks: Ranks

    @classmethod
    def load(
        cls, run_dir: Path, checkpoint: Path, model: ModelConfig, config: Config, posts: Posts, ranks: Ranks
    ) -> Scorer:
        """The checkpoint of a run directory."""
        encode = PostEncoder(model, posts.taxonomy)
        trained = load_trained(model, encode, load_weights(checkpoint), checkpoint)
        return cls(run_dir, trained.to(ranks.device), encode, config, ranks)

    def score(self, posts: Posts, fields: dict[str, Fields]) -> Scored:
        """Predictions on every split; rank 0 writes them into the run directory."""
        refused: list[dict[str, Any]] = []
        scored = {}
        for split in posts.splits:
            predictions = self._score(posts.readers[split], posts.rows[split], split, refused)
            scored[split] = predictions.with_fields(fields[split])
            if self.ranks.is_first:
                scored[split].write(self.run_dir / "predictions" / f"{split}.parquet")
        self._name(refused)
        return scored

    def score_suite(self, reader: ShardReader) -> Predictions:
        """Predictions on the cases of a functional suite."""
        refused: list[dict[str, Any]] = []
        rows = np.arange(len(reader))
        predictions = self._score(reader, rows, "the suite", refused)
        self._name(refused)
        return predictions.with_fields(read_fields(reader, rows, FIELDS))

    def score_subsets(self, posts: Posts) -> dict[tuple[str, ...], Predictions]:
        """Predictions on the test split (or the first) from every choice of the modalities but all of them."""
        split, every = shown_split(posts.splits), self.model.modalities
        own = [name for name in every if source_of(name, every) == name]
        kept = [names for count in range(1, len(own)) for names in itertools.combinations(own, count)]
        refused: list[dict[str, Any]] = []  # Named already.
        scored = {}
        for names in kept:
            withheld = Withheld(self.model, {name for name in every if source_of(name, every) not in names})
            what = f"{split}, {' + '.join(names)} alone"
            scored[names] = self._score(posts.readers[split], posts.rows[split], what, refused, model=withheld)
        return scored

    def score_disguised(self, posts: Posts) -> Scored:
        """Predictions on the test split (or the first) under each family of attacks; posts lie in the order of a hash,
        so that the first ones are a fair sample."""
        split, scored = shown_split(posts.splits), {}
        rows = posts.rows[split][: self.config.evaluation.max_attacked_posts]
        refused: list[dict[str, Any]] = []  # Named already.
        for family in self.config.evaluation.attacks:
            encode, what = self.encode.under(Disguise(family, self.config.seed)), f"{split}, {in_words(family)}"
            scored[family] = self._score(posts.readers[split], rows, what, refused, encode=encode)
        return scored

    def operations(self, posts: Posts) -> float:
        """What a post of the test split (or the first) takes; 0 on ranks other than the first."""
        if not self.ranks.is_first:
            return 0.0
        split = shown_split(posts.splits)
        return operations(self.model, self.encode, posts.readers[split], posts.rows[split], self.ranks.device)

    def _score(
        self,
        reader: ShardReader,
        rows: np.ndarray,
        what: str,
        refused: list[dict[str, Any]],
        model: nn.Module | None = None,
        encode: PostEncoder | None = None,
    ) -> Predictions:
        return score_split(
            model or self.model,
            encode or self.encode,
            reader,
            rows,
            self.ranks,
            self.config.evaluation.batch_size,
            num_workers=self.config.train.num_workers,
            on_refused=refused.append,
            title=f"evaluate {self.run_dir.name} on {what}",
        )

    def _name(self, refused: list[dict[str, Any]]) -> None:
        """Rank 0: the posts that no rank could read."""
        everyone = list(itertools.chain(*self.ranks.gather(refused)))
        if everyone and self.ranks.is_first:
            _quarantine(self.run_dir / "quarantine.jsonl", everyone)
            self.ranks.say(
                f"evaluate: {len(everyone)} posts cannot be read and were not scored; see "
                f"{self.run_dir}/quarantine.jsonl"
            )


def _quarantine(file: Path, refused: list[dict[str, Any]]) -> None:
    """Name the posts that could not be read; once, however often a run is evaluated."""
    named = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    log = LineLog(file)
    for post in refused:
        if json.dumps(post, ensure_ascii=False) not in named:
            log.write(post)
    log.close()
