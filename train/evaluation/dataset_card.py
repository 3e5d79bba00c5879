"""report/dataset_card.md: what the shards hold, from their manifest and from what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from crossguard.configs.schema import Config
from crossguard.configs.schema.taxonomy import UNKNOWN
from crossguard.data.shards.manifest import Manifest

# Languages that are listed, the largest ones.
MOST_LANGUAGES = 50


def dataset_card(config: Config, manifest: Manifest, metrics: Mapping[str, Any]) -> str:
    """Markdown: where posts come from, how many there are, which labels they have, what was left out."""
    left_out = {**manifest.left_out, "missing or corrupt media": manifest.refused}
    lines = [
        f"# Posts of {config.recipe}",
        "",
        f"- Source: {config.data.source}",
        f"- Taxonomy: {manifest.taxonomy.name}, version {manifest.taxonomy.version}",
        f"- Shards: {len(manifest.shards)}, manifest {manifest.sha256}, version {manifest.version}",
        *(f"- Left out, {rule.replace('_', ' ')}: {count:,}" for rule, count in left_out.items() if count),
        "",
        "## Policies",
        "",
        *(
            f"- `{policy.name}` (DSA: {policy.dsa_category}): {policy.description or 'no description'}"
            for policy in manifest.taxonomy.policies
        ),
        "",
        "## Posts",
        "",
        *_posts(manifest),
        "",
        "## Labels of the evaluated splits",
        "",
        "A label that nobody gave is unknown and counts nowhere.",
        "",
        "| split | policy | known labels | violating |",
        "|---|---|---|---|",
    ]
    for split, measured in metrics["splits"].items():
        for policy, result in measured["policies"].items():
            cell = result["all"]
            share = f" ({cell['positives'] / cell['n']:.1%})" if cell["n"] else ""
            lines.append(f"| {split} | {policy} | {cell['n']:,} | {cell['positives']:,}{share} |")
    if config.data.source == "synthetic":
        lines += ["", "The posts come from a generator: harmless stand-ins, which say nothing about real ones."]
    return "\n".join([*lines, ""])


def _posts(manifest: Manifest) -> list[str]:
    """A row for each language, with the posts of each split and those without any known label."""
    splits = list(manifest.splits)
    counts: dict[str, Counter[str]] = {}
    for shard in manifest.shards:
        for stratum, count in shard.strata.items():
            language, _, kind = stratum.rpartition("/")
            of_language = counts.setdefault(language, Counter())
            of_language[shard.split] += count
            of_language[UNKNOWN] += count if kind == UNKNOWN else 0
    shown = sorted(counts, key=lambda language: (-counts[language].total(), language))[:MOST_LANGUAGES]
    lines = [f"| language | {' | '.join(splits)} | without any known label |", "|---" * (len(splits) + 2) + "|"]
    for language in shown:
        numbers = [f"{counts[language][name]:,}" for name in (*splits, UNKNOWN)]
        lines.append(f"| {language} | {' | '.join(numbers)} |")
    if len(counts) > len(shown):
        lines += ["", f"and {len(counts) - len(shown)} more languages"]
    return lines
