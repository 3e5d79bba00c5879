"""The bundle's card: generated from the configuration and from what was measured, never written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crossguard.configs.schema import Config

NOT_MEASURED = "Nothing was measured: `crossguard evaluate` has not run."


def model_card(config: Config, run_dir: Path, step: int) -> str:
    """Markdown: what the model is for, what it was trained on, what it scored and where it has no figures."""
    metrics = _metrics(run_dir)
    lines = [
        f"# {config.recipe}",
        "",
        config.description or "No description.",
        "",
        f"- Taxonomy: {config.taxonomy.name}, version {config.taxonomy.version}",
        f"- Modalities: {', '.join(config.model.modalities)}",
        f"- Checkpoint: after step {step}",
        "- Scores are probabilities as the model gives them, not calibrated decisions.",
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
    for split, measured in metrics["splits"].items():
        lines += [
            f"### {split}",
            "",
            "| policy | average precision | AUROC | known labels | positives |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(policy, result["all"]) for policy, result in measured["policies"].items()]
        lines += ["", _without_figures(measured), ""]
    for kind in ("ablations", "references"):
        for name, measured in metrics.get(kind, {}).items():
            macro = measured.get("macro", {})
            lines.append(f"- {kind[:-1]} {name.replace('_', ' ')}: macro average precision {_number(macro)}")
    if config.data.source == "synthetic":
        lines += ["", "Trained on generated stand-ins: these figures say nothing about moderation quality."]
    return "\n".join([*lines, ""])


def _metrics(run_dir: Path) -> dict[str, Any] | None:
    file = run_dir / "report" / "metrics.json"
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _row(policy: str, cell: dict[str, Any]) -> str:
    counts = f"{cell['n']} | {cell['positives']} |"
    if "insufficient" in cell:
        return f"| {policy} | insufficient data | | {counts}"
    return f"| {policy} | {cell['average_precision']:.3f} | {cell['auroc']:.3f} | {counts}"


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
