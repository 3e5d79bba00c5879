"""Storage that fails for a moment: try again, wait longer each time, give up with an error that says what was tried."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

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


def with_retries(place: str, act: Callable[[], T]) -> T:
    """`act()`, again after a while when the storage fails.

    Args:
        place: what is read or written, for the error.
        act: may be called several times.

    Raises:
        FileNotFoundError: nothing is there.
        UserError: it may not be read or written, or is a folder.
        JobError: the storage still fails after TRIES tries.
    """

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s: try %d of %d failed (%s)", place, state.attempt_number, TRIES, explain(error))

    tries = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(FIRST_WAIT, max=LONGEST_WAIT),
        retry=retry_if_exception(lambda error: isinstance(error, OSError) and not isinstance(error, LASTING)),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return tries(act)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, "not found", place) from error
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{place}: {explain(error)}; give this user access to it") from error
    except OSError as error:
        raise JobError(f"{place}: {explain(error)}, {TRIES} tries; check the storage, then start again") from error


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
