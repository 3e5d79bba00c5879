"""Tools for shards: `verify` finds and names every damage, `stats` counts what is there."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from build_job import build, make_config, make_posts, picture, write_lines
from conftest import run_command
from s3_server import URL, Server

from crossguard.configs.errors import UserError
from crossguard.data.records import post_key
from crossguard.data.shards.index import encode_index, hex_keys, read_index
from crossguard.data.shards.manifest import FILE_NAME, Manifest
from crossguard.data.shards.place import Place
from crossguard.data.shards.publish import publish
from crossguard.data.shards.stats import stats
from crossguard.data.shards.verify import Damage, verify
from crossguard.recipes.cli import main

FLIPS = 150


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with pictures and expiry dates, in two versions."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "a.png").write_bytes(picture())
    posts = make_posts(34)
    for number, post in enumerate(posts):
        if number % 3 == 0:
            post["images"] = ["a.png"] * (1 + number % 2)
        if number % 7 == 0:
            post["expires_at"] = "2100-01-01"
    for count in (25, 34):
        build(make_config(write_lines(folder / "p.jsonl", posts[:count]), append=True), folder)
    return folder / "shards"


@pytest.fixture
def shards(built: Path) -> Any:
    """The same; whatever a test does to its files is undone."""
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    yield built
    for path in built.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["shards", *argv])
    return int(str(ended.value.code))


def key_at(shards: Path, path: str, offset: int) -> str:
    """The sample that a byte of a tar or of an index belongs to; empty if it belongs to none."""
    rows = read_index(shards / Path(path).with_suffix(".idx"))
    if path.endswith(".idx"):
        start = len(encode_index(rows[:0]))
        return "" if offset < start else hex_keys(rows)[(offset - start) // rows.itemsize]
    inside = (rows["offset"] <= offset) & (offset < rows["offset"] + rows["size"])
    return hex_keys(rows[inside])[0] if inside.any() else ""


def test_whole_shards_are_verified(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(shards)) == 0
    assert "every bit is as it was written" in capsys.readouterr().out
    assert run("verify", "--json", str(shards)) == 0
    manifest = Manifest.load(shards)
    found = json.loads(capsys.readouterr().out)
    assert found == {"ok": True, "files": 2 * len(manifest.shards) + 2, "samples": 34, "damages": []}


def test_any_flipped_bit_is_found_and_named(shards: Path) -> None:
    draw = random.Random(0)
    files = sorted(path for path in shards.rglob("*") if path.is_file())
    kinds = [[f for f in files if f.suffix == suffix] for suffix in (".tar", ".idx", ".json")]
    for number in range(FLIPS):
        path = draw.choice(kinds[number % 3])
        data = path.read_bytes()
        offset = draw.randrange(len(data))
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << draw.randrange(8)]) + data[offset + 1 :])
        found = verify(Place.of(shards), 1).damages
        path.write_bytes(data)
        name = path.relative_to(shards).as_posix()
        key = "" if name.endswith(".json") else key_at(shards, name, offset)
        assert [(damage.file, damage.key) for damage in found] == [(name, key)], f"byte {offset} of {name}"
    assert verify(Place.of(shards), 1).damages == ()


@pytest.mark.parametrize("where", ["first header", "end of the tar", "last byte of the index", "manifest's newline"])
def test_bits_at_the_edges(shards: Path, where: str) -> None:
    shard = Manifest.load(shards).shards[0]
    path, offset = {
        "first header": (shard.path, 0),
        "end of the tar": (shard.path, -1),
        "last byte of the index": (shard.index_path, -1),
        "manifest's newline": (FILE_NAME, -1),
    }[where]
    data = bytearray((shards / path).read_bytes())
    data[offset] ^= 1
    (shards / path).write_bytes(data)
    assert [damage.file for damage in verify(Place.of(shards), 1).damages] == [path]


def test_every_damage_is_told_at_once(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, *_ = Manifest.load(shards).shards
    (shards / first.path).unlink()
    (shards / second.path).write_bytes((shards / second.path).read_bytes()[:-700])
    (shards / third.index_path).write_bytes((shards / third.index_path).read_bytes()[:-1])
    (shards / "train/notes.txt").write_text("mine")
    (shards / ".build").mkdir()
    next((shards / "manifests").iterdir()).write_text("{}")
    assert run("verify", str(shards)) == 1
    (shards / ".build").rmdir()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == sorted(
        [
            first.path,
            second.path,
            third.index_path,
            "train/notes.txt",
            ".build",
            next(iter((shards / "manifests").iterdir())).relative_to(shards).as_posix(),
        ]
    )
    assert lines[-1].endswith("damage in 6 places")
    assert "6 damaged files" in err


def rewrite(shards: Path, number: int, rows: Any) -> None:
    """Replace an index, hashes included, as a faulty writer would."""
    manifest = Manifest.load(shards)
    shard = manifest.shards[number]
    data = encode_index(rows)
    (shards / shard.index_path).write_bytes(data)
    changed = replace(shard, index_sha256=hashlib.sha256(data).hexdigest(), samples=len(rows))
    before, after = manifest.shards[:number], manifest.shards[number + 1 :]
    replace(manifest, shards=(*before, changed, *after)).save(shards)


@pytest.mark.parametrize(
    "field", ["key", "offset", "size", "digest", "expires_at", "stratum", "text_bytes", "modalities"]
)
def test_an_index_must_agree_with_its_tar_whatever_the_hashes_say(shards: Path, field: str) -> None:
    shard = Manifest.load(shards).shards[2]
    rows = read_index(shards / shard.index_path).copy()
    key = hex_keys(rows)[1]
    rows[field][1] = b"x" * 16 if field == "key" else rows[field][1] + 1
    rewrite(shards, 2, rows)
    assert verify(Place.of(shards), 1).damages == (
        Damage(shard.index_path, key, f"row 1: {field} is not that of the tar"),
    )


def test_a_missing_row_and_a_wrong_count(shards: Path) -> None:
    shard = Manifest.load(shards).shards[2]
    rows = np.array(read_index(shards / shard.index_path))  # not the mapped file, which is about to change
    rewrite(shards, 2, rows[1:])
    (damage,) = verify(Place.of(shards), 1).damages
    assert (damage.file, damage.key) == (shard.index_path, "")
    rewrite(shards, 2, rows)
    manifest = Manifest.load(shards)
    miscounted = replace(manifest.shards[0], strata={name: n + 1 for name, n in manifest.shards[0].strata.items()})
    replace(manifest, shards=(miscounted, *manifest.shards[1:])).save(shards)
    (damage,) = verify(Place.of(shards), 1).damages
    assert damage.file == FILE_NAME
    assert manifest.shards[0].path in damage.what


def test_a_sample_that_stands_twice_is_found(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "p.jsonl", [{"id": "a", "text": "t", "labels": {}, "split": "train"}])
    manifest = build(make_config(posts), tmp_path)
    shards = tmp_path / "shards"
    copy = replace(manifest.shards[0], path="train/train-00001.tar")
    for name in ("tar", "idx"):
        (shards / f"train/train-00001.{name}").write_bytes((shards / f"train/train-00000.{name}").read_bytes())
    replace(manifest, shards=(*manifest.shards, copy)).save(shards)
    damages = verify(Place.of(shards), 2).damages
    assert [(damage.file, damage.key) for damage in damages] == [
        (f"train/train-0000{number}.idx", post_key("a").hex()) for number in (0, 1)
    ]


def test_stats_count_everything(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", str(shards), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    manifest = Manifest.load(shards)
    assert (found["version"], found["parent"], found["manifest"]) == (2, manifest.parent, manifest.sha256)
    assert {name: split["posts"] for name, split in found["splits"].items()} == manifest.splits
    splits = found["splits"].values()
    hate = [(1, 0, 0, 1 / 3, None)[number % 5] for number in range(34)]
    expected = {
        "violating": hate.count(1),
        "benign": hate.count(0),
        "fraction": hate.count(1 / 3),
        "unknown": hate.count(None),
    }
    assert {state: sum(split["policies"]["hate"][state] for split in splits) for state in expected} == expected
    assert sum(split["languages"]["de"] for split in splits) == 17
    assert sum(split["modalities"]["image"] for split in splits) == 12
    assert sum(count for split in splits for count in split["strata"].values()) == 34
    sizes = sorted(len(post["text"].encode()) for post in make_posts(34))
    assert max(split["text_bytes"]["max"] for split in splits) == sizes[-1]
    assert found["bytes"] == sum(path.stat().st_size for path in shards.rglob("*.tar"))

    assert run("stats", str(shards)) == 0
    table = capsys.readouterr().out
    assert table.startswith("version 2: 34 posts")
    assert "text 3" not in table
    for word in ("hate", "de/hate", "image", "p90"):
        assert word in table


def test_stats_of_damaged_shards_are_an_error(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (Manifest.load(shards).shards[0].index_path, Manifest.load(shards).shards[1].path):
        data = (shards / path).read_bytes()
        (shards / path).write_bytes(data[:20])
        assert run("stats", str(shards)) == 2
        assert "crossguard" in capsys.readouterr().err
        (shards / path).unlink()
        assert run("stats", str(shards)) == 2
        assert "cannot be counted (FileNotFoundError)" in capsys.readouterr().err
        (shards / path).write_bytes(data)


def test_wrong_arguments_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ((), "name a tool"),
        (("verfy", "x"), "did you mean 'verify'"),
        (("verify",), "SHARDS being a folder"),
        (("stats", "a", "b"), "SHARDS being a folder"),
        (("verify", str(tmp_path)), "manifest.json: not found"),
        (("stats", str(tmp_path)), "manifest.json: not found"),
    ):
        assert run(*argv) == 2
        assert message in capsys.readouterr().err


def test_neither_needs_torch(shards: Path) -> None:
    code = (
        "import sys; from crossguard.recipes.shard_tools import stats, verify\n"
        f"verify([{str(shards)!r}]); stats([{str(shards)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_shards_behind_a_url(shards: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(shards)
    publish(shards, manifest, URL)
    verified = run_command(["crossguard", "shards", "verify", URL], shards)
    assert "34 samples" in verified.stdout
    assert "every bit is as it was written" in verified.stdout
    assert len({json.dumps(stats(Place.of(place), 1)) for place in (URL, f"{URL}/", str(shards))}) == 1
    first, second, *_ = manifest.shards
    data = bytearray((shards / first.path).read_bytes())
    data[700] ^= 1
    store = fsspec.filesystem("s3")
    store.pipe_file(f"{URL}/{first.path}", bytes(data))
    store.rm_file(f"{URL}/{second.index_path}")
    store.pipe_file(f"{URL}/train/notes.txt", b"mine")
    assert set(verify(Place.of(URL), 1).damages) == {
        Damage(first.path, key_at(shards, first.path, 700), "its bytes are not those that were written"),
        Damage(second.index_path, "", "cannot be read (No such file or directory)"),
        Damage("train/notes.txt", "", "no manifest lists it"),
    }
    with pytest.raises(UserError, match=rf"`crossguard shards verify {URL}` says what is wrong"):
        stats(Place.of(URL), 1)
    assert run("verify", "s3://shards/nothing") == 2
    assert "s3://shards/nothing/manifest.json" in capsys.readouterr().err
