"""report/report.html: one self-contained page, from what was measured and nothing else.

The page loads nothing: styles and plots are inline, there is no script. Posts appear as counts and ids, never as media,
and as text only where `evaluation.show_texts` asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossguard.configs.schema import Config
from crossguard.configs.schema.evaluation import COUNTS
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.files import write_atomic
from crossguard.data.shards.manifest import Manifest
from crossguard.train.evaluation.findings import find, in_words
from crossguard.train.evaluation.plots import Line, Panel, curve_panels, history_panel
from crossguard.train.evaluation.predictions import Predictions
from crossguard.train.evaluation.report_decisions import calibration_rows, diagrams, threshold_rows
from crossguard.train.evaluation.report_errors import cascade_panels, review_panels, suite_tables, worst_errors
from crossguard.train.evaluation.report_evasion import evasion_tables
from crossguard.train.evaluation.report_slices import gap_rows, heat_map, slice_maps
from crossguard.train.evaluation.splits import shown_split

TEMPLATES = Path(__file__).parent / "templates"
METRIC_NAMES = {
    "average_precision": "Average precision",
    "auroc": "AUROC",
    "recall_at_precision_90": "Recall at precision .90",
}
# Keys of a training line in metrics.jsonl -> the panel's title.
HISTORY = {
    "loss": "Loss per known label",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples_per_second": "Posts per second",
}


@dataclass(frozen=True)
class Evaluated:
    """Everything that the report is made from."""

    config: Config
    manifest: Manifest
    # The content of report/metrics.json.
    metrics: Mapping[str, Any]
    # name -> split -> predictions; the run's own model first, then ablations and references.
    predictions: Mapping[str, Mapping[str, Predictions]]
    # The splits themselves.
    readers: Mapping[str, ShardReader]


def write_report(run_dir: Path, evaluated: Evaluated) -> dict[str, list[Panel]]:
    """Write report/report.html, complete or not at all.

    Returns:
        The plots of the page, by section.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "words": in_words,
        "number": _number,
        "interval": _interval,
        "svg": lambda panel: Markup(panel.svg()),
    }
    content = _content(run_dir, evaluated)
    page = environment.get_template("report.html.j2").render(content)
    path = run_dir / "report" / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())
    return {
        "training": content["history"],
        "curves": content["curves"],
        "calibration": content["reliability"],
        "routing": [*content["review"], *content["cascade"]],
    }


def _content(run_dir: Path, evaluated: Evaluated) -> dict[str, Any]:
    metrics, manifest = evaluated.metrics, evaluated.manifest
    split = shown_split(metrics["splits"])
    train_languages = {
        name.rpartition("/")[0]
        for shard in manifest.shards_of("train")
        for name, count in shard.strata.items()
        if count
    }
    names = _metric_names(metrics)
    return {
        "config": evaluated.config,
        "metrics": metrics,
        "metric_names": names,
        "split": split,
        "posts": {name: len(predictions) for name, predictions in next(iter(evaluated.predictions.values())).items()},
        "findings": find(evaluated.config, metrics, train_languages),
        "comparison": _comparison(evaluated, split),
        "history": _history(run_dir, metrics["checkpoint"]["step"]),
        "tables": {
            name: _policy_rows(evaluated.config, measured, names) for name, measured in _ordered(metrics, split)
        },
        "subsets": metrics.get("modality_subsets", {}).get("subsets", []),
        "severities": _severities(metrics["splits"][split]),
        "heat_maps": {name: heat_map(measured, "language") for name, measured in _ordered(metrics, split)},
        "slices": slice_maps(metrics["splits"][split]),
        "gaps": gap_rows(metrics["splits"][split]),
        "reliability": diagrams(metrics["splits"][split]),
        "calibration": calibration_rows(metrics["splits"][split]),
        "thresholds": threshold_rows(metrics, split),
        "review": review_panels(metrics["splits"][split]),
        "cascade": cascade_panels(metrics["splits"][split]),
        "suites": suite_tables(metrics),
        "evasion": evasion_tables(metrics),
        "errors": worst_errors(
            next(iter(evaluated.predictions.values()))[split],
            evaluated.readers[split] if evaluated.config.evaluation.show_texts else None,
        ),
        "train_languages": train_languages,
        "curves": _curve_panels(evaluated, split),
        "manifest": manifest,
        "config_yaml": (run_dir / "config.yaml").read_text(encoding="utf-8"),
    }


def _ordered(metrics: Mapping[str, Any], split: str) -> list[tuple[str, Any]]:
    """The splits, the primary one first."""
    return sorted(metrics["splits"].items(), key=lambda item: item[0] != split)


def _metric_names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Every metric that a cell has -> its heading; the user's own keep their names."""
    cells = [policy["all"] for measured in metrics["splits"].values() for policy in measured["policies"].values()]
    keys = [key for cell in cells for key in cell if key not in COUNTS]
    return {key: METRIC_NAMES.get(key, key.replace("_", " ")) for key in dict.fromkeys([*METRIC_NAMES, *keys])}


def _comparison(evaluated: Evaluated, split: str) -> list[dict[str, Any]]:
    """The model beside ablations and references, each by its macro on the split."""
    metrics = evaluated.metrics
    rows = [{"name": "this model", "kind": "model", "macro": metrics["splits"][split].get("macro", {})}]
    for kind in ("ablation", "reference"):
        for name, measured in metrics.get(f"{kind}s", {}).items():
            macro = measured["splits"].get(split, {}).get("macro", {})
            rows.append({"name": in_words(name), "kind": kind, "macro": macro})
    return rows


def _policy_rows(config: Config, measured: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    meaning = {policy.name: policy.description for policy in config.taxonomy.policies}
    return [
        {
            "policy": policy,
            "meaning": meaning.get(policy, ""),
            "cell": result["all"],
            "values": [(result["all"].get(key), result["all"].get("intervals", {}).get(key)) for key in names],
        }
        for policy, result in measured["policies"].items()
    ]


def _severities(measured: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(policy, language, cell), all languages first."""
    return [
        (policy, language, cell)
        for policy, result in measured["policies"].items()
        if "severity" in result
        for language, cell in {"all languages": result["severity"]["all"], **result["severity"]["by_language"]}.items()
    ]


def _curve_panels(evaluated: Evaluated, split: str) -> list[Panel]:
    models = {name: splits[split] for name, splits in evaluated.predictions.items() if split in splits}
    models = {in_words(name): predictions for name, predictions in models.items()}
    measured = evaluated.metrics["splits"][split]["policies"]
    policies = [policy for policy, result in measured.items() if "insufficient" not in result["all"]]
    return [panel for policy in policies for panel in curve_panels(models, policy)]


def _history(run_dir: Path, evaluated_step: int) -> list[Panel]:
    """Panels of what metrics.jsonl logged over the steps."""
    path = run_dir / "metrics.jsonl"
    written = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # Training that was killed may have left its last line half-written.
    lines = [json.loads(line) for line in written if line.endswith("\n")]
    train = [line for line in lines if line["split"] == "train"]
    measured = [line for line in lines if line["split"] == "validation" and "macro.auroc" in line]
    panels = []
    for key, title in HISTORY.items():
        shown = [one for one in train if one.get(key) is not None]  # A step that was skipped has no loss.
        line: Line = ([one["step"] for one in shown], [one[key] for one in shown])
        if len(line[0]) > 1:
            panels.append(history_panel(title, {key: line}, smooth=key != "lr", mark=evaluated_step))
    if measured:
        steps = [line["step"] for line in measured]
        keys = {"AUROC": "auroc", "average precision": "average_precision"}
        validation = {name: (steps, [line[f"macro.{key}"] for line in measured]) for name, key in keys.items()}
        panels.insert(1, history_panel("Validation, macro", validation, mark=evaluated_step))
    return panels


def _number(value: float | None) -> str:
    """Three decimals; a dash where there is no number."""
    return "–" if value is None else f"{value:.3f}"


def _interval(value: Sequence[float] | None) -> str:
    """Both ends, two decimals; nothing where there is none."""
    return "" if value is None else f"{value[0]:.2f}–{value[1]:.2f}"
