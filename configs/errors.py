"""The three ways a job can end badly, each with the exit status that schedulers and scripts rely on."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
# Of a rank alone: it tells the launcher to start the ranks again.
EXIT_OUT_OF_MEMORY = 76
# Of a rank alone: another one is gone, which is no fault of this one.
EXIT_LOST_CONTACT = 77


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
