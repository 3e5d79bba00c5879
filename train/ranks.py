"""The processes that train together: who this one is, and the few things that they say to each other."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from crossguard.configs.errors import CrossguardError, JobError
from crossguard.configs.rank_store import STORE_DESCRIPTOR

T = TypeVar("T")
# Only bounds a hang at the start, where rank 0 may take hours to verify and measure a large set of shards while the
# others wait. Afterwards the watchdog ends a rank that waits too long, and the launcher the others when a rank is lost.
TIMEOUT = timedelta(hours=12)
# All ranks are started together; what answers at the address but is no store of theirs is found out by this.
JOIN_TIMEOUT = timedelta(minutes=10)
# So many numbers are summed up on the CPU by sending each rank's to all others: gloo's all-reduce cuts even a small
# tensor into two pieces a rank and passes each around twice. On 2 and 4 ranks of one machine that takes 1.3 to 3.4
# times as much CPU, for 12 numbers as for 4,096; what is sent grows with the ranks, so that the limit is lower.
MOST_GATHERED = 256


@dataclass(frozen=True)
class Ranks:
    """This process among the `world_size` that train together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    # Their connections; None for those that everything shares.
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Rank 0 speaks on the terminal, writes the shared files and decides facts about the file system."""
        return self.rank == 0

    def beside(self) -> Ranks:
        """The same ranks over connections of their own, for a thread beside the one that trains; all ranks call it."""
        if self.world_size == 1:
            return self
        return replace(self, device=torch.device("cpu"), group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all ranks, in place."""
        return self.begin_sum(value)()

    def begin_sum(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The same, on its way: the call of what is returned waits for it. Two talks at once cost less than one after
        the other; all ranks begin them in the same order."""
        if self.world_size == 1:
            return lambda: value
        gathered = value.device.type == "cpu" and value.numel() <= MOST_GATHERED
        parts = value.new_empty((self.world_size, *value.shape)) if gathered else None
        options: dict[str, Any] = {"group": self.group, "async_op": True}
        work = dist.all_reduce(value, **options) if parts is None else dist.all_gather([*parts], value, **options)

        def end() -> torch.Tensor:
            work.wait()
            return value if parts is None else torch.sum(parts, 0, dtype=value.dtype, out=value)

        return end

    def gather(self, value: T) -> list[T]:
        """The small object of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, value: bool) -> bool:
        """Whether any rank says so. Talks over the CPU: no device has to wait."""
        return bool(value) if self.world_size == 1 else bool(self.sum(torch.tensor(int(value))))

    def broadcast(self, value: T) -> T:
        """Rank 0's small object, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device, group=self.group)
        return values[0]

    def on_first(self, act: Callable[[], T]) -> T:
        """Rank 0 acts on the file system; its result, or its error, is everyone's."""
        result: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = act()
            except (CrossguardError, OSError) as failed:
                error = failed
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def say(self, message: str) -> None:
        """A line on the terminal, from rank 0."""
        if self.is_first:
            print(message, file=sys.stderr, flush=True)

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank the error that any one of them brings; the lowest rank's, when several do."""
        for other in self.gather(error):
            if other is not None:
                raise other


def init_ranks() -> Ranks:
    """Join the process group that torchrun's environment describes; without one, be the only rank.

    NCCL on GPUs, gloo elsewhere.
    """
    # DeepSpeed builds and loads its operators with ninja, which lies beside a Python that nobody has "activated".
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    store = _store()
    store.set_timeout(TIMEOUT)
    dist.init_process_group(
        backend, timeout=TIMEOUT, store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)


def _store() -> dist.Store:
    """Where the ranks find each other: on the socket that the local launcher has bound for rank 0, elsewhere at the
    address that torchrun's environment names.

    Raises:
        JobError: another program has the port, or the ranks did not all come.
    """
    descriptor = os.environ.pop(STORE_DESCRIPTOR, None)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if descriptor is not None:
        listening = None if rank else int(descriptor)
        return dist.TCPStore(address, port, world_size, rank == 0, JOIN_TIMEOUT, master_listen_fd=listening)
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=JOIN_TIMEOUT))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise JobError(
                f"port {port}: in use by another program; end it, or have the launcher take another"
            ) from None
        raise JobError(f"the ranks did not meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): {error}") from None
    return store


def leave_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End this rank with `status`, whatever threads of the process group are still there.

    Python's own way out destroys C++ objects under running threads, which now and then aborts a finished rank
    (SIGABRT, "terminate called without an active exception") and turns its status into another one.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
