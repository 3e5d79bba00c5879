"""The loaders that are compared: ours, and its peers as their documentation shows them.

All give batches of the same posts, shuffled, with the same tokens and pixels of the same size, from two workers. Each
peer comes twice: with Pillow in its transform, as its documentation has it, and with our decoder.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Process
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from posts import BATCH, IMAGE_SIZE, MAX_TOKENS, POLICIES, POSTS, config
from torch.utils.data import DataLoader, Dataset, default_collate

from crossguard.configs.schema.encoders import TextEncoderConfig
from crossguard.data.loading.decode import decode_image
from crossguard.train.tokenizers import load_tokenizer

WORKERS = 2
ENDLESS = 10**9
Sample = dict[str, Any]


@dataclass
class Contender:
    """A loader. `passes` yields the batches of one pass after the other: an endless stream for those that need no
    pause between passes, else an iterator for each pass."""

    passes: Callable[[Path], Iterator[Iterator[Any]]]
    endless: bool = False


class Prepare:
    """Parse, tokenise and decode a post. `decode` gets the image as the peer hands it over."""

    def __init__(self, decode: Callable[[Any], np.ndarray]):
        self.decode = decode
        self.tokenizer = load_tokenizer(TextEncoderConfig(tokenizer="bytes"))

    def __call__(self, image: Any, text: str, post: Any) -> Sample:
        post = json.loads(post) if isinstance(post, (str, bytes)) else post
        labels = [post["labels"].get(name, np.nan) for name in POLICIES]
        return {
            "id": post["id"],
            "language": post["language"],
            "input_ids": torch.tensor(self.tokenizer.encode(text, MAX_TOKENS)),
            "image": torch.from_numpy(self.decode(image)),
            "labels": torch.tensor(labels, dtype=torch.float32),
        }


def with_pillow(image: bytes | Path | Image.Image) -> np.ndarray:
    """What torchvision's `Resize` does to a decoded image."""
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    resized = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.array(resized)


def with_ours(image: bytes | Path) -> np.ndarray:
    """Our decoder with our settings."""
    return decode_image(image if isinstance(image, bytes) else image.read_bytes(), IMAGE_SIZE).transpose(1, 2, 0)


def collate(samples: list[Sample]) -> Sample:
    """Torch's own collation, which stacks into shared memory, around padding."""
    texts = [sample.pop("input_ids") for sample in samples]
    batch = default_collate(samples)
    batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    batch["mask"] = batch["input_ids"] != 0
    return batch


def ours(folder: Path) -> Iterator[Iterator[Any]]:
    """The whole loader of training, in its planned order."""
    yield map(itemgetter(0), our_loader(folder, first_step=1))


def our_loader(folder: Path, first_step: int) -> Any:
    """`TrainLoader` of the benchmark's recipe, from `first_step` on."""
    from crossguard.data.loading.loader import TrainLoader
    from crossguard.data.loading.plan import open_folders, plan_training
    from crossguard.data.taxonomy import Taxonomy
    from crossguard.train.encode import PostEncoder

    recipe = config(folder)
    encode = PostEncoder(recipe.model, Taxonomy.from_config(recipe.taxonomy))
    reader, order = plan_training(recipe, open_folders(recipe), folder / "run", encode, first_step=first_step)
    return TrainLoader(
        reader,
        order,
        encode,
        rank=0,
        world_size=1,
        micro_batch_size=BATCH,
        num_workers=WORKERS,
        start_step=first_step,
        end_step=ENDLESS,
        on_refused=print,
    )


class RawFiles(Dataset[Sample]):
    """A plain map-style dataset: a file of each kind for each post."""

    def __init__(self, folder: Path, prepare: Prepare):
        self.images = sorted((folder / "raw").glob("*.jpg"))
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Sample:
        post = json.loads(self.images[number].with_suffix(".json").read_bytes())
        return self.prepare(self.images[number], post["text"], post)


def raw_files(decode: Callable[[Any], np.ndarray]) -> Contender:
    """https://docs.pytorch.org/tutorials/beginner/basics/data_tutorial.html"""

    def passes(folder: Path) -> Iterator[Iterator[Any]]:
        dataset = RawFiles(folder, Prepare(decode))
        yield from _passes(
            DataLoader(
                dataset,
                batch_size=BATCH,
                shuffle=True,
                num_workers=WORKERS,
                persistent_workers=True,
                collate_fn=collate,
                drop_last=True,
            )
        )

    return Contender(passes)


def webdataset(decode: Callable[[Any], np.ndarray]) -> Contender:
    """https://webdataset.github.io/webdataset/gettingstarted"""

    def passes(folder: Path) -> Iterator[Iterator[Any]]:
        import webdataset as wds

        prepare = Prepare(decode)
        shards = sorted(str(path) for path in (folder / "shards" / "train").glob("*.tar"))
        dataset = wds.WebDataset(shards, shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(1000)
        if decode is with_pillow:
            dataset = dataset.decode("pil")
        dataset = dataset.to_tuple("jpg", "txt", "json").map(
            lambda sample: prepare(sample[0], _text(sample[1]), sample[2])
        )
        dataset = dataset.batched(BATCH, partial=False, collation_fn=collate).repeat()
        yield iter(wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS))

    return Contender(passes, endless=True)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def import_streaming() -> ModuleType:
    """mosaicml-streaming, without its ready-made sets of images and videos, which need a torchvision that fits torch."""
    for name in ("streaming.vision", "streaming.multimodal", "streaming.text"):
        sys.modules.setdefault(name, ModuleType(name))
    import streaming

    return streaming


def mosaic(decode: Callable[[Any], np.ndarray]) -> Contender:
    """https://docs.mosaicml.com/projects/streaming/en/stable/getting_started/main_concepts.html"""

    def passes(folder: Path) -> Iterator[Iterator[Any]]:
        streaming = import_streaming()
        prepare = Prepare(decode)

        class Posts(streaming.StreamingDataset):
            def __getitem__(self, number: int) -> Sample:
                sample = super().__getitem__(number)
                return prepare(sample["image"], sample["text"], sample["post"])

        encoding = "jpeg" if decode is with_pillow else "bytes"
        dataset = Posts(local=str(folder / f"mds-{encoding}"), shuffle=True, batch_size=BATCH)
        yield from _passes(
            DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True, collate_fn=collate)
        )

    return Contender(passes)


def lit(decode: Callable[[Any], np.ndarray]) -> Contender:
    """https://lightning.ai/docs/litdata"""

    def passes(folder: Path) -> Iterator[Iterator[Any]]:
        import litdata

        prepare = Prepare(decode)
        dataset = litdata.StreamingDataset(
            str(folder / "litdata"),
            shuffle=True,
            drop_last=True,
            transform=lambda sample: prepare(sample["image"], sample["text"], sample["post"]),
        )
        yield from _passes(
            litdata.StreamingDataLoader(
                dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True, collate_fn=collate
            )
        )

    return Contender(passes)


def _passes(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    while True:
        yield iter(loader)


def bare_loop(folder: Path) -> Iterator[Iterator[Any]]:
    """The limit: parse, tokenise and decode bytes in memory, in as many processes; nothing is read or handed over."""
    images = sorted((folder / "raw").glob("*.jpg"))
    posts = [(path.read_bytes(), path.with_suffix(".json").read_bytes()) for path in images]
    while True:
        halves = [Process(target=_bare, args=(posts[start::WORKERS],)) for start in range(WORKERS)]
        for half in halves:
            half.start()
        for half in halves:
            half.join()
        yield iter([range(POSTS)])


def _bare(posts: list[tuple[bytes, bytes]]) -> None:
    prepare = Prepare(with_ours)
    for image, fields in posts:
        post = json.loads(fields)
        labels = [post["labels"].get(name, np.nan) for name in POLICIES]
        np.array(labels, dtype=np.float32)
        np.array(prepare.tokenizer.encode(post["text"], MAX_TOKENS), dtype=np.int32)
        prepare.decode(image)


CONTENDERS = {
    "crossguard": Contender(ours, endless=True),
    "webdataset": webdataset(with_pillow),
    "mosaicml-streaming": mosaic(with_pillow),
    "litdata": lit(with_pillow),
    "raw files": raw_files(with_pillow),
    "webdataset, our decoder": webdataset(with_ours),
    "mosaicml-streaming, our decoder": mosaic(with_ours),
    "litdata, our decoder": lit(with_ours),
    "raw files, our decoder": raw_files(with_ours),
    "bare loop": Contender(bare_loop),
}
