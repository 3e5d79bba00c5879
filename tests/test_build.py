"""Building: the same bytes every time, wrong posts all told, bad media refused, and kills that cost nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import clips
import pytest
from build_job import build, files_of, make_config, make_posts, picture, write_lines

from crossguard.configs.errors import UserError
from crossguard.data.records import epoch_seconds, post_key


def ids_in(shards: Path, split: str) -> list[str]:
    """Ids of a split in the order of its shards."""
    import tarfile

    found = []
    for path in sorted((shards / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(m))["id"] for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
    return found


def build_error(posts: Path, tmp_path: Path, **settings: Any) -> str:
    """The message of a build that must fail and leave nothing behind."""
    with pytest.raises(UserError) as caught:
        build(make_config(posts, **settings), tmp_path / "failed")
    assert not (tmp_path / "failed/shards").exists()
    return str(caught.value)


# --- the same bytes


def test_bytes_depend_neither_on_workers_nor_on_the_order_of_lines(tmp_path: Path) -> None:
    posts = make_posts(60)
    orders = [posts, posts[::-1], posts[30:] + posts[:30]]
    built = []
    for workers, order in enumerate(orders, start=1):
        folder = tmp_path / f"posts-{workers}"
        write_lines(folder / "a.jsonl", order[:30])
        write_lines(folder / "b.jsonl", order[30:])
        manifest = build(make_config(folder, num_workers=workers), tmp_path / f"run-{workers}")
        built.append((manifest, files_of(tmp_path / f"run-{workers}/shards")))
    assert built[0] == built[1] == built[2]
    assert sum(shard.samples for shard in built[0][0].shards) == 60


def test_a_finished_build_is_returned_and_never_overwritten(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "posts.jsonl", make_posts(20))
    manifest = build(make_config(posts), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert build(make_config(posts, num_workers=2, max_refused=0.5), tmp_path / "run") == manifest
    for other in (make_config(posts, samples_per_shard=9), make_config(posts, data={"limit": 5})):
        with pytest.raises(UserError, match="never overwritten"):
            build(other, tmp_path / "run")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_shards_built_elsewhere_need_no_posts(tmp_path: Path) -> None:
    manifest = build(make_config(write_lines(tmp_path / "posts.jsonl", make_posts(20))), tmp_path / "run")
    shards = str(tmp_path / "run/shards")
    assert build(make_config(None, data={"shards": shards}), tmp_path / "run") == manifest
    with pytest.raises(UserError, match=r"data\.path: not set"):
        build(make_config(None, data={"shards": shards}), tmp_path / "elsewhere")


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "posts.jsonl", make_posts(3))
    (tmp_path / "run/shards").mkdir(parents=True)
    (tmp_path / "run/shards/precious.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another folder"):
        build(make_config(posts), tmp_path / "run")
    assert os.listdir(tmp_path / "run/shards") == ["precious.txt"]


# --- what goes where


def test_posts_of_a_split_lie_in_the_order_of_their_keys(tmp_path: Path) -> None:
    posts = make_posts(50)
    for number, post in enumerate(posts[:20]):
        post["split"] = "unseen_language" if number % 2 else "train"
    manifest = build(make_config(write_lines(tmp_path / "p.jsonl", posts)), tmp_path / "run")
    assert sum(manifest.splits.values()) == 50
    assert manifest.splits["unseen_language"] == 10
    for split in manifest.splits:
        ids = ids_in(tmp_path / "run/shards", split)
        assert ids == sorted(ids, key=post_key)
        assert len(ids) == manifest.splits[split]
    assert {shard.samples for shard in manifest.shards_of("train")[:-1]} == {8}


def test_strata_are_language_by_rarest_policy_of_the_training_split(tmp_path: Path) -> None:
    def post(number: int, split: str, hate: float | None, spam: float | None) -> dict[str, Any]:
        labels = {"hate": hate, "spam": spam}
        return {"id": f"{number}", "text": "t", "language": "de", "split": split, "labels": labels}

    # In training, hate is more frequent than spam; in the test split it is the other way round.
    posts = [post(0, "train", 1, 0), post(1, "train", 0.5, None), post(2, "train", 1, 1), post(3, "train", 0.4, 0)]
    posts += [post(4, "train", None, 0), post(5, "train", None, None)]  # unknown is not benign
    posts += [post(number, "test", 0, 1) for number in range(10, 15)] + [post(20, "test", None, None)]
    manifest = build(make_config(write_lines(tmp_path / "p.jsonl", posts)), tmp_path / "run")
    assert manifest.rarity == ("spam", "hate")
    assert manifest.strata == ("de/benign", "de/hate", "de/spam", "de/unknown")
    totals: Counter[str] = Counter()
    for shard in manifest.shards_of("train"):
        totals.update(shard.strata)
    assert totals == {"de/benign": 2, "de/hate": 2, "de/spam": 1, "de/unknown": 1}


def test_the_limit_takes_the_posts_with_the_smallest_keys(tmp_path: Path) -> None:
    posts = write_lines(tmp_path / "p.jsonl", make_posts(40))
    manifest = build(make_config(posts, data={"limit": 10}), tmp_path / "run")
    assert manifest.left_out["limit"] == 30
    kept = {id for split in manifest.splits for id in ids_in(tmp_path / "run/shards", split)}
    assert kept == set(sorted((post["id"] for post in make_posts(40)), key=post_key)[:10])


def test_what_may_not_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    base = {"text": "t", "labels": {}}
    posts: list[dict[str, Any]] = [
        {"id": "kept", **base, "consent": True, "expires_at": "2026-01-01T00:00:01Z"},
        {"id": "no consent", **base, "consent": False},
        {"id": "expired", **base, "expires_at": "2026-01-01"},
        {"id": "restricted", "labels": {"hate": 1}, "restricted": True, "meta": {"pdq": "00ff"}},
    ]
    config = make_config(write_lines(tmp_path / "p.jsonl", posts))
    manifest = build(config, tmp_path / "run", now=epoch_seconds("2026-01-01T00:00:00Z"))
    assert manifest.left_out == {"restricted": 1, "no_consent": 1, "expired": 1, "limit": 0}
    assert sum(manifest.splits.values()) == 1
    everything = b"".join(files_of(tmp_path / "run").values())
    assert b"00ff" not in everything
    assert b'"kept"' in everything
    with pytest.raises(UserError, match="no post may be used"):
        build(config, tmp_path / "later", now=epoch_seconds("2027-01-01"))
    assert not (tmp_path / "later").exists()


# --- wrong posts


def test_all_wrong_lines_are_told_and_nothing_is_left(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"id": "1", "text": "secret", "labels": {"hate": 2}, "txt": "secret"},
        {"id": "2", "text": "secret", "labels": {}},
        {"id": "2", "text": "secret", "labels": {}},
        {"id": "3", "image": "../x.png", "labels": {}},
        {"id": "4", "text": "secret", "restricted": True, "labels": {}},
    ]
    posts = write_lines(tmp_path / "p.jsonl", lines)
    with posts.open("a") as file:
        file.write("{secret\n")
    write_lines(tmp_path / "q.jsonl", [{"id": "1", "labels": {}}, {"id": "2", "text": "t", "labels": {}}])
    message = build_error(tmp_path, tmp_path)
    assert "secret" not in message
    assert message.splitlines() == [
        "p.jsonl:1: txt: unknown field; did you mean 'text'? (free-form data goes under meta)",
        "p.jsonl:1: labels.hate: must lie between 0 and 1, not 2",
        "p.jsonl:4: image: leaves the posts' folder",
        "p.jsonl:5: restricted: a restricted post carries hashes under meta, never text",
        "p.jsonl:6: line: not valid JSON (Expecting property name enclosed in double quotes at character 1)",
        "q.jsonl:1: text: the post has neither text nor image, video or audio",
        "p.jsonl:3: id: stands already at p.jsonl:2",
        "q.jsonl:2: id: stands already at p.jsonl:2",
        "8 errors in the posts; nothing was built",
    ]
    shortened = build_error(tmp_path, tmp_path, max_errors_listed=7).splitlines()
    assert shortened[:6] == message.splitlines()[:6]
    assert shortened[6:] == [
        "p.jsonl:3: id: stands already at p.jsonl:2 (and 1 more like it)",
        "8 errors in the posts; nothing was built",
    ]
    shortened = build_error(tmp_path, tmp_path, max_errors_listed=2).splitlines()
    assert shortened[2:] == ["… and 6 more (build.max_errors_listed=2)", "8 errors in the posts; nothing was built"]


def test_a_wrong_column_is_told_once_and_hides_nothing(tmp_path: Path) -> None:
    rows = [f"p{number},yes,t,{2 if number == 150 else 0}" for number in range(300)]
    (tmp_path / "p.csv").write_text("\n".join(["id,labels.hate,text,labels.spam", *rows]))
    assert build_error(tmp_path / "p.csv", tmp_path, data={"source": "table"}).splitlines() == [
        "p.csv:2: labels.hate: must be a number between 0 and 1 or null, not a string (and 299 more like it)",
        "p.csv:152: labels.spam: must lie between 0 and 1, not 2",
        "301 errors in the posts; nothing was built",
    ]


def test_media_that_changed_without_changing_size_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    large = clips.video([0, 255]) + bytes(1 << 20)
    (tmp_path / "v.mp4").write_bytes(large)
    posts = [{"id": "1", "image": "a.png", "labels": {}}, {"id": "2", "video": "v.mp4", "labels": {}}]
    config = make_config(write_lines(tmp_path / "p.jsonl", posts))
    manifest = build(config, tmp_path / "run")
    for name, data in (("a.png", picture()[:-1] + b"x"), ("v.mp4", large[:-1] + b"x"), ("v.mp4", b"x" + large[1:])):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="other posts"):
            build(config, tmp_path / "run")
        (tmp_path / name).write_bytes(before)
    assert build(config, tmp_path / "run") == manifest


def test_no_posts_is_an_error(tmp_path: Path) -> None:
    assert "holds no posts" in build_error(write_lines(tmp_path / "p.jsonl", []), tmp_path)


@pytest.mark.parametrize("link", ["file", "folder", "through a folder"])
def test_a_link_out_of_the_posts_folder_is_an_error(tmp_path: Path, link: str) -> None:
    (tmp_path / "outside/sub").mkdir(parents=True)
    (tmp_path / "outside/secret.png").write_bytes(picture())
    (tmp_path / "posts").mkdir()
    (tmp_path / "posts/inside.png").write_bytes(picture())
    (tmp_path / "posts/fine.png").symlink_to("inside.png")
    path = {"file": "link.png", "folder": "link/secret.png", "through a folder": "link/../secret.png"}[link]
    target = {"file": "secret.png", "folder": "", "through a folder": "sub"}[link]
    (tmp_path / "posts" / path.partition("/")[0]).symlink_to(tmp_path / "outside" / target)
    posts = write_lines(
        tmp_path / "posts/p.jsonl",
        [{"id": "1", "image": "fine.png", "labels": {}}, {"id": "2", "image": path, "labels": {}}],
    )
    assert build_error(posts, tmp_path).splitlines()[:-1] == [
        "p.jsonl:2: image: leaves the posts' folder through a symbolic link"
    ]


# --- bad media


@pytest.fixture
def media_posts(tmp_path: Path) -> Path:
    """20 posts with pictures and 4 whose media cannot be used."""
    folder = tmp_path / "posts"
    folder.mkdir()
    (folder / "good.png").write_bytes(picture())
    (folder / "cut.jpg").write_bytes(picture("JPEG")[:-200])
    (folder / "really.png").write_bytes(b"GIF89a")
    (folder / "empty.mp4").write_bytes(b"")
    bad = [("image", "cut.jpg"), ("image", "gone.png"), ("image", "really.png"), ("video", "empty.mp4")]
    records = [{"id": f"good {number}", "image": "good.png", "labels": {}} for number in range(20)]
    records += [{"id": f"bad {path}", "text": "t", field: path, "labels": {}} for field, path in bad]
    return write_lines(folder / "p.jsonl", records)


def test_shards_of_another_taxonomy_are_refused_as_such(tmp_path: Path) -> None:
    config = make_config(write_lines(tmp_path / "p.jsonl", make_posts(10)))
    build(config, tmp_path)
    config.taxonomy.version = "2"
    with pytest.raises(UserError, match="taxonomy: the shards were built with 'test' version 1, the recipe names"):
        build(config, tmp_path)


def test_bad_media_are_left_out_and_quarantined(media_posts: Path, tmp_path: Path) -> None:
    quarantine = tmp_path / "run/quarantine.jsonl"
    quarantine.parent.mkdir()
    quarantine.write_text('{"id":"x","stage":"train"}\n{"id":"old","stage":"build"}\n')
    manifest = build(make_config(media_posts, max_refused=0.2, samples_per_shard=1), tmp_path / "run")
    assert manifest.refused == 4
    assert sum(manifest.splits.values()) == 20
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["bad cut.jpg", "bad empty.mp4", "bad gone.png", "bad really.png", "x"]
    assert lines[2] == {
        "id": "bad gone.png",
        "place": "p.jsonl:22",
        "reason": "image 'gone.png': missing",
        "stage": "build",
    }
    assert lines[1]["reason"] == "video 'empty.mp4': empty"


def test_too_many_bad_media_fail_the_build(media_posts: Path, tmp_path: Path) -> None:
    message = build_error(media_posts, tmp_path, max_refused=0.1, num_workers=2, samples_per_shard=4)
    assert "4 of 24 posts are refused" in message
    assert "build.max_refused=0.1" in message
    assert "p.jsonl:24: video 'empty.mp4': empty" in message
    assert "paths start from the folder of the posts' file" in message
    assert len((tmp_path / "failed/quarantine.jsonl").read_text().splitlines()) == 4
