"""The report's summary in plain words: what the numbers say, the bad news first among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crossguard.configs.schema import Config
from crossguard.train.evaluation.compare import in_words as worse_in_words
from crossguard.train.evaluation.decisions import NO_LABELS
from crossguard.train.evaluation.evasion import POINT
from crossguard.train.evaluation.splits import shown_split

# Differences of average precision or AUROC below this are called level.
LEVEL = 0.01
# A split or language below this AUROC is called failed; chance is .5.
FAILS_BELOW = 0.6
GUESSING = 0.5
# Under an attack, recall may fall and the share of benign posts that are flagged may rise by so much.
MOST_RECALL_LOST = 0.05
MOST_FALSE_POSITIVES = 0.01
REFERENCE_NAMES = {"tfidf_logistic_regression": "character n-grams with logistic regression"}


@dataclass(frozen=True)
class Finding:
    """A sentence and its tone: good, bad or note."""

    tone: str
    text: str


def find(config: Config, metrics: Mapping[str, Any], train_languages: set[str]) -> list[Finding]:
    """What a reader must know before the tables."""
    split = shown_split(metrics["splits"])
    found = [_headline(metrics, split)]
    if "macro" in metrics["splits"][split]:
        found += _against_references(metrics, split) + _against_ablations(metrics, split)
    for name, measured in metrics["splits"].items():
        found += _new_languages(name, measured, train_languages)
    found += _weakest_group(metrics["splits"][split]) + _widest_gap(metrics["splits"][split])
    found += _insufficient(metrics["splits"][split], split, config)
    found += _decisions(config, metrics, split) + _against_earlier(metrics) + _suite(metrics)
    found += _evasion(metrics)
    if config.data.source == "synthetic":
        found.append(
            Finding(
                "note",
                "The posts come from a generator with harmless stand-ins for violations. Such data proves that the "
                "mechanisms work; it says nothing about the quality of moderation on real posts.",
            )
        )
    return found


def in_words(name: str) -> str:
    """A key of metrics.json as a reader would say it."""
    return REFERENCE_NAMES.get(name, name.replace("_", " "))


def _headline(metrics: Mapping[str, Any], split: str) -> Finding:
    macro = metrics["splits"][split].get("macro")
    if macro is None:
        return Finding("bad", f"The {split} split has too few known positives or negatives to measure any policy.")
    return Finding(
        "good" if macro["auroc"] >= FAILS_BELOW + 0.1 else "bad",
        f"Given a violating and a benign post of the {split} split, the model ranks the violating one higher "
        f"{macro['auroc']:.1%} of the time (macro AUROC; guessing gives 50%).",
    )


def _against_references(metrics: Mapping[str, Any], split: str) -> list[Finding]:
    own, found = metrics["splits"][split]["macro"]["average_precision"], []
    for name, reference in metrics.get("references", {}).items():
        other = reference["splits"][split]["macro"]["average_precision"]
        numbers = f"(macro average precision {own:.3f} against {other:.3f})"
        if own < other - LEVEL:
            text = (
                f"The model loses to its reference, {in_words(name)} fitted on {reference['train_posts']:,} posts of "
                f"the same training split {numbers}. Until that changes the reference is the better choice: train "
                "longer, or start from a pretrained encoder."
            )
            found.append(Finding("bad", text))
        elif own <= other + LEVEL:
            found.append(Finding("note", f"The model is level with its reference, {in_words(name)} {numbers}."))
        else:
            found.append(Finding("good", f"The model beats its reference, {in_words(name)} {numbers}."))
    return found


def _against_earlier(metrics: Mapping[str, Any]) -> list[Finding]:
    if "against" not in metrics:
        return []
    earlier, margin, worse = (metrics["against"][name] for name in ("run", "margin", "worse"))
    if not worse:
        return [Finding("good", f"No group is worse than in the earlier run {earlier}, by more than {margin:g}.")]
    text = f"Worse than the earlier run {earlier} by more than {margin:g}: {worse_in_words(worse[0])}"
    return [Finding("bad", f"{text}{f', and {len(worse) - 1} more' if len(worse) > 1 else ''}.")]


def _suite(metrics: Mapping[str, Any]) -> list[Finding]:
    """Functions of the suite that are passed less often than by guessing."""
    found = []
    for policy, result in metrics.get("suite", {}).get("policies", {}).items():
        functions = result["by_functionality"]
        failed = sorted(name for name, cell in functions.items() if cell["interval"][1] < GUESSING)
        text = (
            f"Functional suite, {policy}: {result['all']['pass_rate']:.1%} of {result['all']['n']:,} cases are passed"
        )
        if failed:
            text += f"; worse than guessing: {', '.join(in_words(name) for name in failed)}"
        found.append(Finding("bad" if failed else "note", f"{text}."))
    return found


def _evasion(metrics: Mapping[str, Any]) -> list[Finding]:
    """The family of attacks that hides most, and the one that gets most benign posts flagged."""
    if "evasion" not in metrics:
        return []
    families = {
        name: points[POINT]["macro"]
        for name, points in metrics["evasion"]["families"].items()
        if "macro" in points[POINT]
    }
    if not families:
        return [Finding("note", "Disguised texts: too few known positives or negatives to measure any policy.")]
    hides = min(families, key=lambda name: families[name]["recall"]["difference"])
    flags = max(families, key=lambda name: families[name]["false_positive_rate"]["difference"])
    recall, rate = families[hides]["recall"], families[flags]["false_positive_rate"]
    text = (
        f"Disguised texts, {len(families)} families, at thresholds that flag 5 % of benign posts as they are: recall "
        f"falls most under {in_words(hides)}, from {recall['clean']:.1%} to {recall['attacked']:.1%}; benign posts are "
        f"flagged most under {in_words(flags)}, {rate['attacked']:.1%} instead of {rate['clean']:.1%}."
    )
    holds = recall["difference"] >= -MOST_RECALL_LOST and rate["difference"] <= MOST_FALSE_POSITIVES
    return [Finding("good" if holds else "bad", text)]


def _against_ablations(metrics: Mapping[str, Any], split: str) -> list[Finding]:
    own = metrics["splits"][split]["macro"]["auroc"]
    others = {
        name: measured["splits"][split]["macro"]["auroc"]
        for name, measured in metrics.get("ablations", {}).items()
        if "macro" in measured["splits"].get(split, {})
    }
    if not others:
        return []
    listed = ", ".join(f"{in_words(name)} {value:.3f}" for name, value in others.items())
    best = max(others, key=others.__getitem__)
    if own > others[best] + LEVEL:
        text = f"The whole model reaches AUROC {own:.3f}; trained apart with the same budget: {listed}."
        return [Finding("good", text)]
    text = f"The whole model (AUROC {own:.3f}) is no better than '{in_words(best)}' trained apart ({listed})."
    return [Finding("bad", text)]


def _new_languages(split: str, measured: Mapping[str, Any], train_languages: set[str]) -> list[Finding]:
    """Languages that training never saw, each by the mean AUROC of its measured cells."""
    values: dict[str, list[float]] = {}
    for policy in measured["policies"].values():
        for language, cell in policy["by_language"].items():
            if language not in train_languages and "auroc" in cell:
                values.setdefault(language, []).append(cell["auroc"])
    if not values:
        return []
    means = {language: math.fsum(numbers) / len(numbers) for language, numbers in values.items()}
    listed = ", ".join(f"{language} AUROC {value:.3f}" for language, value in sorted(means.items()))
    failed = sorted(language for language, value in means.items() if value < FAILS_BELOW)
    if failed:
        text = (
            f"The model fails in languages that training never saw: {', '.join(failed)} "
            f"(split {split}: {listed}; guessing gives 0.500). Do not use it there."
        )
        return [Finding("bad", text)]
    return [Finding("good", f"Languages that training never saw, in split {split}: {listed}.")]


def _weakest_group(measured: Mapping[str, Any]) -> list[Finding]:
    worst = measured.get("worst", {}).get("auroc")
    if worst is None:
        return []
    mean = measured["macro"]["auroc"] if "macro" in measured else None
    interval = "–".join(f"{end:.3f}" for end in worst.get("interval", ()))
    text = (
        f"Weakest of the groups that could be measured: {worst['policy']} where {worst['slice']} is {worst['group']}, "
        f"AUROC {worst['value']:.3f}{f' (95 % interval {interval})' if interval else ''}"
        f"{f' beside the mean of {mean:.3f}' if mean is not None else ''}; "
        f"{worst['positives']:,} positives among {worst['n']:,} known labels."
    )
    return [Finding("note", text)]


def _widest_gap(measured: Mapping[str, Any]) -> list[Finding]:
    """The widest gap of false positives that is more than chance."""
    gaps = [
        (gap, policy, name)
        for policy, result in measured["policies"].items()
        for name, gap in result.get("false_positive_gap", {}).get("by", {}).items()
        if gap["interval"][0] > 0
    ]
    if not gaps:
        return []
    gap, policy, name = max(gaps, key=lambda one: one[0]["gap"])
    rates = {end: gap["groups"][gap[end]]["rate"] for end in ("highest", "lowest")}
    text = (
        f"Benign posts are not treated alike: at a threshold that flags 5 % of all benign posts, {policy} flags "
        f"{rates['highest']:.1%} of them where {in_words(name)} is {gap['highest']} and {rates['lowest']:.1%} where it "
        f"is {gap['lowest']}."
    )
    return [Finding("bad", text)]


def _decisions(config: Config, metrics: Mapping[str, Any], split: str) -> list[Finding]:
    """Actions that cannot be promised, and promises that the split contradicts."""
    if "decisions" not in metrics:
        text = "No calibration and no thresholds: they are found on the validation split, which was not evaluated."
        return [Finding("note", text)]
    found = []
    for action, promise in metrics["decisions"]["promises"].items():
        places = {
            (policy, language): one[action]
            for policy, languages in metrics["decisions"]["thresholds"].items()
            for language, one in languages.items()
            if one[action].get("abstains") != NO_LABELS
        }
        kept = sum(threshold["above"] is not None for threshold in places.values())
        if kept < len(places):
            text = (
                f"Action {in_words(action)} ({promise}): the labels of the validation split support it in {kept} of "
                f"{len(places)} cells (policy × language); in the others it is not taken."
            )
            found.append(Finding("note" if kept else "bad", text))
        if broken := _broken(config, metrics["splits"][split], action):
            text = (
                f"Action {in_words(action)} promised {promise} and misses it on split {split} in {', '.join(broken)}, "
                "beyond chance: the split is unlike the validation split, or one of the promises that may fail did."
            )
            found.append(Finding("bad", text))
    return found


def _broken(config: Config, measured: Mapping[str, Any], action: str) -> list[str]:
    """Policies and languages whose interval lies below what was promised."""
    target = config.evaluation.targets.get(action)
    if target is None:
        return []
    name, value = ("precision", target.precision) if target.precision is not None else ("recall", target.recall)
    if value is None:
        return []
    return [
        f"{policy} in {language}"
        for policy, actions in measured.get("actions", {}).items()
        for language, cell in actions.get(action, {}).get("by_language", {}).items()
        if name in cell and cell[name]["interval"][1] < value
    ]


def _insufficient(measured: Mapping[str, Any], split: str, config: Config) -> list[Finding]:
    cells = [cell for policy in measured["policies"].values() for cell in policy["by_language"].values()]
    few = sum("insufficient" in cell for cell in cells)
    if not few:
        return []
    text = (
        f"{few} of {len(cells)} cells (policy × language) of the {split} split have fewer than "
        f"{config.evaluation.min_positives} known positives or negatives and show no number."
    )
    return [Finding("note", text)]
