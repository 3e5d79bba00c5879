"""A file of tensors in the safetensors format, hashed while it is written.

The safetensors package copies every tensor, holds Python's lock meanwhile, and cannot hash what it writes: reading the
file once more would cost as much as writing it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from blake3 import blake3

from crossguard.train.checkpoint_manifest import Entry

# Small enough to be still in the processor's cache when it is written after it was hashed.
BLOCK = 1 << 20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Entry:
    """Write tensors of one axis, of any device, and flush them to the disk; returns the file's size and hash.

    Raises:
        OSError: the disk refuses.
    """
    # Widest types first: each then lies at a multiple of its size.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hasher = blake3()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            hasher.update(part)
            file.write(part)
        for name in ordered:
            content = tensors[name].cpu().view(torch.uint8).numpy().data
            for start in range(0, len(content), BLOCK):
                hasher.update(content[start : start + BLOCK])
                file.write(content[start : start + BLOCK])
        file.flush()
        os.fsync(file.fileno())
        return {"size": file.tell(), "blake3": hasher.hexdigest()}
