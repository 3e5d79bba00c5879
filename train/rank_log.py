"""The log file of a rank, which takes everything that libraries and their child processes say."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def rank_log(run_dir: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Send standard output and standard error of this process to `logs/rank-00000.log` of this rank.

    On rank 0 alone, Python's `sys.stderr` stays on the terminal, for progress and the one line of an error; what
    compilers and C++ write goes to the log even there.

    Yields:
        The terminal, and the log.
    """
    rank = int(os.environ.get("RANK", "0"))
    path = run_dir / "logs" / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = sys.stderr
    with path.open("a", buffering=1) as log, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            with _descriptors_to(log.fileno()), contextlib.redirect_stdout(log):
                sys.stderr = terminal if rank == 0 else log
                yield terminal, log
        finally:
            sys.stderr = before
            logging.captureWarnings(False)
            logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def _descriptors_to(target: int) -> Iterator[None]:
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        for descriptor in saved:
            os.dup2(target, descriptor)
        yield
    finally:
        for descriptor, original in saved.items():
            os.dup2(original, descriptor)
            os.close(original)
