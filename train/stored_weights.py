"""The weights in a checkpoint, tensor by tensor, whole, and without DeepSpeed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from crossguard.configs.errors import UserError
from crossguard.train.checkpoint_folder import read_state
from crossguard.train.checkpoint_manifest import fragment_files
from crossguard.train.ema import AVERAGE
from crossguard.train.fragments import WEIGHT


class StoredWeights:
    """Every parameter (fp32) and buffer of a verified checkpoint.

    Where training keeps an average of the weights (`train.ema_decay`), a trained parameter is its average.

    Attributes:
        shapes: name -> the whole shape.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.shapes: dict[str, list[int]] = read_state(checkpoint)["shapes"]
        # (kind, name) -> start and key of each piece, and the file that it lies in.
        self._pieces: dict[tuple[str, str], list[tuple[int, str, Any]]] = defaultdict(list)
        for file in fragment_files(checkpoint):
            opened = safe_open(file, framework="pt")
            for key in opened.keys():  # noqa: SIM118
                kind, start, name = key.split(":", 2)
                self._pieces[kind, name].append((int(start), key, opened))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            UserError: the checkpoint is incomplete.
        """
        shape = torch.Size(self.shapes[name])
        pieces = self._pieces.get((AVERAGE, name)) or self._pieces.get((WEIGHT, name), [])
        parts = [(start, opened.get_tensor(key)) for start, key, opened in pieces]
        if sum(part.numel() for _, part in parts) != shape.numel():
            raise UserError(f"{self.checkpoint}: '{name}' is incomplete")
        whole = torch.empty(shape, dtype=parts[0][1].dtype if parts else None)
        for start, part in parts:
            whole.view(-1)[start : start + part.numel()] = part
        return whole


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of them.

    Raises:
        UserError: the checkpoint is incomplete.
    """
    stored = StoredWeights(checkpoint)
    return {name: stored.read(name) for name in stored.shapes}
