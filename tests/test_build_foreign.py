"""Tars of other tools, without our index: every sample is found, indexed and can be read as one of ours."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset
from build_job import build, make_config, picture
from pyarrow import parquet
from rank_models import alone
from rank_training import RECIPE

from crossguard.configs.compose import compose
from crossguard.configs.errors import UserError
from crossguard.data.loading.reader import ShardReader
from crossguard.data.loading.sample import RawSample
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.folder import ShardFolder
from crossguard.data.shards.manifest import Manifest
from crossguard.data.shards.place import Place
from crossguard.data.shards.verify import verify
from crossguard.train.training import run_training

LONG = "a folder whose name is long/" * 8


def samples_of(run_dir: Path, manifest: Manifest) -> dict[str, RawSample]:
    """Every sample as training reads it, by id."""
    found = {}
    for split in manifest.splits:
        reader = ShardReader([ShardFolder(str(run_dir / "shards"), manifest)], split)
        found |= {sample.id: sample for sample in map(reader.read, range(len(reader)))}
    assert verify(Place.of(run_dir / "shards"), 1).damages == ()
    return found


def foreign(path: Path, columns: dict[str, str] | None = None, **settings: Any) -> Any:
    return make_config(path, data={"source": "webdataset", "columns": columns or {}}, **settings)


def img2dataset(folder: Path) -> None:
    """Two shards in the layout that img2dataset documents, each with its table and its statistics."""
    folder.mkdir()
    for shard in range(2):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(10):
                key = f"{shard:05d}{number:04d}"
                # What the download of the last one brought is no image.
                data = b"<html>" if (shard, number) == (1, 9) else picture("JPEG")
                about = {
                    "url": f"https://example.org/{key}.jpg",
                    "caption": f"caption {key}",
                    "is_spam": number % 2,
                    "moderation": {"hate": None if number == 3 else number / 10},
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 16,
                    "height": 12,
                    "exif": "{}",
                    "sha256": "00",
                }
                rows.append({**about, "moderation": None})
                for extension, content in (
                    ("jpg", data),
                    ("txt", about["caption"].encode()),  # type: ignore[attr-defined]
                    ("json", json.dumps(about, indent=4).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 10, "successes": 10}')


def test_a_folder_of_img2dataset(tmp_path: Path) -> None:
    img2dataset(tmp_path / "laion")
    columns = {"labels.spam": "is_spam", "labels.hate": "moderation.hate", "meta.url": "url"}
    manifest = build(foreign(tmp_path / "laion", columns, max_refused=0.1), tmp_path / "run")
    found = samples_of(tmp_path / "run", manifest)
    assert len(found) == 19
    assert manifest.refused == 1
    sample = found["000010004"]
    assert (sample.text, sample.images) == ("caption 000010004", [picture("JPEG")])
    assert sample.post["labels"] == {"hate": 0.4, "spam": 0.0}
    assert sample.post["meta"] == {"url": "https://example.org/000010004.jpg"}
    assert found["000000003"].post["labels"] == {"spam": 1.0}


def test_training_from_a_folder_of_img2dataset(tmp_path: Path) -> None:
    img2dataset(tmp_path / "laion")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    places = [f"recipe={tmp_path / 'tiny.yaml'}", f"data.path={tmp_path / 'laion'}", f"run_dir={tmp_path / 'run'}"]
    columns = ["data.source=webdataset", "data.columns={labels.spam: is_spam}", "build.max_refused=0.1"]
    config = compose([*places, *columns, "build.splits={train: 1.0, validation: 0.0, test: 0.0}", "train.max_steps=4"])
    manifest = build_shards(config, tmp_path / "run/shards", tmp_path / "run/quarantine.jsonl")
    run_training(config, alone())
    read = [json.loads(line)["ids"] for line in (tmp_path / "run/samples/rank-00000.jsonl").read_text().splitlines()]
    assert len(read) == 4
    # 32 positions: one epoch of the 19 samples and most of the next.
    assert {id for ids in read for id in ids} == samples_of(tmp_path / "run", manifest).keys()


@pytest.mark.parametrize("maxsize", [1e9, 30_000])
def test_shards_of_webdataset_with_dotted_members(tmp_path: Path, maxsize: float) -> None:
    (tmp_path / "wds").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "wds/part-%03d.tar"), maxsize=maxsize, verbose=0) as writer:
        for number in range(30):
            writer.write(
                {
                    "__key__": f"set/{number:04d}",
                    "0.jpg": picture("JPEG"),
                    "1.png": picture("PNG"),
                    "mask.png": picture("PNG"),
                    "caption.txt": f"caption {number}",
                    "label.cls": number % 2,
                    "meta.json": {"annotators": {"hate": number / 30}, "v1.0": {"lang": "de"}},
                    "scores.npy": b"not read",
                }
            )
    columns = {
        "text": "caption.txt",
        "labels.spam": "label.cls",
        "labels.hate": "meta.json.annotators.hate",
        "language": "meta.json.v1.0.lang",
    }
    manifest = build(foreign(tmp_path / "wds", columns), tmp_path / "run")
    found = samples_of(tmp_path / "run", manifest)
    assert len(found) == 30
    sample = found["set/0006"]
    assert (sample.text, sample.language) == ("caption 6", "de")
    assert sample.images == [picture("JPEG"), picture("PNG")]
    assert sample.post["labels"] == {"hate": 0.2, "spam": 0.0}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_format_of_tar(tmp_path: Path, form: int) -> None:
    keys = ["k", "ключ", LONG + "k"]
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        for key in keys:
            for extension, content in (("json", b'{"labels": {}, "text": "t"}'), ("png", picture())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mtime = len(content), 1.5
                tar.addfile(member, io.BytesIO(content))
            folder = tarfile.TarInfo("folder.d")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    manifest = build(foreign(tmp_path / "s.tar"), tmp_path / "run")
    assert samples_of(tmp_path / "run", manifest).keys() == set(keys)


def test_a_compressed_tar_is_read_too(tmp_path: Path) -> None:
    img2dataset(tmp_path / "laion")
    (tmp_path / "zipped").mkdir()
    data = gzip.compress((tmp_path / "laion/00000.tar").read_bytes())
    (tmp_path / "zipped/00000.tar.gz").write_bytes(data)
    columns = {"labels.spam": "is_spam"}
    manifest = build(foreign(tmp_path / "zipped", columns), tmp_path / "run")
    assert sum(manifest.splits.values()) == 10
    (tmp_path / "zipped/00000.tar.gz").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"00000.tar.gz: tar: cannot be read to its end \(EOFError\)"):
        build(foreign(tmp_path / "zipped", columns), tmp_path / "other")


def flipped(data: bytes) -> bytes:
    return data[:3] + bytes([data[3] ^ 1]) + data[4:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "cut short at byte"),
        (lambda data: data[:-10240].rstrip(b"\0")[:-20], "cut short at byte"),
        (lambda data: data[: 3 * 512 * 3], "cut short at byte"),
        (flipped, "a header whose checksum is wrong at byte 0"),
        (lambda data: b"", "empty"),
    ],
)
def test_a_damaged_tar_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    img2dataset(tmp_path / "laion")
    tar = tmp_path / "laion/00001.tar"
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(UserError, match=f"00001.tar: tar: cannot be read to its end .{message}"):
        build(foreign(tmp_path / "laion", {"labels.spam": "is_spam"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_no_sample_has_and_what_nobody_asked_for(tmp_path: Path) -> None:
    img2dataset(tmp_path / "laion")
    with pytest.raises(
        UserError, match=r"^data.columns.labels.spam=is_spm: no sample has it; did you mean 'is_spam'\?$"
    ):
        build(foreign(tmp_path / "laion", {"labels.spam": "is_spm"}), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"caption: no field of a post; say in data.columns what to read, as field: name"
    ):
        build(foreign(tmp_path / "laion"), tmp_path / "run")
