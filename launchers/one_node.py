"""What one of torchrun's nodes does for all, such as building shards, while the others wait for it.

The same command is started on every node. That of the endpoint does the work and listens at the endpoint meanwhile: the
others hear over a connection how it ended, at once where the node dies. Who comes when the work is done finds there the
store of torchrun, which says nothing to a stranger.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from crossguard.configs.errors import (
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    CrossguardError,
    JobError,
    Preempted,
    UserError,
)
from crossguard.configs.schema import LauncherConfig
from crossguard.launchers.torchrun import SECONDS_TO_MEET, endpoint_is_here, endpoint_of, listen, port_in_use

GREETING = b"crossguard\n"
SECONDS_TO_GREET = 5.0
SECONDS_BETWEEN_TRIES = 0.5
# Work that failed at once: nodes that were started together are to hear of it.
SECONDS_FOR_OTHERS = 30.0
# A node that has lost its power closes no connection: after so long without an answer it is taken for dead.
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


def is_here(config: LauncherConfig) -> bool:
    """Whether this node is the one; where there are no others it is."""
    if _is_alone(config):
        return True
    return endpoint_is_here(config) if config.torchrun.node_rank is None else config.torchrun.node_rank == 0


@contextmanager
def at_work(config: LauncherConfig) -> Iterator[None]:
    """Inside, this node works for all of them; they are told how it ended.

    Raises:
        UserError: another program has the endpoint's port.
    """
    if _is_alone(config):
        yield
        return
    status, others = EXIT_FAILED, list[socket.socket]()
    try:
        listener = listen(endpoint_of(config)[1])
    except OSError:
        raise port_in_use(config) from None
    with listener:
        welcoming = threading.Thread(target=_welcome, args=(listener, others), daemon=True)
        welcoming.start()
        try:
            yield
            status = 0
        except CrossguardError as error:
            status = error.exit_status
            deadline = time.monotonic() + SECONDS_FOR_OTHERS
            while len(others) < config.nodes - 1 and time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_TRIES)
            raise
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            welcoming.join()
            for other in others:
                with other, contextlib.suppress(OSError):
                    other.sendall(str(status).encode())


def wait(config: LauncherConfig, what: str) -> None:
    """Wait until the node of the endpoint has done `what`.

    Raises:
        UserError, Preempted, JobError: it ended there with this error, which that node tells.
        JobError: nobody has answered at the endpoint for SECONDS_TO_MEET, or the node has died.
    """
    endpoint = f"launcher.torchrun.endpoint={config.torchrun.endpoint}"
    deadline, status, problem = time.monotonic() + SECONDS_TO_MEET, None, "nobody answers"
    while status is None:
        if time.monotonic() > deadline:
            raise JobError(f"{endpoint}: {problem}; start the same command on the node that it names")
        try:
            with socket.create_connection(endpoint_of(config), timeout=SECONDS_TO_GREET) as first:
                status = _status(first)
        except OSError as error:
            problem = error.strerror or str(error)
        if status is None:
            time.sleep(SECONDS_BETWEEN_TRIES)
    if status:
        kind = {EXIT_USER_ERROR: UserError, EXIT_PREEMPTED: Preempted}.get(status, JobError)
        raise kind(f"{what}: ended on the node of {endpoint}, which says why")


def _is_alone(config: LauncherConfig) -> bool:
    """Whether the command is started on one node only; other launchers reach the others by themselves."""
    return config.name != "torchrun" or config.nodes == 1


def _welcome(listener: socket.socket, others: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):  # The listener is closed.
        while True:
            other, _ = listener.accept()
            others.append(other)
            with contextlib.suppress(OSError):  # It is gone already.
                other.sendall(GREETING)


def _status(first: socket.socket) -> int | None:
    """How the work ended; None where it was not begun, or ended just then."""
    try:
        if first.recv(len(GREETING)) != GREETING:
            return None
    except TimeoutError:
        return 0  # The store of torchrun: the work is done.
    first.settimeout(None)
    first.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        if hasattr(socket, option):  # not on every system
            first.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    with contextlib.suppress(OSError):
        return int(first.recv(16) or EXIT_FAILED)
    return EXIT_FAILED
