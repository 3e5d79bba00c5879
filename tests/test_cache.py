"""The cache of a node: room, damage, kills, and what it may never delete."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.shards.cache import GB, MARKER, DamagedError, NodeCache

# A process that is killed in the middle of a download, and one that is killed while it waits for it.
SLOW = """
import sys, time
from pathlib import Path
from crossguard.configs.saved import as_plain
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.shards.cache import NodeCache
def download(target):
    target.write_bytes(b"half")
    print("downloading", flush=True)
    time.sleep(600)
NodeCache.open(CacheConfig(dir=sys.argv[1])).open_file(sys.argv[2], 1000, download)
"""
CONTENT = b"whole" * 200
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def write(target: Path) -> None:
    target.write_bytes(CONTENT)


def content(cache: NodeCache, download: Any = write, sha256: str = SHA256, size: int = 1000, **options: Any) -> bytes:
    descriptor = cache.open_file(sha256, size, download, **options)
    try:
        return os.pread(descriptor, 10**6, 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("same", [True, False])
def test_a_download_that_was_killed_leaves_nothing(tmp_path: Path, same: bool) -> None:
    config = CacheConfig(dir=str(tmp_path / "cache"), max_gb=1500 / GB)
    wanted = SHA256 if same else SHA256[:3] + "0" * 61
    with subprocess.Popen([sys.executable, "-c", SLOW, config.dir or "", wanted], stdout=subprocess.PIPE) as slow:
        assert slow.stdout is not None
        assert slow.stdout.readline() == b"downloading\n"
        cache = NodeCache.open(config)
        assert [path.name for path in (tmp_path / "cache/partial").iterdir()] == [f"{wanted}.1000"]
        slow.kill()
    assert content(cache) == CONTENT
    assert [path.name for path in (tmp_path / "cache").glob("*/*/*")] == [SHA256]
    assert not any((tmp_path / "cache/partial").iterdir())


def test_room_is_made_by_what_was_used_last(tmp_path: Path) -> None:
    cache = NodeCache.open(CacheConfig(dir=str(tmp_path / "cache"), max_gb=3500 / GB))
    files = {hashlib.sha256(data).hexdigest(): data for data in (bytes([number]) * 1000 for number in range(5))}
    names = list(files)

    def fetch(name: str) -> None:
        assert content(cache, lambda target: target.write_bytes(files[name]), name) == files[name]
        time.sleep(0.01)  # file systems count time in ticks

    for name in [*names[:3], names[0], names[3]]:
        fetch(name)
    kept = {path.name for path in (tmp_path / "cache/files").glob("*/*")}
    assert names[0] in kept
    assert names[3] in kept
    assert names[1] not in kept
    reading = cache.open_file(names[3], 1000, write)
    for name in (names[1], names[2], names[4]):
        fetch(name)
    assert not (tmp_path / f"cache/files/{names[3][:2]}/{names[3]}").exists()
    assert os.pread(reading, 1000, 0) == files[names[3]]
    os.close(reading)


def test_a_damaged_download_is_tried_once_more(tmp_path: Path) -> None:
    cache = NodeCache.open(CacheConfig(dir=str(tmp_path / "cache")))
    contents = iter([b"wrong", CONTENT])
    assert content(cache, lambda target: target.write_bytes(next(contents))) == CONTENT
    other = "0" * 64
    with pytest.raises(DamagedError):
        content(cache, write, other)
    with pytest.raises(ZeroDivisionError):
        content(cache, lambda target: target.write_bytes(b"half") and 1 // 0, other)
    assert {path.name for path in (tmp_path / "cache").glob("*/*") if path.is_file()} == {SHA256[:3], "000"}  # locks


@pytest.mark.parametrize("marked", [True, False])
def test_nothing_is_deleted_that_was_not_downloaded(tmp_path: Path, marked: bool) -> None:
    cache = tmp_path / "cache"
    foreign = {"precious.tar": b"1", "files/precious": b"2", "files/ab/precious.tar": b"3", "partial/mine.tar": b"4"}
    if marked:
        NodeCache.open(CacheConfig(dir=str(cache)))
    for name, data in foreign.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(data)
    config = CacheConfig(dir=str(cache), max_gb=1001 / GB)
    if marked:
        for number in range(5):
            data = bytes([number]) * 1000
            name = hashlib.sha256(data).hexdigest()
            assert content(NodeCache.open(config), lambda target, data=data: target.write_bytes(data), name) == data
    else:
        with pytest.raises(UserError, match=r"data.cache.dir: .*cache is neither empty nor a cache; choose another"):
            NodeCache.open(config)
        assert not (cache / MARKER).exists()
    assert {name: (cache / name).read_bytes() for name in foreign} == foreign


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache.dir: .*file/cache cannot be written \(Not a directory\)"):
        NodeCache.open(CacheConfig(dir=str(tmp_path / "file/cache")))


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert NodeCache.open(CacheConfig()).folder == tmp_path / ".cache/crossguard/shards"
    assert NodeCache.open(CacheConfig(dir="~/mine")).folder == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert NodeCache.open(CacheConfig()).folder == tmp_path / "xdg/crossguard/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as in a container that runs as a number
    with pytest.raises(UserError, match="data.cache.dir: this user has no home folder"):
        NodeCache.open(CacheConfig())
