"""`crossguard report compare RUN_A RUN_B`: what changed from one run to another, group by group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean

USAGE = "report compare RUN_A RUN_B [--json]: run directories that were evaluated, the earlier one first"


def report(argv: list[str]) -> None:
    """The tool that the first argument names.

    Raises:
        UserError: there is no such tool, or the runs cannot be compared.
    """
    if not argv or argv[0] != "compare":
        hint = did_you_mean(argv[0], ["compare"]) if argv else USAGE
        raise UserError(f"report: {argv[0] if argv else 'which tool?'}: {hint}")
    folders = [argument for argument in argv[1:] if argument != "--json"]
    if len(folders) != 2:
        raise UserError(f"{USAGE}; got {len(folders)} folders")
    from crossguard.configs.saved import load_config
    from crossguard.train.evaluation.compare import compare, read_run

    old, new = (Path(folder) for folder in folders)
    found = compare(read_run(new), read_run(old), load_config(new / "config.yaml").evaluation)
    print(json.dumps(found, indent=1, ensure_ascii=False) if "--json" in argv else _table(found), flush=True)


def _table(found: dict[str, Any]) -> str:
    """A line for each group: the second run's value, the difference and its paired 95 % interval."""
    from crossguard.train.evaluation.compare import COMPARED, EVERYTHING, in_words

    lines = []
    for split, compared in found["splits"].items():
        lines.append(f"{split}: {compared['posts']:,} posts in common")
        for group in compared["groups"]:
            where = "all" if group["slice"] == EVERYTHING else f"{group['slice']} {group['group']}"
            values = "  ".join(
                f"{metric} {one['new']:.3f} ({one['difference']:+.3f}, {one['interval'][0]:+.3f} to"
                f" {one['interval'][1]:+.3f})"
                for metric, one in ((metric, group[metric]) for metric in COMPARED)
            )
            lines.append(f"  {group['policy']:<20} {where:<28} n {group['n']:>8,}  {values}")
    worse = [f"  {in_words(one)}" for one in found["worse"]]
    return "\n".join(
        [*lines, *(["worse beyond the margin and beyond chance:", *worse] if worse else ["nothing is worse"])]
    )
