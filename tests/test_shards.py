"""Shards as files: plain tars that webdataset reads, an index that finds every sample, a manifest that finds damage."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import clips
import numpy as np
import pytest
import xxhash
from build_job import build, files_of, make_config, make_posts, picture, write_lines

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import CacheConfig
from crossguard.configs.schema.taxonomy import PolicyConfig, TaxonomyConfig
from crossguard.data.records import parse_post, post_key
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.index import AUDIO, IMAGE, INDEX_DTYPE, TEXT, VIDEO, encode_index, hex_keys, read_index
from crossguard.data.shards.manifest import Manifest
from crossguard.data.sources import open_source
from crossguard.data.taxonomy import Taxonomy

MEDIA = {
    "1.jpg": picture("JPEG"),
    "2.png": picture("PNG"),
    "3.WEBP": picture("WEBP"),
    "v.MP4": clips.video([0, 255]),
    "a.flac": clips.recording(clips.tone(440, 0.1)),
}
TEXTS = '{"comments":["first","второй"],"ocr":"SALE"}'.encode()


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """40 text posts and one with every modality."""
    for name, data in MEDIA.items():
        (tmp_path / name).write_bytes(data)
    everything = {
        "id": "everything",
        "text": "t",
        "ocr": "SALE",
        "comments": ["first", "второй"],
        "language": "ar",
        "images": ["1.jpg", "2.png", "3.WEBP"],
        "video": "v.MP4",
        "audio": "a.flac",
        "labels": {"hate": 1, "spam": 0.5},
        "severity": {"hate": 3},
        "split": "test",
        "expires_at": "2100-01-01",
        "meta": {"any": "thing"},
    }
    one = {"id": "one", "image": "2.png", "labels": {}, "split": "test"}
    return write_lines(tmp_path / "posts.jsonl", [*make_posts(40), everything, one])


def test_webdataset_finds_every_sample(posts: Path, tmp_path: Path) -> None:
    import webdataset

    manifest = build(make_config(posts), tmp_path / "run")
    found = {}
    for shard in manifest.shards:
        tar = str(tmp_path / "run/shards" / shard.path)
        samples = list(webdataset.WebDataset(tar, shardshuffle=False, empty_check=False).decode())
        assert len(samples) == shard.samples
        found.update({sample["__key__"]: sample for sample in samples})
    assert len(found) == 42 == sum(manifest.splits.values())
    for post in make_posts(40):
        sample = found[post_key(post["id"]).hex()]
        assert sample["txt"] == post["text"]
        assert sample["json"]["id"] == post["id"]
        assert sample["json"]["labels"] == {name: label for name, label in post["labels"].items() if label is not None}
    everything = found[post_key("everything").hex()]
    assert everything["texts.json"] == {"ocr": "SALE", "comments": ["first", "второй"]}
    assert everything["json"] == {
        "id": "everything",
        "language": "ar",
        "labels": {"hate": 1.0, "spam": 0.5},
        "severity": {"hate": 3},
        "split": "test",
        "expires_at": "2100-01-01",
        "meta": {"any": "thing"},
    }


def test_members_have_their_order_and_neither_time_nor_owner(posts: Path, tmp_path: Path) -> None:
    build(make_config(posts), tmp_path / "run")
    members = []
    for path in sorted((tmp_path / "run/shards/test").glob("*.tar")):
        with tarfile.open(path) as tar:
            members += tar.getmembers()
            contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            key = post_key("everything").hex()
            if f"{key}.json" in contents:
                names = [name.partition(".")[2] for name in contents if name.startswith(key)]
                assert names == ["json", "texts.json", "txt", "0.jpg", "1.png", "2.webp", "mp4", "flac"]
                assert [contents[f"{key}.{name}"] for name in names[3:]] == list(MEDIA.values())
                assert contents[f"{key}.texts.json"] == TEXTS
    assert f"{post_key('one').hex()}.png" in [member.name for member in members]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_the_index_finds_every_sample(posts: Path, tmp_path: Path) -> None:
    manifest = build(make_config(posts), tmp_path / "run")
    seen = set()
    for shard in manifest.shards:
        tar = (tmp_path / "run/shards" / shard.path).read_bytes()
        rows = read_index(tmp_path / "run/shards" / shard.index_path)
        assert len(rows) == shard.samples
        by_stratum = list(zip(rows["stratum"].tolist(), rows["key"].tolist(), strict=True))
        assert by_stratum == sorted(by_stratum)
        assert [manifest.strata[row] for row in rows["stratum"]] == [
            s for s, n in shard.strata.items() for _ in range(n)
        ]
        for row, key in zip(rows, hex_keys(rows), strict=True):
            start, end = int(row["offset"]), int(row["offset"] + row["size"])
            assert xxhash.xxh3_64_intdigest(tar[start:end]) == row["digest"]
            assert tar[start:].startswith(f"{key}.json".encode())
            if key == post_key("everything").hex():
                assert row["modalities"] == TEXT | IMAGE | VIDEO | AUDIO
                assert row["expires_at"] == 4102444800
                assert row["text_bytes"] == 1 + len(TEXTS)
                assert manifest.strata[row["stratum"]] == f"ar/{manifest.rarity[0]}"
            seen.add(key)
        # In the tar, samples follow each other by key without a gap, up to the end-of-archive blocks.
        rows = np.sort(rows, order="offset")
        assert list(rows["key"]) == sorted(rows["key"])
        assert int(rows["offset"][0]) == 0
        np.testing.assert_array_equal(rows["offset"][1:], (rows["offset"] + rows["size"])[:-1])
        assert int(rows["offset"][-1] + rows["size"][-1]) + 1024 == shard.bytes == len(tar)
    assert len(seen) == 42


def test_keys_that_end_in_zero_bytes_keep_them() -> None:
    rows = np.zeros(2, dtype=INDEX_DTYPE)
    rows["key"] = [b"\x01" * 14 + b"\0\0", b"\0" * 16]
    assert hex_keys(rows) == ["01" * 14 + "0000", "00" * 16]


def test_a_damaged_index_is_told(tmp_path: Path) -> None:
    rows = np.zeros(2, dtype=INDEX_DTYPE)
    path = tmp_path / "a.idx"
    path.write_bytes(encode_index(rows))
    np.testing.assert_array_equal(read_index(path), rows)
    for damaged, message in ((encode_index(rows)[:-1], "cut short"), (b"PK", "not an index")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            read_index(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_index(path)


def test_a_manifest_is_canonical_and_finds_its_own_damage(posts: Path, tmp_path: Path) -> None:
    manifest = build(make_config(posts), tmp_path / "run")
    shards = tmp_path / "run/shards"
    path = shards / "manifest.json"
    assert Manifest.load(shards) == manifest
    content = path.read_text()
    assert str(tmp_path) not in content
    listed = {
        "manifest.json",
        *(shard.path for shard in manifest.shards),
        *(shard.index_path for shard in manifest.shards),
    }
    assert set(files_of(shards)) == listed

    path.write_text(content.replace('"refused":0', '"refused":1'))
    with pytest.raises(UserError, match="damaged"):
        Manifest.load(shards)
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Manifest.load(shards)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Manifest.load(shards)
    path.unlink()
    with pytest.raises(UserError, match="build the shards first"):
        Manifest.load(shards)


@pytest.mark.parametrize("what", ["tar grown", "tar cut", "tar missing", "index missing", "split missing"])
def test_shards_that_are_lost_are_reported(posts: Path, tmp_path: Path, what: str) -> None:
    manifest = build(make_config(posts), tmp_path / "run")
    folder = ShardFolder.open(tmp_path / "run/shards", CacheConfig())
    assert folder.check_files() == []
    shard = manifest.shards[1]
    path = tmp_path / "run/shards" / (shard.index_path if "index" in what else shard.path)
    if what == "split missing":
        shutil.rmtree(path.parent)
    elif "missing" in what:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"x" if "grown" in what else path.read_bytes()[:-1])
    lost = manifest.shards_of(shard.split) if what == "split missing" else (shard,)
    assert folder.check_files() == list(lost)


def test_an_index_that_changed_after_the_manifest_is_found(posts: Path, tmp_path: Path) -> None:
    manifest = build(make_config(posts), tmp_path / "run")
    path = tmp_path / "run/shards" / manifest.shards[1].index_path
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{path.name}: changed since the manifest was written"):
        ShardFolder.open(tmp_path / "run/shards", CacheConfig()).check_files()


def test_another_taxonomy_is_named(posts: Path, tmp_path: Path) -> None:
    manifest = build(make_config(posts), tmp_path / "run")

    def taxonomy(version: str, *names: str) -> Taxonomy:
        policies = [PolicyConfig(name=name, description="another sentence") for name in names]
        return Taxonomy.from_config(TaxonomyConfig("test", version, policies))

    manifest.check_taxonomy(taxonomy("1", "hate", "spam"))
    for version, names, message in (
        ("2", ("hate", "spam"), "version 1.* version 2"),
        ("1", ("hate", "violence"), "missing in the recipe: spam; missing in the shards: violence"),
        ("1", ("spam", "hate"), "another order"),
    ):
        with pytest.raises(UserError, match=message):
            manifest.check_taxonomy(taxonomy(version, *names))


def test_shards_are_a_source_again(posts: Path, tmp_path: Path) -> None:
    config = make_config(posts)
    first = build(config, tmp_path / "first")
    again = make_config(tmp_path / "first/shards", data={"source": "webdataset"})
    second = build(again, tmp_path / "second")
    assert [shard.sha256 for shard in second.shards] == [shard.sha256 for shard in first.shards]
    taxonomy = Taxonomy.from_config(config.taxonomy)
    ids = {parse_post(record.raw or {}, taxonomy).id for record in open_source(again.data, taxonomy, 0).records()}
    assert ids == {post["id"] for post in make_posts(40)} | {"everything", "one"}
