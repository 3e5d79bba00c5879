"""Progress: a bar with rate and time left on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What the work reports to."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown behind the bar."""
        ...


class _Bar:
    def __init__(self, title: str, total: int | None, unit: str, done: int):
        from tqdm import tqdm

        self.bar = tqdm(desc=title, total=total, unit=unit, initial=done, file=sys.stderr, dynamic_ncols=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)

    def close(self) -> None:
        self.bar.close()


class _Lines:
    def __init__(self, title: str, total: int | None, unit: str, done: int):
        self.title, self.total, self.unit = title, total, unit
        self.done = self.first = done
        self.started = self.said = time.monotonic()
        self.note = ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
            self._say()

    def close(self) -> None:
        self._say()

    def _say(self) -> None:
        now = self.said = time.monotonic()
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        parts = [
            f"{self.title}: {self.done}{f'/{self.total}' if self.total else ''} {self.unit}",
            f"{rate:.1f} {self.unit}/s",
        ]
        if self.total and rate > 0 and self.done < self.total:
            parts.append(f"{(self.total - self.done) / rate:.0f} s left")
        if self.note:
            parts.append(self.note)
        print(", ".join(parts), file=sys.stderr, flush=True)


class _Silent:
    def advance(self, count: int = 1, note: str = "") -> None:
        """Only rank 0 speaks."""

    def close(self) -> None:
        """Nothing was opened."""


@contextmanager
def progress(title: str, total: int | None, unit: str, *, done: int = 0, speak: bool = True) -> Iterator[Progress]:
    """Show how far a piece of work is.

    Args:
        title: what is being done, e.g. "build".
        total: units in all, None when nobody knows.
        unit: what is counted, e.g. "posts".
        done: units that were done before (a resumed job).
        speak: False on every rank but the first.
    """
    shown: _Bar | _Lines | _Silent
    if not speak:
        shown = _Silent()
    elif sys.stderr.isatty():
        shown = _Bar(title, total, unit, done)
    else:
        shown = _Lines(title, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()
