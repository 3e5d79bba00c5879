"""How long each phase took: by the clock of the host, or of the GPU, which works on after the host has asked it to."""

from __future__ import annotations

import time
from typing import Any

import torch

# Marks that are kept before they are added up, in a window of many steps.
MOST_MARKS = 4096
# What passed before the first phase.
BEFORE = ""


class PhaseTimes:
    """Seconds of each phase; `enter` is to be told of every one that begins.

    On a GPU a boundary is an event in its stream: the GPU notes the time when it gets there, and nothing waits for it
    until the seconds are asked for.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        # Events that may be used again.
        self._free: list[Any] = []
        self._phase, self._began = BEFORE, self._mark()
        # Boundaries since then: the phase that begins, and when.
        self._marks: list[tuple[str, Any]] = []

    def enter(self, name: str) -> None:
        """A phase begins, and the one before it ends."""
        self._marks.append((name, self._mark()))
        if len(self._marks) >= MOST_MARKS:
            self._add_up()

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, or the start; together they are the time that passed."""
        self.enter(self._marks[-1][0] if self._marks else self._phase)
        self._add_up()
        taken, self._seconds = self._seconds, {}
        return taken

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self) -> None:
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        for name, mark in self._marks:
            passed = self._began.elapsed_time(mark) / 1e3 if self._on_gpu else mark - self._began
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + passed
            if self._on_gpu:
                self._free.append(self._began)
            self._phase, self._began = name, mark
        self._marks.clear()
