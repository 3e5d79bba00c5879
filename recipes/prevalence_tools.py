"""`crossguard prevalence`: which posts to label, and what their labels say about all posts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crossguard.configs.arguments import take
from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean

TOOLS = ("draw", "estimate")
DRAW = "prevalence draw PREDICTIONS.parquet policy=NAME posts=N [views=COLUMN] [seed=N] [output=sample.jsonl]"
ESTIMATE = "prevalence estimate SAMPLE.jsonl"


def prevalence(argv: list[str]) -> None:
    """The tool that the first argument names.

    Raises:
        UserError: there is no such tool, an argument is wrong, or the sample is.
    """
    if not argv or argv[0] not in TOOLS:
        hint = did_you_mean(argv[0], TOOLS) if argv else f"{DRAW}, or {ESTIMATE}"
        raise UserError(f"prevalence: {argv[0] if argv else 'which tool?'}: {hint}")
    (_draw if argv[0] == "draw" else _estimate)(argv[1:])


def _draw(argv: list[str]) -> None:
    own, rest = take(argv, "policy", "posts", "views", "seed", "output")
    if len(rest) != 1 or not {"policy", "posts"} <= own.keys():
        raise UserError(DRAW)
    import numpy as np

    from crossguard.train.evaluation.prevalence import Design

    table = _read_table(Path(rest[0]))
    scores = next((name for name in (f"calibrated.{own['policy']}", f"score.{own['policy']}") if name in table), None)
    if scores is None:
        policies = [name.partition(".")[2] for name in table if name.startswith("score.")]
        raise UserError(f"policy={own['policy']}: {did_you_mean(own['policy'], policies)}")
    if "views" in own and own["views"] not in table:
        raise UserError(f"views={own['views']}: {did_you_mean(own['views'], table)}")
    views = np.array(table[own["views"]], dtype=np.float64) if "views" in own else None
    if views is not None and not (views > 0).all():
        raise UserError(f"views={own['views']}: must be above 0 for every post")
    count, seed = (_whole(name, own.get(name, "0")) for name in ("posts", "seed"))
    rows, known = Design.of(np.array(table[scores]), count, views).draw(seed)
    output = Path(own.get("output", "sample.jsonl"))
    lines = [{"id": table["id"][row], "label": None, **about} for row, about in zip(rows, known, strict=True)]
    output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"prevalence: {len(lines)} of {len(table['id']):,} posts to label -> {output}", flush=True)


def _estimate(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError(ESTIMATE)
    from crossguard.train.evaluation.prevalence import estimate

    found = estimate(_read_sample(Path(argv[0])))
    print(json.dumps(found, indent=1), flush=True)


def _read_table(file: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file).to_pydict()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file}: no table of predictions; say what `crossguard predict` wrote") from error


def _read_sample(file: Path) -> list[dict[str, Any]]:
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: unreadable ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        try:
            post = json.loads(line)
            label = post["label"]
            _ = [float(post[name]) for name in ("stratum", "share", "size", "value", "expected")]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}:{number}: no line that `prevalence draw` wrote ({type(error).__name__})") from None
        if label is not None and (not isinstance(label, int | float) or not 0 <= label <= 1):
            raise UserError(f"{file}:{number}: label: must be 1, 0, a fraction or null")
        found.append(post)
    return found


def _whole(name: str, value: str) -> int:
    if not value.isdecimal():
        raise UserError(f"{name}={value}: must be a whole number")
    return int(value)
