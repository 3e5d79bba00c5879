"""Deterministic mode: the same operations give the same bits each time, on the same number of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from crossguard.configs.errors import UserError

# The workspaces with which cuBLAS is deterministic; it reads them when it is first used.
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")
_SAID = " does not have a deterministic implementation"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, and only if `wanted`, torch uses deterministic operations alone.

    Raises:
        UserError: an operation of the model has no deterministic form.
    """
    if not wanted:
        yield
        return
    if os.environ.get(CUBLAS) not in CUBLAS_DETERMINISTIC:
        os.environ[CUBLAS] = CUBLAS_DETERMINISTIC[0]
    cudnn, settings = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Which algorithm of a convolution is the fastest is not always answered alike.
    cudnn.benchmark = False
    # Otherwise DeepSpeed's buffers, of which most is never used, would be filled: gigabytes.
    settings.fill_uninitialized_memory = False
    try:
        yield
    except Exception as error:
        if operation := _without_deterministic_form(error):
            raise UserError(
                f"train.deterministic=true: {operation} has no deterministic form here; do without it in the model or "
                "loss, or set train.deterministic=false"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, settings.fill_uninitialized_memory = before[1:]


def _without_deterministic_form(error: BaseException | None) -> str:
    """The operation that torch has refused, which a part of the user's own may stand in between of; or nothing."""
    while error is not None:
        before, said, _ = str(error).partition(_SAID)
        if said and isinstance(error, RuntimeError):
            return before.splitlines()[-1]
        error = error.__cause__
    return ""
