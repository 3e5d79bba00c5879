"""The signals by which a scheduler asks a job to make room. Whoever gets one sees to it that nothing is lost, and ends
with exit status 75 (`Preempted`)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def on_preemption(act: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, `act` is called in the main thread whenever one of the signals arrives; what it raises is raised there.

    To be entered in the main thread.
    """
    before = {name: signal.signal(name, lambda number, _: act(signal.Signals(number))) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
