"""What this process does at the moment, by name: the watchdog looks at it, and whoever times phases is told of each.

Phases follow each other and never lie within each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DATA = "data"
WAITING = "waiting for the other ranks"
FORWARD = "forward"
BACKWARD = "backward"
STEP = "step"
LOG = "log"
CHECKPOINT = "save"
EVALUATION = "evaluation"

# Told of a phase that begins.
Listener = Callable[[str], None]


class _Now:
    """This process: setting an attribute for each phase costs nothing that could be measured."""

    phase: tuple[str, float] | None = None
    listeners: tuple[Listener, ...] = ()


def enter(name: str) -> None:
    """A phase begins, or goes on: its time starts anew."""
    _Now.phase = (name, time.monotonic())
    for listener in _Now.listeners:
        listener(name)


def rest() -> None:
    """What comes now may take as long as it likes."""
    _Now.phase = None


def current() -> tuple[str, float] | None:
    """The phase, and when it began (of `time.monotonic`); None when there is none to watch."""
    return _Now.phase


@contextmanager
def resting_after() -> Iterator[None]:
    """The last phase ends with the block, whatever happens in it."""
    try:
        yield
    finally:
        rest()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `listener` is told of every phase that begins."""
    _Now.listeners = (*_Now.listeners, listener)
    try:
        yield
    finally:
        _Now.listeners = tuple(heard for heard in _Now.listeners if heard is not listener)
