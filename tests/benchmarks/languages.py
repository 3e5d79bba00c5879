"""What losses, weights and the mixing temperature do to the mean and to the worst language, on real posts in 12 languages.

A small head learns from frozen features of a real pretrained encoder, by the product's own sample order and objective.
Means over seeds; the intervals (95 %) are those of the difference to plain cross-entropy, over resampled test posts of
each language, the same for all cases.

    python tests/benchmarks/languages.py [FOLDER]

FOLDER keeps the features (`ids.npy`, `features.npy`), which take half an hour of one core; a temporary one by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

REAL = Path(os.environ.get("CROSSGUARD_REALDATA", Path(__file__).parents[3] / "shared" / "realdata"))
POLICIES = ("hate", "offensive", "harassment", "profanity", "misinformation", "spam")
SEEDS = 5
STEPS, BATCH_SIZE = 600, 256
RESAMPLES = 400
# Cells of policy and language with fewer positives among the test posts say nothing.
LEAST_POSITIVES = 20
# The threshold of a policy, one for all languages, is where so many of the benign validation posts are flagged.
FALSE_POSITIVES = 0.1
MAX_LENGTH = 128


def main(folder: str | None = None) -> bool:
    """Train, measure, print; there is no target, the table is the result."""
    if not (REAL / "text").is_dir():
        print(f"languages: skipped, since there are no real posts at {REAL} (CROSSGUARD_REALDATA names another folder)")
        return True
    posts = Posts.read()
    with tempfile.TemporaryDirectory() as temporary:
        features = features_of(posts, Path(folder or temporary))
    training = shard_of(posts)
    scores = {
        case: [trained(posts, features, *training, seed, **settings) for seed in range(SEEDS)]
        for case, settings in CASES.items()
    }
    show(posts, scores)
    return True


@dataclass
class Posts:
    """All posts, sorted so that those of a stratum are neighbours."""

    posts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls) -> Posts:
        """From the files."""
        return cls([json.loads(line) for file in sorted((REAL / "text").glob("*.jsonl")) for line in file.open()])

    def rows(self, split: str) -> np.ndarray:
        """int64[…]: the posts of a split."""
        return np.array([row for row, post in enumerate(self.posts) if post["split"] == split])

    @cached_property
    def languages(self) -> np.ndarray:
        """object[n]"""
        return np.array([post["language"] for post in self.posts], dtype=object)

    @cached_property
    def labels(self) -> np.ndarray:
        """float32[n, P]; NaN is unknown."""
        values = [[post["labels"].get(policy) for policy in POLICIES] for post in self.posts]
        return np.array(values, dtype=np.float32)


def features_of(posts: Posts, folder: Path) -> np.ndarray:
    """float32[n, D], standardised: from the folder, or computed into it."""
    if not (folder / "features.npy").is_file():
        encoder = folder / "encoder"
        subprocess.run([sys.executable, str(REAL / "pretrained_encoder.py"), str(encoder)], check=True)
        np.save(folder / "ids.npy", np.array([post["id"] for post in posts.posts]))
        np.save(folder / "features.npy", encoded([post["text"] for post in posts.posts], str(encoder)))
    row = {str(post): number for number, post in enumerate(np.load(folder / "ids.npy").tolist())}
    features = np.load(folder / "features.npy")[[row[post["id"]] for post in posts.posts]].astype(np.float32)
    seen = features[posts.rows("train")]
    return (features - seen.mean(0)) / seen.std(0)


def encoded(texts: list[str], encoder: str) -> np.ndarray:
    """float16[n, D]: the mean of the encoder's tokens."""
    import torch

    from crossguard.configs.schema.encoders import TextEncoderConfig
    from crossguard.data.loading.encoded import pad_texts
    from crossguard.train.models.text import build_text_tower
    from crossguard.train.models.tokens import summarise
    from crossguard.train.tokenizers import load_tokenizer

    config = TextEncoderConfig(pretrained=encoder, max_length=MAX_LENGTH)
    tokenizer = load_tokenizer(config)
    tower = build_text_tower(config, tokenizer.vocab_size, tokenizer.pad_id).eval()
    ids = [np.array(tokenizer.encode(f"query: {text}", MAX_LENGTH)) for text in texts]
    found = np.zeros((len(texts), tower.width), dtype=np.float16)
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(ids), 64):
            rows = by_length[start : start + 64]
            tokens, mask = map(torch.from_numpy, pad_texts([ids[row] for row in rows], tokenizer.pad_id))
            found[rows] = summarise(tower(tokens, mask), mask, "mean").float().numpy()
    return found


CASES: dict[str, dict[str, Any]] = {
    "bce": {},
    "bce, temperature 3": {"temperature": 3.0},
    "asymmetric": {"loss": {"name": "asymmetric"}},
    "asymmetric, temperature 3": {"loss": {"name": "asymmetric"}, "temperature": 3.0},
    "group DRO, step .01": {"loss": {"group_dro": {"step_size": 0.01}}},
    "group DRO, step .01, adjustment 5": {"loss": {"group_dro": {"step_size": 0.01, "adjustment": 5.0}}},
    "languages balanced": {"loss": {"balance": {"by": ["language"]}}},
    "classes balanced": {"loss": {"balance": {"by": ["class"]}}},
    "logits adjusted": {"loss": {"logit_adjustment": {"tau": 1.0}}},
    "logits adjusted by language": {"loss": {"logit_adjustment": {"tau": 1.0, "by_language": True}}},
}


def trained(
    posts: Posts,
    features: np.ndarray,
    rows: np.ndarray,
    shard: Any,
    seed: int,
    *,
    loss: dict[str, Any] | None = None,
    temperature: float = 1.0,
) -> np.ndarray:
    """Train a head on the training posts `rows`, which `shard` describes; the logits of all posts, float32[n, P]."""
    import torch
    from torch import nn

    from crossguard.data.loading.collate import Batch
    from crossguard.data.loading.order import SampleOrder
    from crossguard.data.loading.strata import Layout
    from crossguard.train.objectives.opening import open_objective
    from crossguard.train.optimizer import build_optimizer, learning_rate
    from crossguard.train.ranks import Ranks

    config = config_of(loss or {}, temperature)
    layout = Layout.of_shards([("own", tuple(shard.strata), [shard])])
    order = SampleOrder(layout, BATCH_SIZE, seed, config.data.mixing)
    objective = open_objective(config, Ranks(0, 0, 1, torch.device("cpu")), [shard], {})
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(features.shape[1], 256), nn.GELU(), nn.Dropout(0.3), nn.Linear(256, len(POLICIES)))
    optimizer = build_optimizer(head, config.train)
    inputs, labels, languages = torch.from_numpy(features), torch.from_numpy(posts.labels), posts.languages
    none = torch.zeros(BATCH_SIZE, 1)
    for step in range(1, STEPS + 1):
        chosen = rows[order.rows(step)]
        batch = Batch([], languages[chosen].tolist(), none, none, none, none, none, none, none, labels[chosen])
        of_step = objective.of_step(objective.counts([batch]), torch.device("cpu"))
        total, means, _ = of_step(lambda _, chosen=chosen: head(inputs[chosen]), batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train, STEPS)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        of_step.learn(means.tolist())
    with torch.inference_mode():
        found: np.ndarray = head.eval()(inputs).numpy()
    return found


def config_of(loss: dict[str, Any], temperature: float) -> Any:
    """A recipe of which the head needs loss, mixing and optimizer."""
    from crossguard.configs.schema import Config, DataConfig, ModelConfig, TaxonomyConfig, TrainConfig
    from crossguard.configs.schema.encoders import TextEncoderConfig
    from crossguard.configs.schema.loss import BalanceConfig, GroupDroConfig, LogitAdjustmentConfig, LossConfig
    from crossguard.configs.schema.mixing import MixingConfig
    from crossguard.configs.schema.taxonomy import PolicyConfig

    parts = {"balance": BalanceConfig, "group_dro": GroupDroConfig, "logit_adjustment": LogitAdjustmentConfig}
    loss = {name: parts[name](**value) if name in parts else value for name, value in loss.items()}
    return Config(
        taxonomy=TaxonomyConfig("public_text", "1", [PolicyConfig(name) for name in POLICIES]),
        data=DataConfig(source="synthetic", mixing=MixingConfig(temperature=temperature)),
        model=ModelConfig(modalities=["text"], text=TextEncoderConfig(config={"model_type": "bert"})),
        train=TrainConfig(batch_size=BATCH_SIZE, lr=2e-3, weight_decay=0.05, loss=LossConfig(**loss)),
    )


def shard_of(posts: Posts) -> tuple[np.ndarray, Any]:
    """The training posts by stratum, int64[…], and what a manifest would say of them."""
    from crossguard.data.shards.labels import LabelSums
    from crossguard.data.shards.manifest import ShardInfo
    from crossguard.data.shards.plan import stratum_of

    rows = posts.rows("train")
    known = [
        {name: label for name, label in posts.posts[row]["labels"].items() if label is not None}
        for row in rows.tolist()
    ]
    positives = Counter(name for labels in known for name, label in labels.items() if label >= 0.5)
    rarity = tuple(sorted(POLICIES, key=lambda name: positives[name]))
    pairs = zip(rows.tolist(), known, strict=True)
    strata = [stratum_of(posts.posts[row]["language"], labels, rarity) for row, labels in pairs]
    sums = LabelSums()
    for row in rows.tolist():
        sums.add(posts.posts[row])
    counts = dict(sorted(Counter(strata).items()))
    shard = ShardInfo("train/train-00000.tar", 0, len(rows), "", "", counts, sums.result())
    return rows[np.argsort(np.array(strata), kind="stable")], shard


@dataclass(frozen=True)
class Measured:
    """Average precision and recall of each language, [languages, 1 + RESAMPLES]: all test posts, then resampled ones."""

    precision: np.ndarray
    recall: np.ndarray

    def numbers(self) -> dict[str, np.ndarray]:
        """Each [1 + RESAMPLES]."""
        found = {}
        for name, values in (("precision", self.precision), ("recall", self.recall)):
            found |= {f"mean {name}": values.mean(0), f"worst {name}": values.min(0)}
        return found


def measured(posts: Posts, logits: np.ndarray, weights: dict[str, np.ndarray]) -> Measured:
    """One model on the test posts; `weights` says how often a resample has each of them, by language."""
    labels, languages, test, validation = posts.labels, posts.languages, posts.rows("test"), posts.rows("validation")
    benign = [logits[validation[labels[validation, column] < 0.5], column] for column in range(len(POLICIES))]
    thresholds = [np.quantile(values, 1 - FALSE_POSITIVES) for values in benign]
    precision, recall = [], []
    for language, often in weights.items():
        rows = test[languages[test] == language]
        cells = []
        for column in range(len(POLICIES)):
            known = ~np.isnan(labels[rows, column])
            positive = labels[rows, column] >= 0.5
            if positive.sum() >= LEAST_POSITIVES and (known & ~positive).sum() >= LEAST_POSITIVES:
                scores = logits[rows[known], column]
                cells.append(ranked(scores, positive[known], often[:, known], thresholds[column]))
        precision.append(np.mean([cell[0] for cell in cells], axis=0))
        recall.append(np.mean([cell[1] for cell in cells], axis=0))
    return Measured(np.array(precision), np.array(recall))


def ranked(
    scores: np.ndarray, positive: np.ndarray, often: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Average precision, and recall at a threshold, of each resample: float64[…]."""
    order = np.argsort(-scores, kind="stable")
    hits = often[:, order] * positive[order]
    total = np.maximum(hits.sum(1), 1)
    precision = np.cumsum(hits, axis=1) / np.maximum(np.cumsum(often[:, order], axis=1), 1)
    return (hits * precision).sum(1) / total, (hits * (scores[order] >= threshold)).sum(1) / total


def show(posts: Posts, scores: dict[str, list[np.ndarray]]) -> None:
    """Print the tables."""
    test, draw = posts.rows("test"), np.random.default_rng(0)
    sizes = Counter(posts.languages[test].tolist())
    weights = {
        name: np.vstack([np.ones(size), draw.multinomial(size, np.full(size, 1 / size), RESAMPLES)])
        for name, size in sorted(sizes.items())
    }
    found = {case: [measured(posts, logits, weights) for logits in runs] for case, runs in scores.items()}
    averaged = {
        case: {name: np.mean([run.numbers()[name] for run in runs], axis=0) for name in runs[0].numbers()}
        for case, runs in found.items()
    }
    plain = averaged["bce"]
    print(f"\nLanguages ({SEEDS} seeds; difference to bce with its 95 % interval over test posts)")
    for name in plain:
        print(f"\n{name}")
        for case, values in averaged.items():
            apart = values[name] - plain[name]
            low, high = np.percentile(apart[1:], [2.5, 97.5])
            spread = np.std([run.numbers()[name][0] for run in found[case]], ddof=1)
            print(f"{case:<36}{values[name][0]:7.3f} ± {spread:.3f} {apart[0]:+8.3f} [{low:+.3f}, {high:+.3f}]")
    for name in ("precision", "recall"):
        print(f"\n{name} by language\n{'':<36}" + "".join(f"{language:>8}" for language in weights))
        for case, runs in found.items():
            values = np.mean([getattr(run, name)[:, 0] for run in runs], axis=0)
            print(f"{case:<36}" + "".join(f"{value:8.3f}" for value in values))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(*sys.argv[1:])
