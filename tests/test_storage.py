"""Shards behind URLs: published to and read from an S3 server, through a cache that processes share and kills survive."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from build_job import build, files_of, make_config, make_posts, write_lines
from fsspec.implementations.memory import MemoryFileSystem
from rank_jobs import run_crossguard
from s3_server import URL, Server
from storage_job import texts

from crossguard.configs.errors import JobError, UserError
from crossguard.configs.saved import as_plain
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.shards import storage
from crossguard.data.shards.cache import GB, MARKER
from crossguard.data.shards.folder import ShardFolder, has_manifest
from crossguard.data.shards.manifest import Manifest
from crossguard.data.shards.publish import publish


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder of six shards."""
    build(make_config(write_lines(tmp_path / "posts.jsonl", make_posts(44)), splits={"train": 1.0}), tmp_path / "run")
    return tmp_path / "run/shards"


def put(shards: Path) -> Manifest:
    manifest = Manifest.load(shards)
    publish(shards, manifest, URL)
    return manifest


def stored(cache: Path) -> int:
    """Bytes in a cache, whole or partial, while nobody may make room or take it."""
    if not (cache / "space").exists():
        return 0
    with (cache / "space").open() as space:
        fcntl.flock(space, fcntl.LOCK_EX)
        sizes = {}
        for path in [*cache.glob("partial/*"), *cache.glob("files/*/*")]:
            with suppress(FileNotFoundError):  # a download that has just become a file
                sizes[path.name.partition(".")[0]] = path.stat().st_size
        return sum(sizes.values())


def read_in_processes(
    config: CacheConfig, count: int, watch: Callable[[], Any] = lambda: None
) -> list[dict[str, str | None]]:
    """What processes read that begin at once; `watch` is called all the time."""
    job = [sys.executable, Path(__file__).parent / "storage_job.py", URL, config.dir, str(config.max_gb)]
    readers = [subprocess.Popen([*job, str(seed)], stdout=subprocess.PIPE) for seed in range(count)]
    while any(reader.poll() is None for reader in readers):
        watch()
        time.sleep(0.005)
    assert [reader.returncode for reader in readers] == [0] * count
    return [json.loads(reader.communicate()[0]) for reader in readers]


def test_what_is_published_is_read_again_and_fetched_once(server: Server, built: Path, tmp_path: Path) -> None:
    assert not has_manifest(URL)
    manifest = put(built)
    puts = [path for method, path in server.requests if method == "PUT" and "here" in path]
    assert puts[-1].endswith("/manifest.json")
    assert server.count("PUT").keys() == files_of(built).keys()
    config = CacheConfig(dir=str(tmp_path / "cache"))
    folder = ShardFolder.open(URL, config)
    assert folder.manifest == manifest
    assert folder.check_files() == []
    assert len(ShardReader([folder], "train").missing_rows()) == 0
    expected = texts(ShardFolder.open(built, config))
    server.requests.clear()
    assert read_in_processes(config, 4) == [expected] * 4
    fetched = server.count("GET")
    del fetched["manifest.json"]
    assert {path: fetched[path] for shard in manifest.shards for path in (shard.path, shard.index_path)} == {
        path: 1 for path in files_of(built) if path != "manifest.json"
    }
    server.requests.clear()
    assert ShardReader([folder], "train").column("size").all()
    assert texts(folder) == expected
    assert not server.requests


def test_a_publication_that_was_killed_goes_on(server: Server, built: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from crossguard.data.shards import publish
from crossguard.data.shards.manifest import Manifest
upload, calls = publish.Remote.upload, []
def counted(self, source, path):
    calls.append(path)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    upload(self, source, path)
publish.Remote.upload = counted
publish.UPLOADS_AT_ONCE = 1
publish.publish(Path(sys.argv[1]), Manifest.load(Path(sys.argv[1])), sys.argv[2])
"""
    killed = subprocess.run([sys.executable, "-c", script, built, URL], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(server.count("PUT")) == 5
    assert not has_manifest(URL)
    server.requests.clear()
    put(built)
    assert len(server.count("PUT")) in (8, 9)  # the kill may have come before the last upload was noted
    server.requests.clear()
    put(built)
    assert set(server.count("PUT")) == {"manifest.json"}


def test_other_shards_are_never_overwritten(server: Server, built: Path, tmp_path: Path) -> None:
    put(built)
    posts = write_lines(tmp_path / "others/posts.jsonl", make_posts(9))
    other = build(make_config(posts), tmp_path / "others")
    server.requests.clear()
    with pytest.raises(
        UserError, match=rf"{URL}: holds shards of other posts or settings, which are never overwritten"
    ):
        publish(tmp_path / "others/shards", other, URL)
    assert not server.count("PUT")
    with pytest.raises(UserError, match="s3://no-such-bucket/x: the bucket or a folder does not exist"):
        publish(built, Manifest.load(built), "s3://no-such-bucket/x")


def test_shards_that_were_appended_are_published_alone(server: Server, built: Path, tmp_path: Path) -> None:
    whole = Manifest.load(built)
    before = shutil.copytree(built, tmp_path / "before")
    publish(before, replace(whole, shards=whole.shards[:-1]).save(before), URL)
    server.requests.clear()
    publish(built, whole, URL)
    last = whole.shards[-1]
    assert server.count("PUT").keys() == {last.path, last.index_path, "manifest.json"}


def test_the_cache_stays_within_its_limit(server: Server, built: Path, tmp_path: Path) -> None:
    manifest = put(built)
    limit = 2.5 * max(shard.bytes for shard in manifest.shards)
    config = CacheConfig(dir=str(tmp_path / "cache"), max_gb=limit / GB)
    expected = texts(ShardFolder.open(built, config))
    seen = []
    found = read_in_processes(config, 3, watch=lambda: seen.append(stored(tmp_path / "cache")))
    assert found == [expected] * 3
    assert 0 < max(seen) <= limit
    assert max(server.count("GET").values()) > 1
    too_small = CacheConfig(dir=str(tmp_path / "cache"), max_gb=1 / GB)
    with pytest.raises(UserError, match=r"data.cache.max_gb=1e-09: one file has .* set a higher limit"):
        texts(ShardFolder.open(URL, too_small))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_copy_that_rots_is_fetched_again(server: Server, built: Path, tmp_path: Path) -> None:
    manifest = put(built)
    folder = ShardFolder.open(URL, CacheConfig(dir=str(tmp_path / "cache")))
    expected = texts(folder)
    shard = manifest.shards[2]
    flip(tmp_path / f"cache/files/{shard.sha256[:2]}/{shard.sha256}", 700)
    flip(tmp_path / f"cache/files/{shard.index_sha256[:2]}/{shard.index_sha256}", 40)
    server.requests.clear()
    assert texts(folder) == expected
    assert server.count("GET") == {shard.path: 1, shard.index_path: 1}


def test_damage_behind_the_url_is_named(server: Server, built: Path, tmp_path: Path) -> None:
    manifest = put(built)
    damaged, missing, index = (manifest.shards[number] for number in (1, 3, 4))
    flip(built / damaged.path, 700)
    fsspec.filesystem("s3").put_file(str(built / damaged.path), f"{URL}/{damaged.path}")
    fsspec.filesystem("s3").rm_file(f"{URL}/{missing.path}")
    folder = ShardFolder.open(URL, CacheConfig(dir=str(tmp_path / "cache")))
    assert folder.check_files() == [missing]
    reader = ShardReader([folder], "train")
    assert reader.missing_rows().tolist() == list(range(24, 32))
    server.requests.clear()
    for row in (8, 9, 15):
        with pytest.raises(SampleError, match=f"the shard {damaged.path} is not what the manifest says"):
            reader.read(row)
    assert server.count("GET")[damaged.path] == 2  # once more, and never again
    for row in (24, 31):
        with pytest.raises(SampleError, match=f"the shard {missing.path} is missing"):
            reader.read(row)
    flip(built / index.index_path, 40)
    fsspec.filesystem("s3").put_file(str(built / index.index_path), f"{URL}/{index.index_path}")
    cached = tmp_path / f"cache/files/{index.index_sha256[:2]}/{index.index_sha256}"
    cached.unlink(missing_ok=True)
    with pytest.raises(UserError, match=rf"{URL}/{index.index_path}: changed since the manifest was written"):
        ShardReader([folder], "train").column("size")


def test_a_cache_that_is_removed_meanwhile_is_made_again(server: Server, built: Path, tmp_path: Path) -> None:
    put(built)
    folder = ShardFolder.open(URL, CacheConfig(dir=str(tmp_path / "cache")))
    expected = texts(folder)
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert texts(folder) == expected


def test_a_cache_and_shards_never_lie_in_each_other(built: Path) -> None:
    for folder in (built, built / "train", built.parent):
        for location in (str(built), f"file://{built}"):
            with pytest.raises(UserError, match=r"data.cache.dir: .* lie in each other; choose another folder"):
                ShardFolder.open(location, CacheConfig(dir=str(folder)))


def test_a_saved_configuration_keeps_urls() -> None:
    config = make_config(None, data={"shards": URL, "cache": CacheConfig(dir="/somewhere/cache")})
    data = as_plain(config)["data"]
    assert data["shards"] == URL
    assert data["cache"]["dir"] == os.path.relpath("/somewhere/cache")


def test_other_urls(built: Path, tmp_path: Path) -> None:
    config = CacheConfig(dir=str(tmp_path / "cache"))
    expected = texts(ShardFolder.open(f"file://{built}", config))
    assert not (tmp_path / "cache").exists()
    publish(built, Manifest.load(built), "memory://shards/here/")
    assert texts(ShardFolder.open("memory://shards/here", config)) == expected
    for url, message in (
        ("abfs://container/x", "abfs://container/x: the package that opens it is missing; pip install adlfs"),
        ("s4://bucket/x", "s4://bucket/x: cannot be opened .*Protocol not known: s4"),
        ("memory://nothing", "memory://nothing/manifest.json: not found; build the shards first"),
    ):
        with pytest.raises(UserError, match=message):
            ShardFolder.open(url, config)


def test_a_network_that_fails_is_tried_again_and_refusal_is_not(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    publish(built, Manifest.load(built), "memory://failing")
    original, errors, calls = MemoryFileSystem.cat_file, [], []

    def failing(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        if errors:
            raise errors.pop()
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    config = CacheConfig(dir=str(tmp_path / "cache"))

    class LibraryError(Exception):
        """As the libraries of stores have."""

    errors += [TimeoutError(errno.ETIMEDOUT, "timed out"), LibraryError("slow down")] * 3
    assert ShardFolder.open("memory://failing", config).manifest.splits == {"train": 44}
    assert len(calls) == 7
    errors += [LibraryError("slow down")] * 20
    with pytest.raises(JobError, match=r"memory://failing/manifest.json: LibraryError: slow down, 8 tries; check"):
        ShardFolder.open("memory://failing", config)
    errors[:], calls[:] = [PermissionError(errno.EACCES, "Access Denied")], []
    with pytest.raises(UserError, match=r"memory://failing/manifest.json: Access Denied; give this user access"):
        ShardFolder.open("memory://failing", config)
    assert len(calls) == 1


def test_a_job_builds_into_a_bucket_and_previews_from_it(server: Server, workspace: Path, tmp_path: Path) -> None:
    arguments = ["recipe=my_posts.yaml", f"run_dir={tmp_path}/run", f"data.shards={URL}", "data.cache.dir=cache"]
    said = run_crossguard(["build", *arguments], workspace)
    assert f" -> {URL}" in said.stdout
    assert "skipped" in run_crossguard(["build", *arguments], workspace).stdout
    preview = ["shards", "preview", "step=2"]
    here = run_crossguard(
        [*preview, "recipe=my_posts.yaml", f"run_dir={tmp_path}/x", "data.shards=runs/my_posts/shards"], workspace
    )
    assert run_crossguard([*preview, *arguments], workspace).stdout == here.stdout
    assert (workspace / "cache" / MARKER).exists()
    refused = run_crossguard(["build", *arguments, "data.shards=gs://bucket/x"], workspace, status=2)
    assert refused.stderr == "crossguard: gs://bucket/x: the package that opens it is missing; pip install gcsfs\n"
