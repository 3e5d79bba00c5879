"""The bundle's card: generated from the configuration and from what was measured, never written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossguard.configs.schema import Config
from crossguard.train.evaluation.decisions import NO_LABELS, Decisions
from crossguard.train.evaluation.evasion import POINT
from crossguard.train.export.measured import decisions_of, measured

NOT_MEASURED = "Nothing was measured: `crossguard evaluate` has not run."


def model_card(config: Config, run_dir: Path, step: int) -> str:
    """Markdown: what the model is for, what it was trained on, what it scored and where it has no figures."""
    metrics = measured(run_dir)
    decisions = decisions_of(run_dir, step)
    lines = [
        f"# {config.recipe}",
        "",
        config.description or "No description.",
        "",
        f"- Taxonomy: {config.taxonomy.name}, version {config.taxonomy.version}",
        f"- Modalities: {', '.join(config.model.modalities)}",
        f"- Checkpoint: after step {step}",
        f"- {_calibration(decisions)}",
        "",
        "## Policies",
        "",
        *(f"- `{policy.name}`: {policy.description or 'no description'}" for policy in config.taxonomy.policies),
        "",
        "## What was measured",
        "",
    ]
    if metrics is None:
        return "\n".join([*lines, NOT_MEASURED, ""])
    measured_step = metrics["checkpoint"]["step"]
    if measured_step != step:
        lines += [f"These figures are of step {measured_step}, not of this model: run `crossguard evaluate` again.", ""]
    for split, of_split in metrics["splits"].items():
        lines += [
            f"### {split}",
            "",
            "| policy | average precision | AUROC | known labels | positives |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(policy, result["all"]) for policy, result in of_split["policies"].items()]
        lines += _severities(of_split)
        lines += ["", *_worst(of_split), _without_figures(of_split), ""]
    lines += _subset_lines(metrics) + _evasion_lines(metrics) + _threshold_lines(decisions)
    for kind in ("ablations", "references"):
        for name, other in metrics.get(kind, {}).items():
            macro = other.get("macro", {})
            lines.append(f"- {kind[:-1]} {name.replace('_', ' ')}: macro average precision {_number(macro)}")
    if config.data.source == "synthetic":
        lines += ["", "Trained on generated stand-ins: these figures say nothing about moderation quality."]
    return "\n".join([*lines, ""])


def _calibration(decisions: Decisions) -> str:
    if not decisions.calibrators:
        return "Scores are probabilities as the model gives them; nothing was calibrated."
    return (
        f"Calibrated per language on the validation split: {', '.join(sorted(decisions.calibrators))}. "
        "`score` is what the model gives, `calibrated` the probability of a violation."
    )


def _threshold_lines(decisions: Decisions) -> list[str]:
    """How many thresholds could be promised, by action."""
    if not decisions.promises:
        return []
    lines = ["### Actions", "", "| action | promise | policies × languages with a threshold |", "|---|---|---|"]
    for action, promise in decisions.promises.items():
        every = [one[action] for languages in decisions.thresholds.values() for one in languages.values()]
        cells = [threshold for threshold in every if threshold.abstains != NO_LABELS]
        kept = sum(threshold.above is not None for threshold in cells)
        lines.append(f"| {action} | {promise} | {kept} of {len(cells)}; elsewhere the labels cannot support it |")
    return [*lines, ""]


def _evasion_lines(metrics: dict[str, Any]) -> list[str]:
    """What disguises cost, by family of attacks."""
    found = metrics.get("evasion", {"families": {}})
    rows = [
        f"| {family.replace('_', ' ')} | {_change(macro['recall'])} | {_change(macro['false_positive_rate'])} |"
        for family, points in found["families"].items()
        if (macro := points[POINT].get("macro"))
    ]
    if not rows:
        return []
    head = ["| disguise | recall | benign posts flagged |", "|---|---|---|"]
    where = f"On split {found['split']}, at thresholds that flag 5 % of the benign posts of split {found['fitted_on']}"
    return ["### Disguised texts", "", f"{where}; means over policies.", "", *head, *rows, ""]


def _change(rate: dict[str, Any]) -> str:
    return f"{rate['clean']:.3f} to {rate['attacked']:.3f}"


def _row(policy: str, cell: dict[str, Any]) -> str:
    counts = f"{cell['n']} | {cell['positives']} |"
    if "insufficient" in cell:
        return f"| {policy} | insufficient data | | {counts}"
    return f"| {policy} | {cell['average_precision']:.3f} | {cell['auroc']:.3f} | {counts}"


def _severities(measured: dict[str, Any]) -> list[str]:
    """A sentence for each policy with a severity that could be measured."""
    severities = {policy: result.get("severity") for policy, result in measured["policies"].items()}
    lines = [
        f"Severity of {policy}: quadratic weighted kappa {cell['quadratic_kappa']:.3f}, mean absolute error "
        f"{cell['mean_absolute_error']:.2f} levels, over {cell['n']} posts."
        for policy, severity in severities.items()
        if severity and "insufficient" not in (cell := severity["all"])
    ]
    return ["", *lines] if lines else []


def _subset_lines(metrics: dict[str, Any]) -> list[str]:
    """What is left of the model where posts lack some modalities."""
    if "modality_subsets" not in metrics:
        return []
    measured = metrics["modality_subsets"]
    lines = [
        f"### With modalities withheld, split {measured['split']}",
        "",
        "| modalities | macro AUROC |",
        "|---|---|",
    ]
    for row in measured["subsets"]:
        value = f"{row['macro']['auroc']:.3f}" if "macro" in row else "insufficient data"
        lines.append(f"| {' + '.join(row['modalities'])} | {value} |")
    return [*lines, ""]


def _worst(measured: dict[str, Any]) -> list[str]:
    """The weakest group by AUROC."""
    worst = measured.get("worst", {}).get("auroc")
    if worst is None:
        return []
    interval = f" ({worst['interval'][0]:.3f} to {worst['interval'][1]:.3f})" if "interval" in worst else ""
    return [
        f"Weakest group: {worst['policy']} where {worst['slice']} is {worst['group']}, AUROC {worst['value']:.3f}"
        f"{interval}.",
        "",
    ]


def _without_figures(measured: dict[str, Any]) -> str:
    """The languages in which some policy has too few labels to be measured: a limit of every claim above."""
    languages = sorted(
        {
            language
            for policy in measured["policies"].values()
            for language, cell in policy["by_language"].items()
            if "insufficient" in cell
        }
    )
    return (
        f"Too few labels to measure every policy in: {', '.join(languages)}."
        if languages
        else "Measured in every language."
    )


def _number(macro: dict[str, float]) -> str:
    return f"{macro['average_precision']:.3f}" if "average_precision" in macro else "not measured"
