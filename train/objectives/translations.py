"""Pairs of translations: JSON lines in a file, so many of them in each step, a pure function of seed and step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossguard.configs.errors import UserError
from crossguard.configs.schema.loss import AlignmentConfig
from crossguard.data.loading.collate import Batch
from crossguard.data.loading.encoded import pad_texts
from crossguard.data.loading.permutation import Permutation, derive_key
from crossguard.train.encode import PostEncoder
from crossguard.train.ranks import Ranks

MOST_ERRORS = 20


@dataclass(frozen=True)
class PairFile:
    """Where each pair lies in the file; texts are read when their turn comes."""

    path: Path
    # int64[pairs + 1]: where each line begins, then the end.
    starts: np.ndarray
    sha256: str

    @classmethod
    def open(cls, config: AlignmentConfig) -> PairFile:
        """Read all of the file once.

        Raises:
            UserError: it cannot be read, a line is no pair, or they are fewer than a step takes; names every such line.
        """
        path = Path(str(config.pairs))
        starts, hasher = [0], hashlib.sha256()
        wrong: list[str] = []
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    hasher.update(line)
                    starts.append(starts[-1] + len(line))
                    if (reason := _wrong_with(line)) and len(wrong) < MOST_ERRORS:
                        wrong.append(f"{path}:{number}: {reason}")
        except OSError as error:
            raise UserError(f"train.alignment.pairs={path}: cannot be read ({error.strerror})") from None
        if wrong:
            raise UserError("\n".join(wrong))
        if len(starts) <= config.batch_size:
            raise UserError(
                f"train.alignment.pairs={path}: {len(starts) - 1} pairs, and a step takes {config.batch_size};"
                " lower train.alignment.batch_size"
            )
        return cls(path, np.array(starts), hasher.hexdigest())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def texts(self, numbers: np.ndarray) -> list[str]:
        """The first texts of these pairs, then the second ones."""
        with self.path.open("rb") as file:
            lines = []
            for number in numbers.tolist():
                file.seek(self.starts[number])
                lines.append(json.loads(file.read(self.starts[number + 1] - self.starts[number])))
        return [line[side] for side in "ab" for line in lines]


class Translations:
    """The pairs of each step, and a rank's slice of them as tokens.

    Args:
        file: all pairs.
        size: pairs in a step, over all ranks.
        seed: decides which.
        encode: normalises, prefixes and tokenizes texts as those of posts.
    """

    def __init__(self, file: PairFile, size: int, seed: int, encode: PostEncoder):
        self._file, self._size, self._seed, self._encode = file, size, seed, encode

    def of_step(self, step: int) -> np.ndarray:
        """int64[size]: all pairs once, in an order of their own each time; what does not fill a step is left out."""
        steps = len(self._file) // self._size
        epoch, place = divmod(step - 1, steps)
        order = Permutation(len(self._file), derive_key("pairs", self._seed, epoch))
        return order(np.arange(place * self._size, (place + 1) * self._size))

    def attach(self, batch: Batch, step: int, ranks: Ranks) -> Batch:
        """The batch with this rank's pairs of the step: first texts, then second ones."""
        mine = slice_of(self._size, ranks)
        texts = self._file.texts(self.of_step(step)[mine.start : mine.stop])
        ids, mask = pad_texts([self._encode.tokens(text) for text in texts], self._encode.layout["pad_id"])
        return replace(batch, pair_ids=torch.from_numpy(ids), pair_mask=torch.from_numpy(mask))


def slice_of(size: int, ranks: Ranks) -> range:
    """Which of a step's pairs are this rank's; the ranks need not divide them."""
    return range(size * ranks.rank // ranks.world_size, size * (ranks.rank + 1) // ranks.world_size)


def _wrong_with(line: bytes) -> str:
    """What keeps a line from being a pair; nothing of its content."""
    try:
        pair: Any = json.loads(line)
    except ValueError:
        return "not valid JSON"
    if not isinstance(pair, dict):
        return "not an object"
    for name in ("id", "a", "b"):
        if not isinstance(pair.get(name), str) or not pair[name].strip():
            return f"{name}: missing, or not a text"
    return ""
