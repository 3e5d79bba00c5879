"""A process that has imported torch, DeepSpeed and transformers once, and forks ranks for tests: a start takes a second
instead of ten. `rank_jobs.py` starts it and asks it.

pytest ── pool ── job ── ranks (or a launcher, and its ranks)

A job stands where torchrun would: it holds the store through which ranks find each other, and they end with it. Every
process here ends with the one before it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# What a rank imports sooner or later, so far as it is not a test's own.
import deepspeed  # noqa: F401
import numpy as np
import pyarrow.dataset  # noqa: F401
import setuptools  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
import torch._inductor.ir
import transformers.models.bert.modeling_bert
import transformers.models.vit.modeling_vit  # noqa: F401
from torch.distributed import TCPStore

from crossguard.configs.parent_death import die_with_parent
from crossguard.configs.preemption import SIGNALS
from crossguard.launchers import processes
from crossguard.recipes import commands, stages  # noqa: F401
from crossguard.train import training  # noqa: F401
from crossguard.train.evaluation import stage  # noqa: F401

# How long the other ranks may take to end by themselves when one has ended badly.
SECONDS_TO_END = 5.0


def open_descriptors() -> set[int]:
    """Of this process."""
    with os.scandir("/proc/self/fd") as found:
        return {int(entry.name) for entry in found}


def fork_python(
    line: Sequence[str],
    environment: Mapping[str, str],
    keep: Collection[int],
    first: Callable[[], Any] = lambda: None,
) -> int:
    """Run `python LINE` (a file, or -m and a module) in a fork of this process; returns its pid.

    Args:
        line: file or module, and its arguments.
        environment: all of it.
        keep: descriptors that stay open, beside standard ones and what the imports opened.
        first: is called in the new process before everything else.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        for descriptor in open_descriptors() - Pool.descriptors - set(keep):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        os.environ.clear()
        os.environ.update(environment)
        asked = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[1:1] = [folder for folder in asked if folder and folder not in sys.path]
        for sent in SIGNALS:  # A launcher's handlers are not its ranks'.
            signal.signal(sent, signal.SIG_DFL)
        np.random.seed()  # Processes that are started apart do not draw alike; Python's own generator sees to itself.
        torch.seed()
        first()
        status = run_python(list(line))
    except BaseException:
        traceback.print_exc()
    finally:  # Nothing below this frame is this process's business.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_python(line: list[str]) -> int:
    """What `python LINE` does; returns the exit status."""
    try:
        if line[0] == "-m":
            sys.argv, sys.path[0] = line[1:], os.getcwd()
            runpy.run_module(line[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = line, str(Path(line[0]).parent)
            runpy.run_path(line[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


class ForkedRank:
    """Stands for `subprocess.Popen` in the local launcher: its ranks are forked. All else is the launcher's own."""

    def __init__(self, command: list[str], env: Mapping[str, str], pass_fds: Collection[int], start_new_session: bool):
        assert command[0] == sys.executable
        assert start_new_session
        self.pid = fork_python(command[1:], env, pass_fds, os.setsid)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, where it has ended."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit status."""
        return self._ended(0)

    def send_signal(self, sent: int) -> None:
        """Where it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, sent)

    def _ended(self, options: int) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, options))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode


def threads() -> set[str]:
    """The names of this process's other threads."""
    tasks = Path("/proc/self/task")
    return {(task / "comm").read_text().strip() for task in tasks.iterdir() if task.name != str(os.getpid())}


class Pool:
    """This process."""

    # What is open once everything is imported.
    descriptors: frozenset[int] = frozenset()


def serve(control: socket.socket, client: int) -> None:
    """Fork a job for each connection that comes, until the client process ends."""
    client_ends = os.pidfd_open(client)
    while True:
        ready, _, _ = select.select([control, client_ends], [], [])
        if client_ends in ready:
            return
        _, given, _, _ = socket.recv_fds(control, 1, 3)
        if not given:
            return
        if os.fork() == 0:
            try:
                die_with_parent()
                run_job(*given)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        for descriptor in given:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # Jobs that have ended.
                pass


def run_job(connection: int, out: int, errors: int) -> None:
    """Do what is asked for on the connection: say pids, then statuses as they come; EOF there ends the job."""
    talk = socket.socket(fileno=connection)
    request = json.loads(talk.makefile("rb").readline())
    os.dup2(out, 1)
    os.dup2(errors, 2)
    os.chdir(request["cwd"])
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    port, ranks = listening.getsockname()[1], request["ranks"]
    pids = [
        fork_python(request["line"], request["environment"] | place, (), start_of(ranks))
        for place in places(ranks, port)
    ]
    # The one thread begins when all are forked.
    store = TCPStore("127.0.0.1", port, ranks or 1, True, wait_for_workers=False, master_listen_fd=listening.detach())
    send(talk, {"job": os.getpid(), "pids": pids})
    for rank, status in ends_of(pids, talk):
        send(talk, {"rank": rank, "status": status})
    del store


def places(ranks: int, port: int) -> list[dict[str, str]]:
    """What torchrun would add to the environment of each rank; nothing for a launcher."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] or [{}]


def start_of(ranks: int) -> Callable[[], None]:
    """What a forked process does first: a rank or a launcher ends with its job; a launcher forks its ranks."""

    def start() -> None:
        die_with_parent()
        if not ranks:
            processes.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedRank})  # type: ignore[assignment]

    return start


def ends_of(pids: list[int], talk: socket.socket) -> Iterator[tuple[int, int]]:
    """(rank, exit status) as they end. All are killed some time after one has ended badly, or when the client goes; then
    this ends when they have."""
    left = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
    deadline = float("inf")
    while left:
        wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([talk, *left], [], [], wait)
        if talk in ready or not ready:
            for rank in left.values():
                os.kill(pids[rank], signal.SIGKILL)
            deadline = float("inf")
            if talk in ready:
                for rank in left.values():
                    os.waitpid(pids[rank], 0)
                return
        for ended in ready:
            rank = left.pop(ended)
            status = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
            if status:
                deadline = min(deadline, time.monotonic() + SECONDS_TO_END)
            yield rank, status


def send(talk: socket.socket, message: dict[str, Any]) -> None:
    """One line."""
    talk.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    # A fork has one thread: what another one was doing would never be finished. pyarrow's memory is made for forks.
    assert threads() <= {"jemalloc_bg_thd"}, threads()
    Pool.descriptors = frozenset(open_descriptors() - {int(sys.argv[1])})
    # What is imported stays: no fork looks through it for garbage, as DeepSpeed asks for at every start of stage 3.
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    with contextlib.suppress(ChildProcessError):
        while os.wait():  # They have heard of it, too.
            pass
