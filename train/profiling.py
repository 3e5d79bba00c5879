"""`train.profile=true`: a trace of a few steps on every rank, for https://ui.perfetto.dev or chrome://tracing.

It holds the names, times and shapes of operations, and the phases around them; no numbers of a batch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from crossguard.train import phases
from crossguard.train.ranks import Ranks

logger = logging.getLogger(__name__)
# Steps before the trace, in which memory is taken and kernels are chosen, and steps in it.
WARM_UP, STEPS = 3, 3
# Passes of a model, forward or of an evaluation, after which a trace ends anyway: that bounds its size.
MOST_PASSES = 24


@contextlib.contextmanager
def profiling(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, some steps are traced to `profile/rank-00000.json.gz` of each rank."""
    trace = _Trace(run_dir / "profile" / f"rank-{ranks.rank:05d}.json.gz", ranks)
    try:
        with phases.listening(trace.enter):
            yield
    finally:
        trace.close()


class _Trace:
    """Begins and ends where phases do."""

    def __init__(self, path: Path, ranks: Ranks):
        self._path, self._ranks = path, ranks
        self._steps = self._passes = 0
        self._profiler: profile | None = None
        self._range: record_function | None = None

    def enter(self, phase: str) -> None:
        """A phase begins; `data` is the first of a step."""
        self._steps += phase == phases.DATA
        if self._steps == WARM_UP + 1 and phase == phases.DATA:
            self._begin()
        if self._profiler is None:
            return
        self._passes += phase in (phases.FORWARD, phases.EVALUATION)
        if self._steps > WARM_UP + STEPS or self._passes > MOST_PASSES:
            self._end()
            return
        self._end_range()
        self._range = record_function(phase)
        self._range.__enter__()

    def close(self) -> None:
        """No more phases come."""
        if self._steps <= WARM_UP:
            self._ranks.say(f"train: no profile: it begins after {WARM_UP} steps")
        self._end()

    def _begin(self) -> None:
        activities = {ProfilerActivity.CPU}
        if self._ranks.device.type == "cuda":
            activities.add(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def _end(self) -> None:
        if self._profiler is None:
            return
        self._end_range()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
        except OSError as error:  # A job does not end for want of a trace.
            logger.warning("%s: cannot write (%s)", self._path, error)
            self._ranks.say(f"train: no profile: {self._path}: {error.strerror}")
            return
        self._ranks.say(f"train: a profile of each rank is in {self._path.parent}; open it in ui.perfetto.dev")

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
