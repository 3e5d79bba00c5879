"""Small checks that every group's schema shares. They raise `UserError` with the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable

from crossguard.configs.errors import UserError
from crossguard.configs.suggest import allowed


def at_least(key: str, value: float | None, minimum: float) -> None:
    """`value` is None or not below `minimum`."""
    if value is not None and not value >= minimum:
        raise UserError(f"{key}={value}: must be at least {minimum}")


def above(key: str, value: float | None, bound: float) -> None:
    """`value` is None or greater than `bound`."""
    if value is not None and not value > bound:
        raise UserError(f"{key}={value}: must be above {bound}")


def within(key: str, value: float | None, low: float, high: float) -> None:
    """`value` is None or lies in [low, high]."""
    if value is not None and not low <= value <= high:
        raise UserError(f"{key}={value}: must lie between {low} and {high}")


def one_of(key: str, value: str, choices: Iterable[str], *, or_own: bool = False) -> None:
    """`value` is one of `choices`; with `or_own`, also the reader's own part, written `module:name`."""
    if value in choices or (or_own and ":" in value):
        return
    own = ", or your own as module:name" if or_own else ""
    raise UserError(f"{key}={value}: {allowed(value, choices)}{own}")
