"""Optimizer states on NVMe: what ZeRO-3 updates at once is read, updated and written again (ZeRO-Infinity, arXiv
2104.07857)."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError


def nvme_settings(offload: Mapping[str, Any], run_dir: str) -> dict[str, Any]:
    """DeepSpeed's block `offload_optimizer` for states on NVMe.

    DeepSpeed's files have the same names in every job: under `nvme_path` each run directory gets a folder of its own.

    Raises:
        UserError: DeepSpeed cannot build its operator here.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "zero.deepspeed.zero_optimization.offload_optimizer.device=nvme: DeepSpeed builds an operator for it,"
            " which needs a C++ compiler, ninja and libaio with its headers (Debian: g++, libaio-dev); install them,"
            " or use cpu"
        )
    run = hashlib.sha256(str(Path(run_dir).absolute()).encode()).hexdigest()[:16]
    # Weights, two moments, averages and gradients are in memory at once; also those read ahead and those being written.
    sets = 1 + bool(offload.get("pipeline_read")) + bool(offload.get("pipeline_write"))
    return {"buffer_count": 5 * sets, **offload, "nvme_path": str(Path(offload["nvme_path"]) / f"crossguard-{run}")}


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
