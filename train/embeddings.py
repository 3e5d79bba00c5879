"""What the frozen part of the model says of every post, computed once by all ranks and kept in files
(`train.cache_embeddings`).

FOLDER/KEY/SHARD-00003.DIGEST.safetensors    the key stands for weights, settings and the encoding of posts

Blocks are dealt to the ranks; each is published when it is whole, so that a killed job goes on with the next one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import torch
from blake3 import blake3

from crossguard.configs.errors import JobError, Preempted, UserError
from crossguard.configs.progress import progress
from crossguard.configs.schema import Config
from crossguard.data.loading.embeddings import (
    COUNTS,
    LABELED,
    VALUES,
    Arrays,
    Block,
    Embeddings,
    blocks_of,
    find_blocks,
    is_whole,
    label_digest,
    shard_name,
    write_block,
)
from crossguard.data.loading.loader import BatchMaker, Delivery, Task
from crossguard.data.loading.plan import TRAIN_SPLIT
from crossguard.data.loading.reader import ShardReader
from crossguard.data.loading.workers import results
from crossguard.data.shards.folder import ShardFolder
from crossguard.train import preemption
from crossguard.train.encode import PostEncoder
from crossguard.train.engine import Engine
from crossguard.train.evaluation.scoring import filler
from crossguard.train.fragments import gathered, persistent_buffers
from crossguard.train.models import Classifier, without_pretrained
from crossguard.train.models.embedding import FRONTS, Seam

# Raise it whenever the same model says other numbers of the same post than before.
VERSION = 2


class EmbeddingCache:
    """The embeddings of any split by one model.

    Args:
        config: the recipe; its run directory holds them unless it names another folder.
        engine: the model, with the weights that it will keep where it is frozen.
        encode: of the posts.
        shards: all that the job reads. In a folder of the run's own nothing is kept of others: embeddings are personal
            data as the posts are.

    Raises:
        UserError: no encoder is frozen.
    """

    def __init__(self, config: Config, engine: Engine, encode: PostEncoder, shards: Sequence[ShardFolder]):
        self.config, self.engine = config, engine
        self.model = cast(Classifier, engine.model)
        self.seam = Seam.of(self.model)
        self.encode = encode.only(self.seam.modalities)
        # What the model reads beside the embeddings.
        self.beside = encode.only([name for name in config.model.modalities if name not in self.seam.modalities])
        self.root = Path(config.train.embeddings_dir or Path(config.run_dir) / "embeddings")
        self.folder = self.root / self._key()
        own = {shard_name(shard) for folder in shards for shard in folder.manifest.shards}
        engine.ranks.on_first(lambda: self._open(own))

    def of(self, reader: ShardReader, rows: np.ndarray | None = None) -> Embeddings:
        """Those of a split; what is missing is computed. All ranks call it.

        Args:
            reader: the split.
            rows: those that will be asked for; by default all.

        Raises:
            JobError: the disk refuses them.
            UserError: no post can be read.
            Preempted: a rank was asked to stop; what is computed stays.
        """
        # One look at the folders decides for all.
        wanted, found = self.engine.ranks.on_first(lambda: (_wanted(reader, rows), find_blocks(self.folder)))
        found = self._without_damaged({block: found[block] for block in map(_name, wanted) if block in found})
        missing = [block for block in wanted if _name(block) not in found]
        if missing:
            found |= self._compute(reader, missing)
        if not found:
            raise UserError(f"{reader.place}: not one post of split '{reader.split}' can be read")
        return Embeddings(blocks_of(reader), found, beside=self.beside.reads_posts)

    def _open(self, own: set[str]) -> None:
        """Rank 0: the folder, without what this run will not read again, nor what a killed one has half written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config.train.embeddings_dir:
            return
        for path in self.root.iterdir():
            if path != self.folder:
                shutil.rmtree(path)
        for path in self.folder.iterdir():
            if path.name.partition("-")[0] not in own:
                path.unlink()

    def _without_damaged(self, found: dict[tuple[str, int], Path]) -> dict[tuple[str, int], Path]:
        """Those whose content is what their name says; each rank reads its share of them."""
        ranks = self.engine.ranks
        mine = sorted(found)[ranks.rank :: ranks.world_size]
        damaged = [block for block in mine if not is_whole(found[block])]
        for block in damaged:
            found[block].unlink()
        damaged = [block for each in ranks.gather(damaged) for block in each]
        for block in damaged:
            ranks.say(f"warning: {found[block]}: altered, its content has another hash; it is computed again")
        return {block: path for block, path in found.items() if block not in damaged}

    def _compute(self, reader: ShardReader, missing: Sequence[Block]) -> dict[tuple[str, int], Path]:
        """Embed the posts of the missing blocks, on all ranks in step: under ZeRO-3 a pass gathers weights from all."""
        ranks, size, workers = self.engine.ranks, self.config.evaluation.batch_size, self.config.train.num_workers
        lengths = reader.column("text_bytes").astype(np.int64)
        turns = [
            [(block, rows) for block in missing[rank :: ranks.world_size] for rows in _batches(block, lengths, size)]
            for rank in range(ranks.world_size)
        ]
        mine = turns[ranks.rank]
        written = {}
        found = _Found(mine[0][0]) if mine else None
        maker, preload = BatchMaker(reader, self.encode, None), type(self.encode).__module__
        # They are disguised as in training, wherever they come there.
        tasks = (Task(rows, np.zeros_like(rows) if reader.split == TRAIN_SPLIT else None) for _, rows in mine)
        deliveries = results(maker, tasks, workers, preload=preload)
        posts = sum(block.size for block in missing)
        self.engine.train(False)
        with (
            closing(deliveries),
            progress(f"embeddings of {reader.split}", posts, "posts", speak=ranks.is_first) as shown,
        ):
            for turn in range(max(map(len, turns))):
                if ranks.any(preemption.asked()):
                    raise Preempted("train: stopped before all embeddings were computed; start again and it goes on")
                delivery = next(deliveries, None)
                said = self._embed(delivery)
                if delivery is not None and found is not None:
                    found.add(delivery, said)
                    following = mine[turn + 1][0] if turn + 1 < len(mine) else None
                    if following != found.block:
                        if (arrays := found.arrays()) is not None:
                            written[_name(found.block)] = self._write(found.block, arrays)
                        found = _Found(following) if following is not None else None
                shown.advance(sum(len(of_rank[turn][1]) for of_rank in turns if turn < len(of_rank)))
        return {block: path for each in ranks.gather(written) for block, path in each.items()}

    @torch.no_grad()
    def _embed(self, delivery: Delivery | None) -> Arrays:
        """One pass; of an empty post where there is none."""
        if delivery is not None and delivery.error is not None:
            raise delivery.error
        batch = delivery.batch if delivery is not None else None
        arrays = self.engine.deepspeed((batch or filler(self.encode)).to(self.engine.ranks.device), self.seam)
        return {name: array.cpu().numpy() for name, array in arrays.items()}

    def _write(self, block: Block, arrays: Arrays) -> Path:
        try:
            return write_block(self.folder, block, arrays)
        except OSError as error:
            raise JobError(
                f"{self.folder}: cannot write embeddings ({error.strerror}); make room, or name another folder with"
                " train.embeddings_dir"
            ) from None

    def _key(self) -> str:
        """A hash of all that decides an embedding, beside the post."""
        described = asdict(without_pretrained(self.config.model, self.model))
        settings = {group: described[group] for group in sorted({FRONTS.get(name, name) for name in self.seam.frozen})}
        for values in settings.values():  # Where it lies decides nothing; the tokenizer is part of the encoding.
            values.pop("tokenizer", None)
            values.get("config", {}).pop("_name_or_path", None)
        decides = {
            "version": VERSION,
            "encode": self.encode.fingerprint,
            "attacks": asdict(self.encode.attacks) if self.encode.attacks else None,
            "seam": asdict(self.seam),
            "precision": self.config.train.precision,
            "settings": settings,
            "weights": self._weights_hash(),
        }
        return blake3(json.dumps(decides, sort_keys=True).encode()).hexdigest(16)

    def _weights_hash(self) -> str:
        """Of every parameter and buffer of the frozen part, the same for any number of ranks and any ZeRO stage."""
        tensors = dict(self.model.named_parameters()) | dict(persistent_buffers(self.model))
        hasher = blake3()
        for name in sorted(name for name in tensors if name.partition(".")[0] in self.seam.frozen):
            with gathered(tensors[name]):
                hasher.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}".encode())
                hasher.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return str(self.engine.ranks.broadcast(hasher.hexdigest()))


class _Found:
    """What is known of the posts of a block, in whatever order they come."""

    def __init__(self, block: Block):
        self.block = block
        self.labeled = np.zeros(block.size, dtype=np.uint64)
        # Name -> row of the block -> what is known of it.
        self.parts: dict[str, dict[int, np.ndarray]] = {}

    def add(self, delivery: Delivery, arrays: Arrays) -> None:
        """The posts of a batch and what the model says of them; nothing where none of them could be read."""
        batch = delivery.batch
        if batch is None:
            return
        labels = batch.labels.numpy()
        rows = [row - self.block.start for row in delivery.rows]
        for number, row in enumerate(rows):
            self.labeled[row] = label_digest(batch.ids[number], batch.languages[number], labels[number])
        for name, array in arrays.items():
            counts = arrays.get(name.removesuffix(VALUES) + COUNTS) if name.endswith(VALUES) else None
            each = array if counts is None else np.split(array, np.cumsum(counts)[:-1])
            self.parts.setdefault(name, {}).update(zip(rows, each, strict=True))

    def arrays(self) -> Arrays | None:
        """All of the block in the order of its rows, zeros where a post could not be read; None where none could."""
        if not self.parts:
            return None
        every: Arrays = {LABELED: self.labeled}
        for name, parts in self.parts.items():
            example = next(iter(parts.values()))
            if name.endswith(VALUES):
                every[name] = np.concatenate([parts[row] for row in sorted(parts)])
            else:
                none = np.zeros_like(example)
                every[name] = np.stack([parts.get(row, none) for row in range(self.block.size)])
        return every


def _name(block: Block) -> tuple[str, int]:
    return block.shard, block.number


def _wanted(reader: ShardReader, rows: np.ndarray | None) -> list[Block]:
    """The blocks that hold any of the rows; none of a shard that is not there."""
    asked = np.setdiff1d(np.arange(len(reader)) if rows is None else rows, reader.missing_rows())
    return [
        block
        for block in blocks_of(reader)
        if np.searchsorted(asked, block.start) < np.searchsorted(asked, block.start + block.size)
    ]


def _batches(block: Block, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows of a block in batches of about one length; the same on any number of ranks."""
    rows = block.rows[np.argsort(-lengths[block.rows], kind="stable")]
    return [rows[start : start + size] for start in range(0, len(rows), size)]
