"""A copy of tensors in the host's memory, which training cannot change while it is written to the disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Every tensor starts at a multiple of it: a line of the processor's cache.
ALIGNMENT = 64


class HostCopy:
    """Memory that is kept from one copy to the next; page-locked where there is a GPU, for the speed of its bus."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies of tensors of one axis; they hold until the next call."""
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = slice(end, end + tensor.nbytes)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if end > self._memory.numel():
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = {name: self._memory[place].view(tensors[name].dtype) for name, place in places.items()}
        for name, copy in copies.items():
            copy.copy_(tensors[name], non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies
