"""Work for the tests of the processes that read, which import it by name."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np


class Arrays:
    """Number -> arrays of many sizes and memory layouts that hold it; negative numbers go wrong."""

    def __getitem__(self, task: int) -> dict[str, Any]:
        if task == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if task == -2:
            raise ValueError("unexpected")
        square = np.full((task % 50 + 1, 7, 3), task, dtype=np.int32)
        return {"task": task, "none": np.empty(0), "square": square, "turned": square.transpose(2, 1, 0)[::-1]}

    def received(self, result: dict[str, Any]) -> dict[str, Any]:
        return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in result.items()}
