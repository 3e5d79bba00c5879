"""How many posts a forward pass takes: as configured, or fewer where so many have not fitted into a rank's memory.

A rank that runs out of memory cannot try again by itself: the others are in the same step, waiting for it. So it writes
down what to try next, and ends with a status by which the launcher knows that starting again will help.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossguard.configs.errors import JobError, OutOfMemory, UserError, is_out_of_memory
from crossguard.configs.schema import Config
from crossguard.data.loading.order import micro_batches
from crossguard.data.shards.files import write_atomic
from crossguard.train.ranks import Ranks

FILE_NAME = "micro_batch.json"


class MicroBatch:
    """The micro-batches of one start; all ranks construct it together.

    Raises:
        UserError: the ranks do not divide the batch, or the file is not crossguard's.
    """

    def __init__(self, config: Config, ranks: Ranks):
        train = config.train
        self._file = Path(config.run_dir) / FILE_NAME
        self._rank = ranks.rank
        # A size that did not fit says nothing about a start that differs in one of these.
        self._tried = {
            "world_size": ranks.world_size,
            "zero_stage": config.zero.stage,
            "micro_batch_size": train.micro_batch_size,
        }
        self.size, self.accumulation = micro_batches(train.batch_size, ranks.world_size, ranks.on_first(self._allowed))
        if self.size < micro_batches(train.batch_size, ranks.world_size, train.micro_batch_size)[0]:
            ranks.say(
                f"train: {self.size} posts in a micro-batch, since train.micro_batch_size={train.micro_batch_size} did "
                f"not fit into memory (see {self._file}); the batch is the same"
            )

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Around a step.

        Raises:
            OutOfMemory: it does not fit into memory; the next start takes micro-batches of at most half the size.
            JobError: the same, and there is no smaller size.
        """
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = self._halve()
            raise OutOfMemory(
                f"train: out of memory with {self.size} posts in a micro-batch; the next start takes {smaller}, in the "
                "same batch"
            ) from error

    def _halve(self) -> int:
        """Write down the size for the next start."""
        share = self.size * self.accumulation
        smaller = next((size for size in range(self.size // 2, 0, -1) if share % size == 0), 0)
        if not smaller:
            raise JobError(
                "train: out of memory with a single post in a micro-batch; use a higher zero stage, "
                "train.precision=bf16, shorter texts (model.text.max_length) or a smaller model"
            )
        try:
            write_atomic(self._file, json.dumps({**self._tried, "use": smaller}).encode() + b"\n")
        except OSError as failed:
            raise JobError(
                f"{self._file}: cannot write ({failed.strerror}) that memory is short; set "
                f"train.micro_batch_size={smaller}"
            ) from failed
        return smaller

    def _allowed(self) -> int:
        """What is configured, or what an earlier start has written down for the same."""
        configured = self._tried["micro_batch_size"]
        if not self._file.is_file():
            return configured
        try:
            written = json.loads(self._file.read_bytes())
            use = int(written.pop("use"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._file}: not what crossguard writes; remove it") from None
        return min(configured, use) if written == self._tried and use > 0 else configured
