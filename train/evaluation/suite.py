"""Functional suites: what a model gets right, by the function that a case tests (HateCheck; Röttger et al., 2021).

A suite is a file of posts like any other, with the function under `meta.functionality` and who is meant under
`meta.target`. It is scored as it is and never trained on. A case is passed where its score lies on the side of the
policy's threshold that its label says; the threshold is the one with the best F1 on the validation split, since a
model of a rare policy may never reach .5.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.schema import BuildConfig, Config, DataConfig
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.manifest import Manifest
from crossguard.train.evaluation.intervals import proportion_interval
from crossguard.train.evaluation.metrics import Known
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.slices import LANGUAGE, NONE
from crossguard.train.ranks import Ranks

# Where the validation split has too few labels of a policy.
DEFAULT_THRESHOLD = 0.5
FUNCTIONALITY, TARGET = "meta.functionality", "meta.target"
FIELDS = (FUNCTIONALITY, TARGET)
WORKSPACE = ".suite"


@contextmanager
def suite_readers(config: Config, run_dir: Path, ranks: Ranks) -> Iterator[list[ShardReader]]:
    """The cases of `evaluation.suite` as temporary shards, a reader for each split that they name; all ranks call it.

    Without a suite there are none.

    Raises:
        UserError: cases are wrong, or their media is missing.
    """
    if config.evaluation.suite is None:
        yield []
        return
    workspace = run_dir / WORKSPACE
    manifest = ranks.on_first(lambda: _build(config, workspace))
    folder = ShardFolder(str(workspace / "shards"), manifest)
    try:
        yield [ShardReader([folder], split) for split in manifest.splits]
    finally:
        if ranks.is_first:
            shutil.rmtree(workspace, ignore_errors=True)


def _build(config: Config, workspace: Path) -> Manifest:
    shutil.rmtree(workspace, ignore_errors=True)
    cases = Config(
        recipe="suite",
        taxonomy=config.taxonomy,
        data=DataConfig(path=config.evaluation.suite),
        build=BuildConfig(num_workers=1, max_refused=0.0, splits={"suite": 1.0}),
    )
    return build_shards(cases, workspace / "shards", workspace / "quarantine.jsonl")


def best_thresholds(validation: Predictions, min_positives: int) -> dict[str, float]:
    """Policy -> the threshold with the best F1; policies with fewer positives or negatives are left out."""
    from sklearn.metrics import precision_recall_curve

    found = {}
    for policy in validation.policies:
        known = Known.of(validation, policy)
        positives = int(known.labels.sum())
        if min(positives, len(known.labels) - positives) >= min_positives:
            precision, recall, thresholds = precision_recall_curve(known.labels, known.scores)
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            found[policy] = float(thresholds[np.argmax(f1[:-1])])
    return found


def measure_suite(parts: Iterable[Predictions], name: str, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """Pass rates of a scored suite.

    Args:
        parts: its predictions, with FIELDS.
        name: of the suite.
        thresholds: policy -> the score from which a case counts as flagged; DEFAULT_THRESHOLD for others.

    Returns:
        {"name", "policies": {policy: {"threshold", "all": cell, "by_functionality": {…}, "by_target": {…},
        "by_language": {…}, "by_functionality_and_language": {functionality: {language: cell}}}}}, where a cell is
        {"n", "violating", "passed", "pass_rate", "interval"}; the interval is exact.
    """
    scored = list(parts)
    policies: dict[str, Any] = {}
    for policy in scored[0].policies:
        known = [Known.of(part, policy) for part in scored]
        rows = [~np.isnan(part.labels[:, part.policies.index(policy)]) for part in scored]
        labels = np.concatenate([one.labels for one in known])
        if not len(labels):
            continue
        threshold = thresholds.get(policy, DEFAULT_THRESHOLD)
        passed = (np.concatenate([one.scores for one in known]) >= threshold) == (labels == 1)
        groups = {LANGUAGE: np.concatenate([one.languages for one in known])}
        for field in FIELDS:
            groups[field] = np.concatenate([part.fields[field][row] for part, row in zip(scored, rows, strict=True)])
        cases = _Cases(labels, passed, groups)
        everything = np.ones(len(labels), dtype=bool)
        functions = cases.by(FUNCTIONALITY, everything)
        policies[policy] = {
            "threshold": threshold,
            "all": _cell(labels, passed),
            "by_functionality": functions,
            "by_target": cases.by(TARGET, everything),
            "by_language": cases.by(LANGUAGE, everything),
            "by_functionality_and_language": {
                name: cases.by(LANGUAGE, groups[FUNCTIONALITY] == name) for name in functions
            },
        }
    return {"name": name, "policies": policies}


@dataclass(frozen=True)
class _Cases:
    """The labeled cases of a policy."""

    labels: np.ndarray
    passed: np.ndarray
    # Field -> group of each case.
    groups: dict[str, np.ndarray]

    def by(self, field: str, chosen: np.ndarray) -> dict[str, Any]:
        """A cell for each group of the chosen cases, bool[n]."""
        found = {}
        for group in sorted(set(self.groups[field][chosen]) - {NONE}):
            rows = chosen & (self.groups[field] == group)
            found[str(group)] = _cell(self.labels[rows], self.passed[rows])
        return found


def _cell(labels: np.ndarray, passed: np.ndarray) -> dict[str, Any]:
    hits, count = int(passed.sum()), len(passed)
    return {
        "n": count,
        "violating": int(labels.sum()),
        "passed": hits,
        "pass_rate": hits / count,
        "interval": list(proportion_interval(hits, count)),
    }
