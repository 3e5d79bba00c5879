"""From predictions to figures: report/metrics.json, report.html and dataset_card.md, on rank 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.schema import Config
from crossguard.configs.schema.mixing import OWN
from crossguard.configs.schema.model import source_of
from crossguard.data.loading.plan import open_folders
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.files import write_atomic
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.labels import LabelCounts
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.evaluation.compare import compare, read_run
from crossguard.train.evaluation.dataset_card import dataset_card
from crossguard.train.evaluation.decided import measure_actions, measure_calibration
from crossguard.train.evaluation.decisions import Decisions, fit_decisions
from crossguard.train.evaluation.evasion import measure_evasion
from crossguard.train.evaluation.metrics import evaluate_predictions
from crossguard.train.evaluation.plots import Panel
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.references import MOST_TRAIN_POSTS, tfidf_logistic_regression
from crossguard.train.evaluation.report import Evaluated, write_report
from crossguard.train.evaluation.routing import measure_routing
from crossguard.train.evaluation.sampling_prior import Shifts, Trained, adjusted, sampling_shifts
from crossguard.train.evaluation.splits import TRAIN, VALIDATION, shown_split
from crossguard.train.evaluation.suite import best_thresholds, measure_suite

# What the run's own model is called beside its ablations and references.
MODEL = "this model"
Scored = dict[str, Predictions]


@dataclass(frozen=True)
class Posts:
    """The splits of a set of shards, and the rows of each that may be read."""

    folder: ShardFolder
    taxonomy: Taxonomy
    readers: dict[str, ShardReader]
    rows: dict[str, np.ndarray]
    # The splits that are scored.
    splits: list[str]


@dataclass(frozen=True)
class Scores:
    """What the run's own model (MODEL) and its ablations say of the posts."""

    # Name -> split -> predictions.
    scored: dict[str, Scored]
    # Name -> family of attacks -> predictions on the split that is shown first.
    disguised: dict[str, Scored]
    # Of the run's own model: on the functional suite, if there is one.
    suite: list[Predictions]
    # Modalities -> its predictions from them alone, on the split that is shown first, if they were asked for.
    subsets: dict[tuple[str, ...], Predictions]
    # Name -> multiplications and additions for a post, where there are ablations.
    operations: dict[str, float]


def measure(
    run_dir: Path, trained: Trained, config: Config, posts: Posts, scores: Scores
) -> tuple[dict[str, Any], dict[str, list[Panel]]]:
    """Write metrics.json, report.html and dataset_card.md from the predictions alone.

    Args:
        run_dir: where to.
        trained: the checkpoint that was scored.
        config: what to measure.
        posts: what was scored; references are fitted on its training split.
        scores: the predictions.

    Returns:
        The content of metrics.json, and the report's plots by section.
    """
    references: dict[str, Scored] = {}
    for name in config.evaluation.references:
        references[name] = tfidf_logistic_regression(posts.readers, posts.rows, posts.splits, posts.taxonomy)
    metrics = _figures(config, posts, scores, references, trained) | _figures_beside(config, scores)
    if references:
        fitted_on = {"train_posts": min(len(posts.rows[TRAIN]), MOST_TRAIN_POSTS)}
        metrics["references"] = {
            name: fitted_on | _beside(predictions, config) for name, predictions in references.items()
        }
    file = run_dir / "report" / "metrics.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(metrics, indent=1, ensure_ascii=False) + "\n").encode())
    card = dataset_card(config, posts.folder.manifest, metrics)
    write_atomic(file.with_name("dataset_card.md"), card.encode())
    every = scores.scored | references
    return metrics, write_report(run_dir, Evaluated(config, posts.folder.manifest, metrics, every, posts.readers))


def _figures(
    config: Config, posts: Posts, scores: Scores, references: dict[str, Scored], trained: Trained
) -> dict[str, Any]:
    """What is measured of the run's own model."""
    scored = scores.scored
    metrics: dict[str, Any] = {
        "splits": _metrics(scored[MODEL], config, in_detail=True),
        "checkpoint": {"step": trained.step},
        "shards": posts.folder.manifest.sha256,
    }
    decisions = _decide(config, posts, scored[MODEL], trained)
    if decisions is not None:
        metrics["decisions"] = {"fitted_on": VALIDATION, **decisions.to_json()}
        _measure_decisions(metrics["splits"], scored[MODEL], decisions, config)
    _measure_routing(metrics["splits"], scored | references, scores.operations, decisions, config)
    if config.evaluation.against is not None:
        earlier = Path(config.evaluation.against)
        found = compare(scored[MODEL], read_run(earlier), config.evaluation)
        metrics["against"] = {"run": earlier.name, "margin": config.evaluation.margin, **found}
    if config.evaluation.attacks:
        metrics["evasion"] = _evasion(scored[MODEL], scores.disguised[MODEL], decisions, config)
    if scores.suite:
        validation = scored[MODEL].get(VALIDATION)
        thresholds = {} if validation is None else best_thresholds(validation, config.evaluation.min_positives)
        metrics["suite"] = measure_suite(scores.suite, Path(str(config.evaluation.suite)).name, thresholds)
    if scores.subsets:
        metrics["modality_subsets"] = _subsets(config, scored[MODEL], scores.subsets)
    return metrics


def _figures_beside(config: Config, scores: Scores) -> dict[str, Any]:
    """What is measured of the ablations."""
    found = {name: _beside(scored, config) for name, scored in scores.scored.items() if name != MODEL}
    if config.evaluation.attacks:
        for name, measured in found.items():
            measured["evasion"] = _evasion(scores.scored[name], scores.disguised[name], None, config)
    return {"ablations": found} if found else {}


def _decide(config: Config, posts: Posts, scored: Scored, trained: Trained) -> Decisions | None:
    """Calibration and thresholds, from the validation split; None where it was not scored."""
    if VALIDATION not in scored:
        return None
    shifts: Shifts = {}
    if config.evaluation.calibration != "none" and posts.folder.manifest.shards_of(TRAIN):
        folders = open_folders(config, trained.mixing) if trained.mixing.datasets else {OWN: posts.folder}
        shifts = sampling_shifts(folders, trained, posts.folder.manifest.rarity, scored[VALIDATION])
        trained_on = (shard for folder in folders.values() for shard in folder.manifest.shards_of(TRAIN))
        counts = LabelCounts.of_shards(trained_on, posts.taxonomy.names)
        shifts = adjusted(shifts, trained.adjustment, counts)
    return fit_decisions(scored[VALIDATION], config.evaluation, shifts, posts.taxonomy.parents)


def _measure_decisions(splits: dict[str, dict[str, Any]], scored: Scored, decisions: Decisions, config: Config) -> None:
    for split, predictions in scored.items():
        calibrated = decisions.calibrated(predictions)
        splits[split]["calibration"] = measure_calibration(predictions, calibrated, config.evaluation)
        splits[split]["actions"] = measure_actions(predictions, decisions)


def _measure_routing(
    splits: dict[str, dict[str, Any]],
    scored: dict[str, Scored],
    operations: dict[str, float],
    decisions: Decisions | None,
    config: Config,
) -> None:
    costs = {name: count / max(operations[MODEL], 1.0) for name, count in operations.items()}
    for split, predictions in scored[MODEL].items():
        probabilities = predictions.scores if decisions is None else decisions.calibrated(predictions)
        cheaper = {name: others[split] for name, others in scored.items() if name != MODEL}
        splits[split]["routing"] = measure_routing(predictions, probabilities, cheaper, costs, config.evaluation)


def _evasion(scored: Scored, disguised: Scored, decisions: Decisions | None, config: Config) -> dict[str, Any]:
    split = shown_split(scored)
    return measure_evasion(scored, split, disguised, decisions, config.evaluation)


def _metrics(scored: Mapping[str, Predictions], config: Config, *, in_detail: bool = False) -> dict[str, Any]:
    return {
        split: evaluate_predictions(predictions, config.evaluation, in_detail=in_detail)
        for split, predictions in scored.items()
    }


def _subsets(config: Config, scored: Scored, subsets: Mapping[tuple[str, ...], Predictions]) -> dict[str, Any]:
    """The same posts from some of their modalities: the fewest first, all of them last."""
    split = shown_split(scored)
    measured = []
    every = config.model.modalities
    own = tuple(name for name in every if source_of(name, every) == name)
    for modalities, predictions in {**subsets, own: scored[split]}.items():
        found = evaluate_predictions(predictions, replace(config.evaluation, slices=[]), in_detail=True)
        policies = {policy: {"all": result["all"]} for policy, result in found["policies"].items()}
        macro = {"macro": found["macro"]} if "macro" in found else {}
        measured.append({"modalities": list(modalities), "policies": policies, **macro})
    return {"split": split, "subsets": measured}


def _beside(scored: Scored, config: Config) -> dict[str, Any]:
    """What is shown beside the model: the macro means of the test split (or the first), and every split's metrics."""
    splits = _metrics(scored, config)
    shown = splits[shown_split(splits)]
    return {name: shown[name] for name in ("macro", "macro_policy_language") if name in shown} | {"splits": splits}
