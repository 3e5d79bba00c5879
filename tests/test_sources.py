"""Sources: the same posts arrive from JSON lines, tables, Hugging Face datasets and tars of other tools."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import build_job
import pytest
from PIL import Image

from crossguard.configs.errors import UserError
from crossguard.configs.schema import DataConfig
from crossguard.configs.schema.taxonomy import PolicyConfig, TaxonomyConfig
from crossguard.data.records import Post, parse_post
from crossguard.data.sources import Source, open_source
from crossguard.data.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_config(
    TaxonomyConfig(name="test", policies=[PolicyConfig(name="hate"), PolicyConfig(name="spam")])
)
EXPECTED = [
    Post("a", text="eins", language="de", labels={"hate": 1.0, "spam": 0.0}, severity={"hate": 2}, split="train"),
    Post("b", text='zwei,\n"drei"', language="de", labels={"spam": 0.5}, consent=True, group="7"),
]


def picture(color: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(data, "PNG")
    return data.getvalue()


def source(kind: str, path: Path | None, **settings: Any) -> Source:
    return open_source(DataConfig(source=kind, path=str(path) if path else None, **settings), TAXONOMY, seed=0)


def posts(opened: Source) -> list[Post]:
    found = []
    for place, raw, error, _ in opened.records():
        assert raw is not None, f"{place}: {error}"
        found.append(parse_post(raw, TAXONOMY))
    return found


def errors(opened: Source) -> list[str]:
    return [f"{record.place}: {record.error}" for record in opened.records() if record.error]


def jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# --- JSON lines


def test_json_lines_of_a_folder_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "2", "text": "t", "labels": {}}\r\n\n{"id": "3"}')
    jsonl(tmp_path / "a.jsonl", {"id": "1", "text": "t", "labels": {}})
    (tmp_path / "notes.txt").write_text("not posts")
    records = list(source("jsonl", tmp_path).records())
    assert [record.place for record in records] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:3"]
    assert records[1].raw == {"id": "2", "text": "t", "labels": {}}
    assert records[0].media_root == tmp_path


def test_lines_that_are_no_objects_are_told_apart(tmp_path: Path) -> None:
    lines = [
        b'{"id": "1"',
        b"[1]",
        b'{"id": "\xff"}',
        b'{"id": "1", "id": "2"}',
        b'{"labels": {"hate": NaN}}',
        b"[" * 99999,
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    found = errors(source("jsonl", tmp_path / "p.jsonl"))
    wanted = ["not valid JSON", "must be a JSON object", "not valid UTF-8 at byte 8", "same key twice", "NaN", "line: "]
    assert len(found) == len(wanted)
    for number, (error, part) in enumerate(zip(found, wanted, strict=True), start=1):
        assert error.startswith(f"p.jsonl:{number}: line: ")
        assert part in error


def test_a_fingerprint_follows_content_and_media_but_neither_names_nor_order(tmp_path: Path) -> None:
    one, two = {"id": "1", "image": "img.png", "labels": {}}, {"id": "2", "text": "t", "labels": {}}
    prints = []
    for name, files in {"x": {"a": one, "b": two}, "y": {"a": two, "b": one}, "z": {"a": one, "b": two}}.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, record in files.items():
            jsonl(folder / f"{file}.jsonl", record)
        if name != "z":
            (folder / "img.png").write_bytes(picture())
        prints.append(source("jsonl", folder).fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("jsonl", {"columns": {"text": "tweet"}}, "data.columns"),
        ("jsonl", {"options": {"x": 1}}, "data.options.x"),
        ("table", {"columns": {"txt": "tweet"}}, "did you mean 'text'"),
        ("table", {"columns": {"labels.hat": "tweet"}}, "did you mean 'labels.hate'"),
        ("hf", {"options": {"splits": "train"}}, "did you mean 'split'"),
        ("webdataset", {"media_dir": "img"}, "data.media_dir"),
        ("no_module_of_mine:Source", {}, "no_module_of_mine"),
    ],
)
def test_settings_that_a_source_does_not_have(
    tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    jsonl(tmp_path / "p.jsonl", {"id": "1"})
    with pytest.raises(UserError, match=message):
        source(kind, tmp_path, **settings)


@pytest.mark.parametrize("kind", ["jsonl", "table", "webdataset"])
def test_nothing_there(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="the folder holds no"):
        source(kind, tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        source(kind, tmp_path / "missing")
    with pytest.raises(UserError, match="not set"):
        source(kind, None)


def test_a_source_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "class Mine:\n    def __init__(self, config, taxonomy, seed):\n        self.seed = seed\n"
    (tmp_path / "my_source.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    assert source("my_source:Mine", None).seed == 0  # type: ignore[attr-defined]


# --- tables

HEADER = ["id", "text", "language", "labels.hate", "labels.spam", "severity.hate", "split", "consent", "group"]
ROWS = [
    ["a", "eins", "de", "1", "False", "2", "train", "", ""],
    ["b", 'zwei,\n"drei"', "de", "", "0.5", "", "", "TRUE", "7"],
]


def write_csv(path: Path, header: list[str], rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def test_csv_with_columns_named_like_fields(tmp_path: Path) -> None:
    assert posts(source("table", write_csv(tmp_path / "p.csv", HEADER, ROWS))) == EXPECTED
    assert posts(source("table", write_csv(tmp_path / "p.tsv", HEADER, ROWS, "\t"))) == EXPECTED


def test_csv_with_mapped_columns_and_a_media_folder(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "p.csv", ["nr", "tweet", "bad", "likes", "pic"], [["1", "t", "0", "5", "a.png"]])
    columns = {"id": "nr", "text": "tweet", "labels.hate": "bad", "meta.likes": "likes", "image": "pic"}
    (tmp_path / "media").mkdir()
    opened = source("table", path, columns=columns, media_dir=str(tmp_path / "media"))
    assert posts(opened) == [Post("1", text="t", labels={"hate": 0.0}, meta={"likes": "5"}, images=("a.png",))]
    assert next(opened.records()).media_root == tmp_path / "media"


def test_wrong_tables(tmp_path: Path) -> None:
    unnamed = write_csv(tmp_path / "unnamed.csv", ["id", "text", "label.hate"], [])
    with pytest.raises(UserError, match=r"column 'label.hate' is no field of a post; did you mean 'labels.hate'"):
        list(source("table", unnamed).records())
    with pytest.raises(UserError, match=r"data.columns.text=tekst: .* no such column; did you mean 'text'"):
        list(source("table", unnamed, columns={"text": "tekst"}).records())
    ragged = write_csv(tmp_path / "ragged.csv", ["id", "text"], [["a", "two\nlines"], ["b"], ["c", "t", "x"]])
    assert errors(source("table", ragged)) == [
        "ragged.csv:4: line: 1 cells, the header has 2",
        "ragged.csv:5: line: 3 cells, the header has 2",
    ]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        list(source("table", tmp_path / "broken.parquet").records())


def test_parquet_with_types_and_embedded_images(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(
        {
            "id": [7, 8],
            "image": [{"bytes": picture(), "path": None}, None],
            "text": [None, "t"],
            "labels.hate": pa.array([1, None], pa.int8()),
            "labels.spam": pa.array([None, float("nan")], pa.float32()),
            "created_at": pa.array([0, None], pa.timestamp("s", "UTC")),
            "restricted": [False, None],
        }
    )
    parquet.write_table(table, tmp_path / "p.parquet")
    first, second = posts(source("table", tmp_path / "p.parquet"))
    assert first == Post("7", images=(picture(),), labels={"hate": 1.0}, created_at="1970-01-01T00:00:00+00:00")
    assert second == Post("8", text="t")


def test_every_source_passes_on_what_is_written_beside_the_caption(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    comments = ["erster", "второй"]
    record = {"id": "a", "ocr": "SALE", "transcript": "hello", "comments": comments, "labels": {}, "split": "train"}
    expected = [Post("a", ocr="SALE", transcript="hello", comments=tuple(comments), split="train")]
    lines = jsonl(tmp_path / "a.jsonl", record)
    assert posts(source("jsonl", lines)) == expected
    cells = ["a", "SALE", "hello", json.dumps(comments), "{}", "train"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(record), cells])
    assert posts(source("table", tmp_path / "a.csv")) == expected
    columns = {name: [value] for name, value in record.items() if name != "labels"} | {"labels.hate": [None]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert posts(source("table", tmp_path / "a.parquet")) == expected
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    assert posts(source("hf", tmp_path / "saved")) == expected
    build_job.build(build_job.make_config(lines), tmp_path / "run")
    assert posts(source("webdataset", tmp_path / "run/shards/train")) == [replace(expected[0], language="und")]


# --- Hugging Face datasets


def test_a_saved_dataset_keeps_its_splits_and_images(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"tweet": datasets.Value("string"), "bad": datasets.ClassLabel(2), "img": datasets.Image()}
    )
    rows = {"tweet": ["eins", "zwei"], "bad": [0, 1], "img": [{"bytes": picture(), "path": None}, None]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "dev": part.select([1])}).save_to_disk(str(tmp_path / "saved"))
    columns = {"text": "tweet", "labels.hate": "bad", "image": "img"}
    found = posts(source("hf", tmp_path / "saved", columns=columns))
    assert found[0] == Post("train-0", text="eins", images=(picture(),), labels={"hate": 0.0}, split="train")
    assert [(post.id, post.split) for post in found[1:]] == [("train-1", "train"), ("dev-0", "dev")]

    renamed = source("hf", tmp_path / "saved", columns=columns, options={"split": {"dev": "validation"}})
    assert [(post.id, post.split) for post in posts(renamed)] == [("dev-0", "validation")]
    with pytest.raises(UserError, match=r"no split 'tran'; did you mean 'train'"):
        source("hf", tmp_path / "saved", columns=columns, options={"split": "tran"})


def test_a_folder_of_data_files_is_loaded_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    jsonl(folder / "train.jsonl", {"id": "a", "text": "eins", "labels": {"hate": 1.0, "spam": None}})
    assert posts(source("hf", folder)) == [Post("a", text="eins", labels={"hate": 1.0})]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        source("hf", tmp_path / "empty")


# --- WebDataset tars


def test_tars_written_by_webdataset_itself(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"k{number}", "txt": f"t{number}", "png": picture(), "cls": number % 2})
    found = posts(source("webdataset", tmp_path, columns={"labels.hate": "cls"}))
    assert found == [
        Post(f"k{number}", text=f"t{number}", images=(picture(),), labels={"hate": float(number % 2)})
        for number in range(3)
    ]


def test_tars_of_img2dataset(tmp_path: Path) -> None:
    about = {"url": "https://example.org/1.jpg", "caption": "c", "key": "000000001", "spam": None, "status": "success"}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "000000001.jpg", picture())
        add(tar, "000000001.txt", b"c")
        add(tar, "000000001.json", json.dumps(about).encode())
    columns = {"labels.spam": "spam", "meta.url": "url"}
    assert posts(source("webdataset", tmp_path, columns=columns)) == [
        Post("000000001", text="c", images=(picture(),), meta={"url": "https://example.org/1.jpg"})
    ]


def test_a_mapped_field_that_no_sample_has_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "k.json", b'{"txt": "t", "toxicity": 1}')
        add(tar, "l.json", b'{"txt": "t"}')
    assert posts(source("webdataset", tmp_path, columns={"text": "txt", "labels.hate": "toxicity"}))[0].labels == {
        "hate": 1.0
    }
    misspelled = source("webdataset", tmp_path, columns={"text": "txt", "labels.hate": "toxicty"})
    message = r"data.columns.labels.hate=toxicty: no sample has it; did you mean 'toxicity'\?"
    with pytest.raises(UserError, match=message):
        misspelled.fingerprint()


def test_several_images_keep_their_order(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "dir/k.json", b'{"id": "p", "labels": {}}')
        for number in range(11):
            add(tar, f"dir/k.{number}.png", b"%d" % number)
    assert posts(source("webdataset", tmp_path))[0].images == tuple(b"%d" % number for number in range(11))


def test_pickled_members_are_never_opened(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "k.txt", b"t")
        add(tar, "k.pyd", b"cos\nsystem\n")
        add(tar, "l.json", b"[]")
        add(tar, "m.cls", b"one")
    found = errors(source("webdataset", tmp_path))
    assert found[0].startswith("s.tar:k: pyd: may hold pickled objects")
    assert found[1:] == ["s.tar:l: json: must be a JSON object", "s.tar:m: cls: must be a whole number"]


def test_a_truncated_tar_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "k.txt", b"t" * 5000)
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:2000])
    assert errors(source("webdataset", tmp_path)) == ["s.tar: tar: cannot be read to its end (cut short at byte 0)"]
