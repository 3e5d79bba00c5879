"""Nearest valid names, so that a typo is answered with what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, sorted(set(valid)), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, valid: Iterable[str], *, limit: int = 12) -> str:
    """The tail of an error message: the nearest valid name, else the valid names (at most `limit`)."""
    names = sorted(set(valid))
    match = nearest(name, names)
    if match is not None:
        return f"did you mean '{match}'?"
    shown = ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
    return f"valid: {shown}" if names else "none is valid here"


def allowed(name: str, choices: Iterable[str]) -> str:
    """The tail of an error message about one of a few values: the nearest one, and all of them."""
    names = list(choices)
    match = nearest(name, names)
    return (f"did you mean '{match}'? " if match else "") + f"allowed: {', '.join(names)}"
