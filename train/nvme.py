"""Optimizer states on NVMe: what ZeRO-3 updates at once is read, updated and written again (ZeRO-Infinity, arXiv
2104.07857)."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from crossguard.configs.errors import UserError
from crossguard.train.ranks import Ranks

WHERE = "zero.deepspeed.zero_optimization.offload_optimizer"
# Weights, two moments and gradients.
WITHOUT_AVERAGES = 4
# Elements that are updated at once, unless a parameter has more of them. Buffers are of that size: with DeepSpeed's 1e9
# most models would lie in them as a whole.
SUB_GROUP_SIZE = 100_000_000


def nvme_settings(zero: Mapping[str, Any], run_dir: str, *, averages: bool) -> dict[str, Any]:
    """DeepSpeed's block `zero_optimization` for optimizer states on NVMe.

    DeepSpeed's files have the same names in every job: under `nvme_path` each run directory gets a folder of its own.

    Raises:
        UserError: DeepSpeed gets fewer buffers than it needs.
    """
    offload = _given(zero["offload_optimizer"])
    run = hashlib.sha256(str(Path(run_dir).absolute()).encode()).hexdigest()[:16]
    # Of what is updated at once; also of what is read ahead and of what is being written.
    sets = 1 + bool(offload.get("pipeline_read")) + bool(offload.get("pipeline_write"))
    least = sets * (WITHOUT_AVERAGES + averages)
    buffers = int(offload.get("buffer_count", least))
    if buffers < least:
        raise UserError(f"{WHERE}.buffer_count={buffers}: so few do not do; leave it out, or say at least {least}")
    settings = {**offload, "buffer_count": buffers, "nvme_path": str(Path(offload["nvme_path"]) / f"crossguard-{run}")}
    return {"sub_group_size": SUB_GROUP_SIZE, **_given(zero), "offload_optimizer": settings}


def _given(block: Mapping[str, Any]) -> dict[str, Any]:
    """Without what DeepSpeed would take as not said."""
    return {name: value for name, value in block.items() if value not in (None, "auto")}


def _build_operator() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    why = "libaio is missing"
    if AsyncIOBuilder().is_compatible(verbose=False):
        try:
            AsyncIOBuilder().load(verbose=False)
            return
        except Exception as error:  # Of the compiler, of torch, of DeepSpeed where it looks for CUDA: anything.
            why = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(
        f"{WHERE}.device=nvme: DeepSpeed cannot build an operator for it ({why}); it needs a C++ compiler, ninja,"
        " libaio with its headers (Debian: g++, libaio-dev) and beside a GPU the CUDA toolkit; install them, or use cpu"
    )


def open_swap_folder(
    zero: Mapping[str, Any], optimizer: torch.optim.Optimizer, ranks: Ranks, *, averages: bool
) -> None:
    """Where states will lie on NVMe, if they do: a folder of the run on every host, without the files of a killed one,
    which may have been of more ranks. All ranks call it.

    Raises:
        UserError: DeepSpeed cannot build its operator here, could not write there, or not lock its buffers into memory.
            It does not look at what becomes of a write, and without buffers it aborts.
    """
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return
    ranks.say(
        "train: loading DeepSpeed's operator for NVMe, which it first builds for minutes; where a build was killed, it"
        " waits until the file `lock` is removed from async_io in ~/.cache/torch_extensions"
    )
    folder = Path(offload["nvme_path"])
    if ranks.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    hosts = ranks.gather(platform.node())  # Of hosts that share a file system none removes what another has made.
    groups = [[getattr(part, "ds_numel", part.numel()) for part in group["params"]] for group in optimizer.param_groups]
    states = 4 * (WITHOUT_AVERAGES + averages) * sum(map(sum, groups)) // ranks.world_size
    largest = max(min(sum(sizes), zero["sub_group_size"] * ranks.world_size + max(sizes)) for sizes in groups)
    error: UserError | None = None
    try:
        _build_operator()
        _try_folder(folder, states * hosts.count(platform.node()))
        _try_lock(int(4 * offload["buffer_count"] * largest / ranks.world_size))
    except UserError as failed:
        error = failed
    ranks.agree(error)


def _try_folder(folder: Path, size: int) -> None:
    """Write as DeepSpeed does; `size` bytes must be free."""
    place = f"{WHERE}.nvme_path={folder.parent}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_WRONLY | os.O_DIRECT))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{place}: {error.strerror}; name a folder that can be written to, of a file system that does so directly"
            " (O_DIRECT)"
        ) from error
    if free < size:
        raise UserError(
            f"{place}: {free >> 20} MiB are free there and optimizer states take {size >> 20}; free some, or name"
            " another folder"
        )


def _try_lock(size: int) -> None:
    """Lock memory as DeepSpeed does; without privileges the system sets a limit, often of 8 MiB."""
    memory = mmap.mmap(-1, max(size, 1))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        raise UserError(
            f"{WHERE}.device=nvme: {size >> 20} MiB of buffers cannot be locked into memory; raise the limit"
            " (`ulimit -l`), or lower zero.deepspeed.zero_optimization.sub_group_size"
        )


@contextmanager
def in_memory(zero: Any, group: int, *, changed: bool = False) -> Iterator[bool]:
    """Inside, what DeepSpeed's ZeRO-3 optimizer updates at once is in memory.

    Yields:
        Whether it lies on NVMe otherwise; there it is written again if it was `changed`.
    """
    if not zero._swappable_optimizer_subgroup(group):
        yield False
        return
    zero._optimizer_states_and_gradient_swap_in(group)
    state = zero.optimizer.state[zero.fp32_partitioned_groups_flat[group]]
    made_inside = not state
    yield True
    if changed or (made_inside and state):
        zero._writeback_swap_state(group, write_opt_state=True, write_gradients=False)
    else:
        zero._release_swap_buffers(group)


def is_on_nvme(zero: Any) -> bool:
    """Whether anything of a DeepSpeed optimizer lies there."""
    groups = range(len(zero.fp16_groups)) if getattr(zero, "swap_optimizer", False) else ()
    return any(zero._swappable_optimizer_subgroup(group) for group in groups)


def remove_swap_files(zero: Any) -> None:
    """This rank's, with the folders above it that are left empty, up to that of the run."""
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return
    folder = Path(swapper.swap_folder)
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # The other ranks of this host have theirs there.
        for above in list(folder.parents)[:3]:  # optimizer, zero_stage_3, crossguard-…
            above.rmdir()
