"""Storage that fails for a moment: try again, wait longer each time, give up with an error that says what was tried."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from crossguard.configs.errors import JobError, UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Together about a minute of waiting: what a file server takes to fail over.
TRIES = 8
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds


class LostError(Exception):
    """A file of the shards is missing, or is not what the manifest says; the message completes "the shard … "."""


# What no waiting mends.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
FULL = (errno.ENOSPC, errno.EDQUOT)


def with_retries(place: str, act: Callable[[], T]) -> T:
    """`act()`, again after a while when the storage fails.

    Args:
        place: what is read or written, for the error.
        act: may be called several times.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it may not be read or written, or is a folder.
        JobError: the disk is full, or the storage still fails after TRIES tries.
    """

    try:
        return act()  # nearly always all there is: only after a failure is it worth counting tries
    except OSError as error:
        return _go_on(place, act, error)


def _go_on(place: str, act: Callable[[], T], error: OSError) -> T:
    """What is left to do after a first try that failed with `error`."""
    failed = [error]

    def attempt() -> T:
        if failed:
            raise failed.pop()
        return act()

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s: try %d of %d failed (%s)", place, state.attempt_number, TRIES, explain(error))

    tries = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential_jitter(FIRST_WAIT, LONGEST_WAIT, jitter=FIRST_WAIT),
        retry=retry_if_exception(_may_pass),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return tries(attempt)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, "not found", place) from error
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{place}: {explain(error)}; give this user access to it") from error
    except OSError as error:
        if error.errno in FULL:
            raise JobError(f"{place}: {explain(error)}; make room, then start again") from error
        raise JobError(f"{place}: {explain(error)}, {TRIES} tries; check the storage, then start again") from error


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, LASTING) and error.errno not in FULL


def explain(error: BaseException | None) -> str:
    """What the system says of an error, in a few words."""
    if isinstance(error, OSError) and error.errno:
        return error.strerror or os.strerror(error.errno)
    lines = str(error).strip().splitlines()
    if type(error) in (OSError, PermissionError):  # their names say nothing more
        return lines[0] if lines else "failed"
    return ": ".join([type(error).__name__, *lines[:1]])


def local_path(location: str | Path) -> Path | None:
    """The local folder that a location names (by its path or as file://…); None for any other URL."""
    name = str(location)
    if re.match("(file|local)://", name):
        return Path(name.partition("://")[2])
    return None if "://" in name else Path(name)
