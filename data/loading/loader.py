"""Loaders: from rows to batches, for training (the sample order, step by step) and for evaluation (each row once)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from crossguard.configs.errors import CrossguardError, JobError
from crossguard.data.curation.governance import refused_at_read
from crossguard.data.loading.decode import MediaError
from crossguard.data.loading.embeddings import Embeddings
from crossguard.data.loading.encoded import NO_POSITION, Encode, EncodedSample, stack
from crossguard.data.loading.order import SampleOrder, micro_batches
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.loading.redirects import Redirects
from crossguard.data.loading.sample import RawSample
from crossguard.data.loading.workers import results, tasks_ahead

if TYPE_CHECKING:
    from crossguard.data.loading.collate import Batch

# So many unreadable samples in a row are no accident.
MAX_REDIRECTS = 1000

# Called in the training process for each sample that could not be used, with the fields of a line of quarantine.jsonl.
OnRefused = Callable[[dict[str, Any]], None]
# A sample and the row that it lies in.
Found = tuple[int, EncodedSample]


@dataclass(frozen=True)
class Task:
    """The samples of one batch."""

    # int64[B]
    rows: np.ndarray
    # int64[B] in the sample order; None outside training.
    positions: np.ndarray | None = None
    step: int | None = None
    # int64[…]: rows that were refused since the loader was made.
    refused: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Made:
    """What a worker makes of a task. Errors travel as values, to be raised where the training can report them."""

    # Of `stack`; None when none of the samples could be used.
    arrays: dict[str, Any] | None
    refused: list[dict[str, Any]] = field(default_factory=list)
    error: CrossguardError | None = None
    # The rows of the samples in `arrays`.
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Delivery:
    """The same in the training process."""

    batch: Batch | None
    refused: list[dict[str, Any]]
    error: CrossguardError | None
    rows: list[int]

    def accept(self, on_refused: OnRefused) -> Batch | None:
        """The batch, after its refused samples were reported; None when none of its samples could be used."""
        for record in self.refused:
            on_refused(record)
        if self.error is not None:
            raise self.error
        return self.batch


class BatchMaker:
    """Task -> Made: reads, decodes, encodes and stacks. Sent to the workers.

    With `redirects`, a sample that cannot be used is replaced as if it had been refused before; without, it is left
    out. With `embeddings`, of a post only its labels are read, whether it may be used at all, and what they leave out.
    """

    def __init__(
        self, reader: ShardReader, encode: Encode, redirects: Redirects | None, embeddings: Embeddings | None = None
    ):
        self.reader = reader
        self.encode = encode
        self.redirects = redirects
        self.embeddings = embeddings

    def __getitem__(self, task: Task) -> Made:
        refused: list[dict[str, Any]] = []
        positions = np.full(len(task.rows), NO_POSITION) if task.positions is None else task.positions
        try:
            found = [self._sample(int(row), int(p), task, refused) for row, p in zip(task.rows, positions, strict=True)]
        except CrossguardError as error:
            return Made(None, refused, error)
        used = [one for one in found if one is not None]
        if not used:
            return Made(None, refused)
        rows, samples = [row for row, _ in used], [sample for _, sample in used]
        arrays = stack(samples, **self.encode.layout)
        if self.embeddings is not None:
            arrays["embeddings"] = self.embeddings.take(rows)
        return Made(arrays, refused, rows=rows)

    def received(self, made: Made) -> Delivery:
        """The batch, in memory of its own."""
        from crossguard.data.loading.collate import Batch  # torch, which workers never import

        batch = None if made.arrays is None else Batch.of(made.arrays)
        return Delivery(batch, made.refused, made.error, made.rows)

    def _sample(self, row: int, position: int, task: Task, refused: list[dict[str, Any]]) -> Found | None:
        place = {} if task.step is None else {"step": task.step, "position": position}
        sample = self._read(row, position, place, refused)
        if sample is None and self.redirects is not None:
            row, sample = self._redirected(row, position, self.redirects.with_refused(task.refused), place, refused)
        if sample is None:
            return None
        sample.position = position
        return row, sample

    def _redirected(
        self, row: int, position: int, redirects: Redirects, place: dict[str, int], refused: list[dict[str, Any]]
    ) -> Found:
        """The first sample that can be used of those that `row` is redirected to."""
        bad = row
        for _ in range(MAX_REDIRECTS):
            redirects = redirects.with_refused(np.array([bad]))
            bad = int(redirects.resolve(np.array([row]))[0])
            sample = self._read(bad, position, place, refused)
            if sample is not None:
                return bad, sample
        raise JobError(
            f"{self.reader.place}: {MAX_REDIRECTS} samples of split '{self.reader.split}' in a row cannot be used "
            f"(position {place['position']}); quarantine.jsonl gives the reasons"
        )

    def _read(
        self, row: int, position: int, place: dict[str, int], refused: list[dict[str, Any]]
    ) -> EncodedSample | None:
        stage = "train" if place else "evaluate"
        if (known := self._embedded(row, position)) is not None:
            return known
        try:
            raw = self.reader.read(row)
        except SampleError as error:
            name, reason = {"key": error.key}, error.reason
        else:
            name = {"id": raw.id}
            # Again at every reading: a job may run for weeks, and shards may come from elsewhere.
            rule = refused_at_read(raw.post, time.time())
            if rule is None:
                try:
                    sample = self.encode(raw, position)
                    if self.embeddings is None:
                        return sample
                    rule = "it could not be read when embeddings were computed; remove them and start again"
                except MediaError as error:
                    rule = str(error)
            reason = rule
        refused.append({**name, "row": row, "split": self.reader.split, "stage": stage, **place, "reason": reason})
        return None

    def _embedded(self, row: int, position: int) -> EncodedSample | None:
        """The labels of a post whose embedding is there, and what is read beside it; None where all of it is to be
        read, if only to say what is wrong with it."""
        if self.embeddings is None or not self.embeddings.has(row):
            return None
        try:
            beside = self.embeddings.beside
            raw = self.reader.read(row) if beside else RawSample(self.reader.read_head(row).post)
            if refused_at_read(raw.post, time.time()) is not None:
                return None
            sample = self.encode(raw, position)
        except (SampleError, MediaError):
            return None
        return sample if self.embeddings.is_of(row, sample) else None


class TrainLoader:
    """This rank's share of the steps `start_step` … `end_step`, both included.

    Iterating yields, for each step, the list of its micro-batches: together the rank's contiguous slice of the global
    batch. Neither the number of ranks nor of workers changes the order; they only cut it up.

    Args:
        reader: the split.
        order: decides what comes when.
        encode: makes numbers of a post; runs in the workers.
        rank, world_size: which slice.
        micro_batch_size: upper bound of samples in a micro-batch.
        num_workers: processes that read; 0 reads here.
        start_step, end_step: first and last step.
        on_refused: is told of every sample that could not be used, when its batch is delivered.
        embeddings: stand in for what is in the posts.

    Raises:
        UserError: the ranks do not divide the batch; while iterating, an index is damaged.
        JobError: while iterating, the storage fails.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        encode: Encode,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        num_workers: int,
        start_step: int,
        end_step: int,
        on_refused: OnRefused,
        embeddings: Embeddings | None = None,
    ):
        self.micro_batch_size, self.accumulation = micro_batches(order.batch_size, world_size, micro_batch_size)
        self.order = order
        self.rank = rank
        self.num_workers = num_workers
        self.steps = range(start_step, end_step + 1)
        self.on_refused = on_refused
        self.maker = BatchMaker(reader, encode, order.redirects, embeddings)
        self.known_refused = order.redirects.refused

    def __len__(self) -> int:
        """Steps to deliver."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        # A whole step is prepared while the one before it computes.
        ahead = tasks_ahead(self.accumulation, self.num_workers)
        preload = type(self.maker.encode).__module__
        with closing(results(self.maker, self._tasks(), self.num_workers, ahead=ahead, preload=preload)) as deliveries:
            for _ in self.steps:
                accepted = (delivery.accept(self.on_refused) for delivery in islice(deliveries, self.accumulation))
                yield [batch for batch in accepted if batch is not None]

    def _tasks(self) -> Iterator[Task]:
        share = self.micro_batch_size * self.accumulation
        for step in self.steps:
            rows, positions = self.order.rows(step), self.order.positions(step)
            refused = np.setdiff1d(self.order.redirects.refused, self.known_refused, assume_unique=True)
            for start in range(self.rank * share, (self.rank + 1) * share, self.micro_batch_size):
                micro = slice(start, start + self.micro_batch_size)
                yield Task(rows[micro], positions[micro], step, refused)


class EvalLoader:
    """Each of the given rows once, in batches of about one length, the longest first: what does not fit into memory
    fails at once.

    A sample that cannot be used is left out and reported.

    Args:
        reader: the split.
        rows: this rank's rows, int[…].
        encode: makes numbers of a post; runs in the workers.
        batch_size: posts in a batch; the last may hold fewer.
        num_workers: processes that read; 0 reads here.
        on_refused: is told of every sample that could not be used.
        embeddings: stand in for what is in the posts.
    """

    def __init__(
        self,
        reader: ShardReader,
        rows: np.ndarray,
        encode: Encode,
        batch_size: int,
        *,
        num_workers: int,
        on_refused: OnRefused,
        embeddings: Embeddings | None = None,
    ):
        rows = np.asarray(rows, dtype=np.int64)
        # Bytes of text stand in for tokens: the order of the batches changes no score.
        longest_first = np.argsort(-reader.column("text_bytes")[rows].astype(np.int64), kind="stable")
        self.rows = rows[longest_first]
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_refused = on_refused
        self.maker = BatchMaker(reader, encode, None, embeddings)

    def __len__(self) -> int:
        """Batches to deliver, at most."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Generator[Batch, None, None]:
        starts = range(0, len(self.rows), self.batch_size)
        tasks = (Task(self.rows[start : start + self.batch_size]) for start in starts)
        preload = type(self.maker.encode).__module__
        with closing(results(self.maker, tasks, self.num_workers, preload=preload)) as deliveries:
            for delivery in deliveries:
                batch = delivery.accept(self.on_refused)
                if batch is not None:
                    yield batch
