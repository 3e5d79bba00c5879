"""`crossguard shards …`: tools for shards, a function each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from crossguard.configs.cores import usable_cores
from crossguard.configs.errors import JobError, UserError
from crossguard.configs.suggest import did_you_mean
from crossguard.recipes.sample_queries import exposure, preview


def shards(argv: list[str]) -> None:
    """The tool that the first argument names."""
    name = argv[0] if argv else ""
    if name not in TOOLS:
        raise UserError(f"shards: {name or 'name a tool'}: {did_you_mean(name, TOOLS)}")
    TOOLS[name](argv[1:])


def verify(argv: list[str]) -> None:
    """Every bit of the shards against their hashes.

    Raises:
        JobError: something is damaged; it is printed.
    """
    location, as_json = _arguments("verify", argv)
    from crossguard.data.shards.place import Place
    from crossguard.data.shards.verify import verify as verify_shards

    result = verify_shards(Place.of(location), usable_cores())
    if as_json:
        print(json.dumps({"ok": not result.damages} | asdict(result), ensure_ascii=False))
    else:
        for damage in result.damages:
            print(f"{damage.file}: {f'sample {damage.key}: ' if damage.key else ''}{damage.what}")
        said = f"damage in {len(result.damages):,} places" if result.damages else "every bit is as it was written"
        print(f"verify: {result.samples:,} samples in {result.files:,} files: {said}")
    if result.damages:
        files = len({damage.file for damage in result.damages})
        raise JobError(f"{location}: {files} damaged files; restore them, or build the shards again")


def stats(argv: list[str]) -> None:
    """What the shards hold."""
    location, as_json = _arguments("stats", argv)
    from crossguard.data.shards.place import Place
    from crossguard.data.shards.stats import stats as stats_of

    found = stats_of(Place.of(location), usable_cores())
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(_tables(found)))


_COUNTED = {"language": "languages", "stratum": "strata", "modality": "modalities", "text bytes": "text_bytes"}
TOOLS: dict[str, Callable[[list[str]], None]] = {
    "preview": preview,
    "exposure": exposure,
    "verify": verify,
    "stats": stats,
}


def _arguments(tool: str, argv: list[str]) -> tuple[str, bool]:
    """Where the shards lie, and whether JSON is wanted."""
    places = [argument for argument in argv if argument != "--json"]
    if len(places) != 1 or places[0].startswith("-"):
        raise UserError(f"shards {tool}: say crossguard shards {tool} SHARDS [--json], SHARDS being a folder or a URL")
    return places[0], "--json" in argv


def _tables(found: dict[str, Any]) -> list[str]:
    """A table of the splits, and one each for what is counted in them."""
    splits: dict[str, dict[str, Any]] = found["splits"]
    counts = f"{found['posts']:,} posts in {found['shards']:,} shards, {found['bytes']:,} bytes"
    lines = [f"version {found['version']}: {counts}"]
    left_out = {**found["left_out"], "missing or corrupt media": found["refused"]}
    if any(left_out.values()):
        lines.append("left out: " + ", ".join(f"{count:,} ({rule})" for rule, count in left_out.items() if count))
    columns = ["posts", "shards", "bytes"]
    lines += _table(["split", *columns], [[name, *(s[key] for key in columns)] for name, s in splits.items()])
    states = [[policy, name, counts] for name, s in splits.items() for policy, counts in s["policies"].items()]
    rows = [[policy, name, *counts.values()] for policy, name, counts in sorted(states, key=lambda state: state[0])]
    lines += _table(["policy", "split", *(states[0][2] if states else ())], rows)
    for title, key in _COUNTED.items():
        names = dict.fromkeys(name for s in splits.values() for name in s[key])
        lines += _table([title, *splits], [[name, *(s[key].get(name, 0) for s in splits.values())] for name in names])
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table under an empty one: words to the left, numbers to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [not rows or isinstance(value, str) for value in (rows[0] if rows else header)]
    lines = [""]
    for row in cells:
        columns = zip(row, widths, words, strict=True)
        padded = [cell.ljust(width) if is_word else cell.rjust(width) for cell, width, is_word in columns]
        lines.append("  ".join(padded).rstrip())
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,}"
