"""Reading, batching and the loaders: exact for any number of ranks and workers, whatever is damaged."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from orders import plain_order
from PIL import Image
from rank_jobs import alive

from crossguard.configs.errors import UserError
from crossguard.configs.schema import BuildConfig, Config, DataConfig, ModelConfig, TaxonomyConfig, TrainConfig
from crossguard.configs.schema.encoders import ImageEncoderConfig, TextEncoderConfig
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.loading.collate import Batch, collate
from crossguard.data.loading.encoded import NO_POST, EncodedSample
from crossguard.data.loading.lengths import token_lengths
from crossguard.data.loading.loader import EvalLoader, TrainLoader
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.plan import open_folders, plan_training, unreadable_rows
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.taxonomy import Taxonomy
from crossguard.train.encode import PostEncoder

POSTS = 60
BATCH = 8
BEFORE_EXPIRY = 946_684_800.0  # 2000-01-01
# Posts that end here were built in time, and have expired at a later reading.
EXPIRES = "2100-01-01T00:00:00Z"
AFTER_EXPIRY = 4_200_000_000.0  # 2103


@dataclass
class Shards:
    """Shards of POSTS posts and what reads them."""

    config: Config
    posts: dict[str, dict[str, Any]]
    media: Path
    folder: Path

    def reader(self) -> ShardReader:
        return ShardReader([self.open()], "train")

    def open(self) -> ShardFolder:
        return ShardFolder.open(self.folder, self.config.data.cache)

    def encoder(self) -> PostEncoder:
        return PostEncoder(self.config.model, Taxonomy.from_config(self.config.taxonomy))


def write_posts(folder: Path) -> dict[str, dict[str, Any]]:
    """Posts with text, an image, both or two images; text lengths are skewed; two posts expire."""
    random = np.random.default_rng(0)
    posts = {}
    for number in range(POSTS):
        post: dict[str, Any] = {"id": f"p.{number}/ü", "labels": {"spam": number % 2}, "split": "train"}
        if number % 4:
            post |= {"text": "ж" * int(random.lognormal(2.5, 1) + 1), "language": "ru"}
        images = [f"{number}-{part}.jpg" for part in range((1, 1, 0, 2)[number % 4])]
        for name in images:
            noise = random.integers(0, 255, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((50, 40)).save(folder / name)
        if images:
            post["images"] = images
        if number in (7, 8):
            post["expires_at"] = EXPIRES
        posts[post["id"]] = post
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts.values()))
    return posts


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    media = tmp_path / "posts"
    media.mkdir()
    posts = write_posts(media)
    config = Config(
        recipe="test",
        seed=3,
        run_dir=str(tmp_path),
        taxonomy=TaxonomyConfig("test", "1", [PolicyConfig("hate"), PolicyConfig("spam")]),
        model=ModelConfig(
            text=TextEncoderConfig(build="tests:none", tokenizer="bytes", max_length=64),
            image=ImageEncoderConfig(build="tests:none", size=16, max_images=2),
        ),
        data=DataConfig(path=str(media / "posts.jsonl")),
        build=BuildConfig(num_workers=1, samples_per_shard=25),
        train=TrainConfig(batch_size=BATCH, num_workers=0),
    )
    folder = tmp_path / "shards"
    build_shards(config, folder, tmp_path / "quarantine.jsonl", now=BEFORE_EXPIRY)
    return Shards(config, posts, media, folder)


def no_refusal(record: dict[str, Any]) -> None:
    raise AssertionError(record)


def deliver(shards: Shards, order: SampleOrder, **options: Any) -> list[list[Batch]]:
    """The micro-batches of one rank, by step."""
    defaults = {
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 4,
        "num_workers": 0,
        "start_step": 1,
        "end_step": 20,
        "on_refused": no_refusal,
    }
    return list(TrainLoader(shards.reader(), order, shards.encoder(), **defaults | options))


def ids_of(steps: list[list[Batch]]) -> list[list[str]]:
    return [[id for batch in batches for id in batch.ids] for batches in steps]


def joined(lists: Iterable[list[str]]) -> list[str]:
    return list(chain.from_iterable(lists))


def same(left: Batch, right: Batch) -> bool:
    """Equal in every byte."""
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(Batch)]
    return all(
        a.numpy().tobytes() == b.numpy().tobytes() and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        for a, b in pairs
    )


def damage(shards: Shards, row: int) -> str:
    """Flip a byte of a sample; returns its id."""
    reader = shards.reader()
    sample = reader.read(row)
    offset, size = int(reader.column("offset")[row]), int(reader.column("size")[row])
    shard = reader.shards[reader.shard_of(row)]
    with (shards.folder / shard.path).open("r+b") as file:
        file.seek(offset + size - 600)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return sample.id


def test_every_post_is_read_as_it_was_written(shards: Shards) -> None:
    reader = pickle.loads(pickle.dumps(shards.reader()))
    assert len(reader) == POSTS
    assert len(reader.shards) == 3
    samples = {sample.id: sample for sample in map(reader.read, range(POSTS))}
    assert samples.keys() == shards.posts.keys()
    for id, post in shards.posts.items():
        sample = samples[id]
        assert sample.text == post.get("text")
        assert sample.language == post.get("language", "und")
        assert sample.images == [(shards.media / name).read_bytes() for name in post.get("images", ())]
    for row in range(POSTS):
        head, whole = reader.read_head(row), reader.read(row)
        assert (head.post, head.text, head.images) == (whole.post, whole.text, [])


def test_a_row_outside_of_the_split(shards: Shards) -> None:
    for row in (-1, POSTS):
        with pytest.raises(IndexError):
            shards.reader().read(row)


def test_a_damaged_sample_is_told_without_its_content(shards: Shards) -> None:
    damage(shards, 30)
    reader = shards.reader()
    with pytest.raises(
        SampleError, match=r"^sample [0-9a-f]{32} \(row 30\): damaged: its bytes in train/.*\.tar are not "
    ):
        reader.read(30)
    assert reader.read(29).id != reader.read(31).id


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_not_there_is_redirected_and_named(shards: Shards, workers: int) -> None:
    path = shards.reader().shards[1].path
    (shards.folder / path).unlink()
    records: list[dict[str, Any]] = []
    steps = deliver(shards, plain_order(POSTS, BATCH, 0), num_workers=workers, on_refused=records.append)
    assert [sum(len(batch.ids) for batch in batches) for batches in steps] == [BATCH] * 20
    assert {record["reason"] for record in records} == {f"the shard {path} is missing"}
    assert len({record["key"] for record in records}) == 25


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_that_changed_ends_the_job(shards: Shards, workers: int) -> None:
    index = shards.folder / shards.reader().shards[1].index_path
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=rf"{index.name}: changed since the manifest was written"):
        deliver(shards, plain_order(POSTS, BATCH, 0), num_workers=workers)


def test_batches_without_text_or_images_have_the_same_parts() -> None:
    labels = np.array([1, np.nan], dtype=np.float32)
    image = np.full((3, 4, 4), 7, dtype=np.uint8)
    bare = EncodedSample("a", "und", None, [], labels)
    full = EncodedSample("b", "de", np.array([5, 6, 7], dtype=np.int32), [image, image], labels, position=9)
    both = collate([bare, full], pad_id=1, image_size=4, num_labels=2)
    assert both.input_ids.tolist() == [[1, 1, 1], [5, 6, 7]]
    assert both.text_mask.tolist() == [[False] * 3, [True] * 3]
    assert both.has_text.tolist() == both.has_image.tolist() == [False, True]
    assert both.image_post.tolist() == [1, 1]
    assert both.positions.tolist() == [-1, 9]
    assert both.labels.isnan().tolist() == [[False, True]] * 2
    alone = collate([bare], pad_id=1, image_size=4, num_labels=2)
    assert alone.input_ids.shape == (1, 1)
    assert alone.image_post.tolist() == [NO_POST]
    assert alone.pixels.shape == (1, 3, 4, 4)
    assert not alone.pixels.any()
    assert same(pickle.loads(pickle.dumps(both)), both)
    with pytest.raises(ValueError, match="the taxonomy has 3 labels"):
        collate([bare], pad_id=1, image_size=4, num_labels=3)


@pytest.mark.parametrize("planned", [False, True])
def test_ranks_and_workers_cut_the_same_order(shards: Shards, tmp_path: Path, planned: bool) -> None:
    lengths = token_lengths(shards.reader(), shards.encoder(), tmp_path, 0) if planned else None
    order = plain_order(POSTS, BATCH, 3, lengths=lengths)
    reader = shards.reader()
    expected = [[reader.read(int(row)).id for row in order.rows(step)] for step in range(1, 21)]
    for world_size in (1, 2, 4):
        ranks = [ids_of(deliver(shards, order, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert [joined(slices) for slices in zip(*ranks, strict=True)] == expected
    resumed = deliver(shards, order, start_step=14, micro_batch_size=1)
    assert ids_of(resumed) == expected[13:]
    assert [len(batches) for batches in resumed] == [BATCH] * 7
    assert torch.cat([batch.positions for batch in resumed[0]]).tolist() == list(range(13 * BATCH, 14 * BATCH))


def test_workers_deliver_the_same_bytes_and_touch_no_random_state(shards: Shards) -> None:
    order = plain_order(POSTS, BATCH, 3)
    here = deliver(shards, order)
    before = torch.random.get_rng_state()
    for workers in (1, 2):
        there = deliver(shards, order, num_workers=workers)
        assert all(same(a, b) for x, y in zip(here, there, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_redirected_and_named(shards: Shards, workers: int) -> None:
    order = plain_order(POSTS, BATCH, 3)
    whole = ids_of(deliver(shards, order))
    damaged = {damage(shards, row): row for row in (3, 30, 59)}
    for world_size in (1, 2):
        records: list[dict[str, Any]] = []
        options = {"world_size": world_size, "num_workers": workers, "on_refused": records.append}
        ranks = [ids_of(deliver(shards, order, rank=rank, **options)) for rank in range(world_size)]
        delivered = [joined(slices) for slices in zip(*ranks, strict=True)]
        for before, after in zip(joined(whole), joined(delivered), strict=True):
            assert after not in damaged
            assert before in damaged or before == after
        first = {record["position"]: record for record in records if record["step"] == 1 + record["position"] // BATCH}
        hit = [position for position, id in enumerate(joined(whole)) if id in damaged]
        assert set(hit) == first.keys()
        assert all(
            record.keys() == {"key", "row", "split", "stage", "step", "position", "reason"} for record in records
        )


def test_too_many_damaged_samples_end_the_job(shards: Shards) -> None:
    for row in range(POSTS):
        damage(shards, row)
    with pytest.raises(UserError, match=r"none of the split's 60 samples may be read"):
        deliver(shards, plain_order(POSTS, BATCH, 0), on_refused=lambda record: None)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_each_row_once_longest_first(shards: Shards, workers: int) -> None:
    rows = np.arange(0, POSTS, 2)
    loader = EvalLoader(shards.reader(), rows, shards.encoder(), 7, num_workers=workers, on_refused=no_refusal)
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    reader = shards.reader()
    assert sorted(id for batch in batches for id in batch.ids) == sorted(reader.read(row).id for row in rows)
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    damaged = damage(shards, 4)
    records: list[dict[str, Any]] = []
    loader.on_refused = records.append
    left = [id for batch in loader for id in batch.ids]
    assert len(left) == len(rows) - 1
    assert damaged not in left
    assert [record["stage"] for record in records] == ["evaluate"]


def test_token_lengths_are_kept_until_something_changes(shards: Shards, tmp_path: Path) -> None:
    reader, encode = shards.reader(), shards.encoder()
    folder = tmp_path / "lengths"
    lengths = token_lengths(reader, encode, folder, 0)
    assert lengths.tolist() == [encode.text_length(reader.read(row)) for row in range(POSTS)]
    (kept,) = folder.iterdir()
    written = kept.stat().st_mtime_ns
    assert np.array_equal(token_lengths(reader, encode, folder, 0), lengths)
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(token_lengths(reader, encode, folder, 0), lengths)
    encode.fingerprint = "another"
    encode.text = replace(encode.text, max_length=8)
    assert token_lengths(reader, encode, folder, 0).max() == 8
    assert len(list(folder.iterdir())) == 2


def test_what_expired_since_the_build_is_not_read(shards: Shards, tmp_path: Path) -> None:
    reader, order = plan_training(shards.config, open_folders(shards.config), tmp_path, shards.encoder())
    order.refuse(unreadable_rows(reader, AFTER_EXPIRY))
    gone = {reader.read(int(row)).id for row in reader.expired_rows(AFTER_EXPIRY)}
    assert gone == {"p.7/ü", "p.8/ü"}
    delivered = ids_of(deliver(shards, order))
    assert not gone & {id for step in delivered for id in step}


def test_what_expires_during_a_job_is_redirected_and_named(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, order = plan_training(shards.config, open_folders(shards.config), tmp_path, shards.encoder())
    planned = ids_of(deliver(shards, order))
    gone = {"p.7/ü", "p.8/ü"}
    assert gone & {id for step in planned for id in step}
    monkeypatch.setattr("crossguard.data.loading.loader.time.time", lambda: AFTER_EXPIRY)
    refused: list[dict[str, Any]] = []
    delivered = ids_of(deliver(shards, order, on_refused=refused.append))
    assert [len(step) for step in delivered] == [len(step) for step in planned]
    assert not gone & {id for step in delivered for id in step}
    assert {line["id"] for line in refused} == gone
    assert {line["reason"] for line in refused} == {"expired"}


READ_FOREVER = """
import multiprocessing, pickle, signal, sys
from pathlib import Path
from crossguard.data.loading.loader import TrainLoader
reader, order, encode = pickle.loads(Path(sys.argv[1]).read_bytes())
signal.signal(signal.SIGTERM, lambda *_: None)
loader = TrainLoader(reader, order, encode, rank=0, world_size=1, micro_batch_size=4, num_workers=2,
                     start_step=1, end_step=10**9, on_refused=print)
steps = iter(loader)
next(steps)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
while True:
    next(steps)
    print("step", flush=True)
"""


def test_workers_outlive_a_signal_to_the_group_but_not_their_parent(shards: Shards, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.write_bytes(pickle.dumps((shards.reader(), plain_order(POSTS, BATCH, 0), shards.encoder())))
    job = subprocess.Popen(
        [sys.executable, "-c", READ_FOREVER, parts],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert job.stdout is not None
    workers = [int(pid) for pid in job.stdout.readline().split()]
    assert len(workers) == 2
    os.killpg(job.pid, signal.SIGTERM)
    assert [job.stdout.readline() for _ in range(200)] == ["step\n"] * 200
    assert all(map(alive, workers))
    job.kill()
    job.wait()
    while any(map(alive, workers)):  # the test's own time limit ends it
        time.sleep(0.05)
