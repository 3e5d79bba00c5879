"""The ways a job can end badly, each with the exit status that schedulers and scripts rely on."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
# Of a rank alone: it tells the launcher to start the ranks again.
EXIT_OUT_OF_MEMORY = 76
# Of a rank alone: another one is gone, which is no fault of this one.
EXIT_LOST_CONTACT = 77
# How an allocation that fails is told where there is no error of its own for it: by torch on the CPU, by a driver, by a
# library.
_MEMORY = ("DefaultCPUAllocator", "out of memory", "bad_alloc", "STATUS_ALLOC_FAILED")


class CrossguardError(Exception):
    """Base of every error that is answered with a message instead of a traceback.

    The message names the place, what is wrong and the remedy.
    """

    exit_status = EXIT_FAILED


class UserError(CrossguardError):
    """What the user supplied is wrong: configuration, posts, taxonomy, shards, a checkpoint of another model."""

    exit_status = EXIT_USER_ERROR


class JobError(CrossguardError):
    """The job itself failed: a non-finite loss, a full disk, a directory that another job holds."""

    exit_status = EXIT_FAILED


class Preempted(CrossguardError):
    """The job was asked to stop and saved its state: start it again and it goes on."""

    exit_status = EXIT_PREEMPTED


class OutOfMemory(CrossguardError):
    """A forward or backward pass has not fitted into a rank's memory: start again and it takes fewer posts at once."""

    exit_status = EXIT_OUT_OF_MEMORY


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on a GPU or on the host."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY))
