"""Reading samples by row: over several folders, with lost and damaged files, and on storage that fails."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_job import build, make_config, make_posts, write_lines
from open_files import open_files

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.loading import reader as readers
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.shards import storage
from crossguard.data.shards.folder import ShardFolder

NOW = 946_684_800.0  # 2000-01-01
AFTER_EXPIRY = 4_200_000_000.0  # 2103


def make_folder(path: Path, prefix: str, **changes: Any) -> ShardFolder:
    """Shards of 20 posts for training and 10 for validation; every fifth expires."""
    posts = [post | {"id": f"{prefix}{post['id']}", "split": "train"} | changes for post in make_posts(30)]
    for number, post in enumerate(posts):
        post |= {"split": "validation"} if number % 3 == 2 else {}
        post |= {"expires_at": "2100-01-01"} if number % 5 == 0 else {}
    build(make_config(write_lines(path / "posts.jsonl", posts)), path, now=NOW)
    return ShardFolder.open(path / "shards", CacheConfig())


@pytest.fixture
def folder(tmp_path: Path) -> ShardFolder:
    return make_folder(tmp_path / "first", "a")


@pytest.fixture
def other(tmp_path: Path) -> ShardFolder:
    return make_folder(tmp_path / "second", "b", language="tr")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)


def ids(reader: ShardReader) -> list[str]:
    return [reader.read(row).id for row in range(len(reader))]


def test_several_folders_are_one_row_of_rows(folder: ShardFolder, other: ShardFolder) -> None:
    first, second = (ShardReader([one], "train") for one in (folder, other))
    both: ShardReader = pickle.loads(pickle.dumps(ShardReader([folder, other], "train")))
    assert ids(both) == ids(first) + ids(second)
    assert [both.read_head(row).id for row in range(len(both))] == ids(both)
    assert both.shards == first.shards + second.shards
    assert both.starts.tolist() == [0, 8, 16, 20, 28, 36, 40]
    assert [both.shard_of(row) for row in (0, 7, 8, 19, 20, 39)] == [0, 0, 1, 2, 3, 5]
    assert [both.folder_of(shard).location for shard in (2, 3)] == [folder.location, other.location]
    for name in ("key", "text_bytes", "stratum"):
        assert both.column(name).tolist() == [*first.column(name).tolist(), *second.column(name).tolist()]
    for row in range(len(both)):  # a stratum's number means what the row's own folder says
        stratum = both.folder_of(both.shard_of(row)).manifest.strata[both.column("stratum")[row]]
        assert stratum.startswith(f"{both.read(row).language}/")
    assert first.manifest_hash == folder.manifest.sha256
    assert len({reader.manifest_hash for reader in (first, second, both, ShardReader([other, folder], "train"))}) == 4


def test_a_post_is_found_by_its_id(folder: ShardFolder, other: ShardFolder) -> None:
    reader = ShardReader([folder, other], "train")
    assert [reader.row_of(id) for id in ids(reader)] == list(range(len(reader)))
    assert reader.row_of("nobody") is None


def test_a_folder_without_the_split_adds_nothing(folder: ShardFolder, tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "third/posts.jsonl", [{"id": "t", "text": "t", "labels": {}, "split": "train"}])
    build(make_config(posts), tmp_path / "third")
    third = ShardFolder.open(tmp_path / "third/shards", CacheConfig())
    assert ids(ShardReader([third, folder], "validation")) == ids(ShardReader([folder], "validation"))
    with pytest.raises(UserError, match=r"first/shards, .*third/shards: no split 'test'; it has train, validation"):
        ShardReader([folder, third], "test")


def test_what_expired_is_told_from_the_indexes(folder: ShardFolder, other: ShardFolder) -> None:
    reader = ShardReader([folder, other], "train")
    assert reader.expired_rows(NOW).tolist() == []
    expired = reader.expired_rows(AFTER_EXPIRY)
    assert {reader.read(int(row)).post.get("expires_at") for row in expired} == {"2100-01-01"}
    assert sorted([*expired, *reader.readable_rows(AFTER_EXPIRY)]) == list(range(40))
    assert len(expired) == 8


def test_no_more_is_open_than_may_be(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_OPEN_SHARDS", 2)
    reader = ShardReader([folder], "train")
    before = open_files()
    for _ in range(2):
        assert len(set(ids(reader))) == 20
        assert (open_files() - before).total() == 4
    del reader
    assert not open_files() - before


def lost_rows(reader: ShardReader) -> dict[int, str]:
    """Row -> what is said of it, for all that cannot be read."""
    said = {}
    for row in range(len(reader)):
        for read in (reader.read, reader.read_head):
            try:
                read(row)
            except SampleError as error:
                said.setdefault(row, str(error))
    return said


def test_lost_and_cut_files_are_told_sample_by_sample(folder: ShardFolder, other: ShardFolder) -> None:
    reader = ShardReader([folder, other], "train")
    assert reader.missing_rows().tolist() == []
    (Path(folder.location) / reader.shards[1].path).unlink()
    (Path(other.location) / reader.shards[3].index_path).unlink()
    cut = Path(other.location) / reader.shards[5].path
    offsets = reader.column("offset")[36:40]
    os.truncate(cut, int(offsets.max()) + 100)
    reader = pickle.loads(pickle.dumps(reader))
    said = lost_rows(reader)
    last = 36 + int(offsets.argmax())
    assert said.keys() == {*range(8, 16), *range(20, 28), last}
    for row in range(8, 16):
        assert said[row].endswith(f"(row {row}): the shard train/train-00001.tar is missing")
    path = "train/train-00000.tar"
    assert said[22] == f"sample unknown, number 2 of {path} (row 22): the index of {path} is missing"
    assert said[last].endswith("the shard train/train-00002.tar is cut short")
    assert reader.missing_rows().tolist() == [*range(8, 16), *range(20, 28)]
    assert not reader.column("size")[20:28].any()
    assert reader.row_of(reader.read(39 if last != 39 else 38).id) is not None


class Failing:
    """A system call that fails so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int, number: int = errno.EIO):
        self.calls, self.left, self.number = 0, times, number
        self.original = getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.original(*args)


@pytest.mark.usefixtures("no_waiting")
def test_storage_that_fails_for_a_moment_is_tried_again(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader([folder], "train")
    expected = ids(reader)
    failing = Failing(monkeypatch, "pread", storage.TRIES - 1, errno.ESTALE)
    assert ids(reader) == expected
    assert failing.calls == len(reader) + storage.TRIES - 1


@pytest.mark.usefixtures("no_waiting")
def test_storage_that_goes_on_failing_ends_the_job(folder: ShardFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader([folder], "train")
    reader.column("size")  # the indexes are open
    failing = Failing(monkeypatch, "pread", 10**6)
    with pytest.raises(JobError, match=rf"{reader.shards[0].path}: Input/output error, {storage.TRIES} tries; check"):
        reader.read(0)
    assert failing.calls == storage.TRIES


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EACCES, UserError, "Permission denied; give this user access"),
        (errno.ENOSPC, JobError, "No space left on device; make room"),
    ],
)
def test_what_no_waiting_mends_is_told_at_once(
    folder: ShardFolder, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    reader = ShardReader([folder], "train")
    reader.column("size")  # the indexes are open
    failing = Failing(monkeypatch, "pread", 10**6, number)
    with pytest.raises(kind, match=f"{reader.shards[0].path}: {message}"):
        reader.read(0)
    assert failing.calls == 1


def test_a_flipped_bit_is_found(folder: ShardFolder) -> None:
    reader = ShardReader([folder], "train")
    row = 9
    offset = int(reader.column("offset")[row]) + int(reader.column("size")[row]) // 2
    with (Path(folder.location) / reader.shards[1].path).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(SampleError, match=rf"\(row {row}\): damaged: its bytes in train/train-00001.tar are not those"):
        reader.read(row)
    assert np.isin(np.delete(np.arange(20), row), np.setdiff1d(np.arange(20), list(lost_rows(reader)))).all()
