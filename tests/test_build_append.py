"""Appending: new posts get new shards, what is there stays untouched, and what cannot be added is an error."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_job import build, build_line, files_of, make_config, make_posts, picture, write_lines

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.schema.taxonomy import PolicyConfig
from crossguard.data.records import post_key
from crossguard.data.shards.index import hex_keys, read_index
from crossguard.data.shards.manifest import Manifest, version_name
from crossguard.recipes.job import Job
from crossguard.recipes.stages import BUILD, run_stage

NIGHTLY = """
defaults:
  - override /model: small
taxonomy: {name: test, policies: [{name: hate}, {name: spam}]}
data: {path: posts.jsonl}
build: {append: true, samples_per_shard: 8, num_workers: 1}
"""
Stamps = dict[str, tuple[int, int]]


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """40 posts, some with pictures; the first 30 are built in `run`."""
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture(color=(1, 2, 3)))
    return tmp_path / "posts.jsonl"


def some(start: int, stop: int) -> list[dict[str, Any]]:
    return [{**post, "image": "a.png"} if number % 4 == 0 else post for number, post in enumerate(make_posts(stop))][
        start:
    ]


def appending(posts: Path, **settings: Any) -> Config:
    return make_config(posts, append=True, **settings)


def stamps(folder: Path) -> Stamps:
    """Inode and time of every file: neither changes unless it is written again."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def test_new_posts_get_new_shards_and_the_old_ones_stay(posts: Path, tmp_path: Path) -> None:
    shards = tmp_path / "run/shards"
    first = build(appending(write_lines(posts, some(0, 30))), tmp_path / "run")
    assert (first.version, first.parent) == (1, "")
    before = stamps(shards)
    second = build(appending(write_lines(posts, some(0, 40)[::-1])), tmp_path / "run")
    assert (second.version, second.parent) == (2, first.sha256)
    assert second.shards[: len(first.shards)] == first.shards
    new = second.shards[len(first.shards) :]
    assert {shard.path for shard in new}.isdisjoint(shard.path for shard in first.shards)
    assert new[0].path == f"test/test-{len(first.shards_of('test')):05d}.tar"
    assert Manifest.load(shards) == second
    assert Manifest.load(shards, version_name(first.sha256)) == first
    after = stamps(shards)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: stamp for name, stamp in before.items() if name != "manifest.json"
    }
    keys = [key for shard in second.shards for key in hex_keys(read_index(shards / shard.index_path))]
    assert Counter(keys) == Counter(post_key(post["id"]).hex() for post in some(0, 40))

    third = build(appending(write_lines(posts, some(0, 43))), tmp_path / "run")
    assert (third.version, third.parent) == (3, second.sha256)
    assert Manifest.load(shards, version_name(second.sha256)) == second
    listed = {path for shard in third.shards for path in (shard.path, shard.index_path)}
    assert set(files_of(shards)) == listed | {
        "manifest.json",
        version_name(first.sha256),
        version_name(second.sha256),
    }


def test_strata_grow_at_their_end_and_rarity_is_inherited(posts: Path, tmp_path: Path) -> None:
    def post(number: int, language: str, policy: str) -> dict[str, Any]:
        return {"id": f"{number}", "text": "t", "language": language, "split": "train", "labels": {policy: 1}}

    old = [post(0, "de", "hate"), post(1, "de", "spam"), post(2, "de", "spam")]
    first = build(appending(write_lines(posts, old)), tmp_path / "run")
    assert first.rarity == ("hate", "spam")
    assert first.strata == ("de/hate", "de/spam")
    # Now hate is the more frequent one, and a language arrives that sorts before all others.
    new = [post(number, "ar", "hate") for number in range(3, 9)] + [
        {**post(9, "de", "hate"), "labels": {"hate": 1, "spam": 1}}
    ]
    second = build(appending(write_lines(posts, old + new)), tmp_path / "run")
    assert second.rarity == first.rarity
    assert second.strata == ("de/hate", "de/spam", "ar/hate")
    assert second.shards[-1].strata == {"de/hate": 1, "ar/hate": 6}
    index = read_index(tmp_path / "run/shards" / second.shards[-1].index_path)
    assert np.bincount(index["stratum"]).tolist() == [1, 0, 6]


def test_bytes_do_not_depend_on_workers(posts: Path, tmp_path: Path) -> None:
    results = []
    for workers in (1, 2):
        run = tmp_path / f"run-{workers}"
        for stop in (20, 60):
            manifest = build(
                appending(write_lines(posts, some(0, stop)), num_workers=workers, samples_per_shard=3), run
            )
        results.append((manifest, files_of(run / "shards")))
    assert results[0] == results[1]


def test_where_no_post_is_new_nothing_changes(posts: Path, tmp_path: Path) -> None:
    shards = tmp_path / "run/shards"
    first = build(make_config(write_lines(posts, some(0, 30))), tmp_path / "run")
    before = stamps(shards)
    assert build(appending(posts), tmp_path / "run") == first
    # A post that may not be used is none for the shards; nor is another order of the lines, or another shard size.
    more = [*some(0, 30), {"id": "no", "text": "t", "labels": {}, "consent": False}]
    assert build(appending(write_lines(posts, more)), tmp_path / "run") == first
    assert build(appending(write_lines(posts, more[::-1]), samples_per_shard=5), tmp_path / "run") == first
    assert stamps(shards) == before


def test_posts_that_changed_or_are_gone_are_named(posts: Path, tmp_path: Path) -> None:
    old = [{**post, "id": f"p{number}"} for number, post in enumerate(some(0, 30))]
    build(make_config(write_lines(posts, old)), tmp_path / "run")
    before = stamps(tmp_path / "run/shards")
    new = [dict(post) for post in old] + [{"id": "new", "text": "t", "labels": {}}]
    new[1]["labels"] = {"hate": 0.25}
    new[2]["text"] = "secret"
    new[3]["split"] = "other"
    new[4]["image"] = "b.png"
    new[5]["consent"] = False
    del new[7]
    with pytest.raises(UserError) as caught:
        build(appending(write_lines(posts, new)), tmp_path / "run")
    *lines, remedy = str(caught.value).splitlines()
    assert lines[:5] == [f"posts.jsonl:{number + 1}: p{number}: changed" for number in range(1, 6)]
    assert len(lines) == 6
    assert lines[5].endswith(".tar: p7: gone from the posts")
    assert "5 changed and 1 gone" in remedy
    assert "data.shards=NEW_FOLDER" in remedy
    assert stamps(tmp_path / "run/shards") == before

    # A picture of the same name and size with other content has changed as well.
    (tmp_path / "a.png").write_bytes(bytes([*picture()[:-1], 0]))
    with pytest.raises(UserError, match="8 changed"):
        build(appending(write_lines(posts, [*old, *new[-1:]])), tmp_path / "run")
    assert stamps(tmp_path / "run/shards") == before


def test_settings_that_the_shards_were_not_built_with(posts: Path, tmp_path: Path) -> None:
    build(make_config(write_lines(posts, some(0, 30))), tmp_path / "run")
    config = appending(posts)
    config.taxonomy.policies.append(PolicyConfig(name="violence"))
    with pytest.raises(UserError, match="missing in the shards: violence"):
        build(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"never overwritten.*build\.append=true"):
        build(make_config(write_lines(posts, some(0, 31))), tmp_path / "run")
    with pytest.raises(UserError, match="changed"):
        build(appending(posts, splits={"train": 0.1, "test": 0.9}), tmp_path / "run")


def test_what_expired_since_stays_and_what_is_left_out_is_counted_once(posts: Path, tmp_path: Path) -> None:
    old = [{"id": f"{n}", "text": "t", "labels": {}, "expires_at": "2026-06-01"} for n in range(5)]
    left_out = [{"id": "no", "text": "t", "labels": {}, "consent": False}]
    bad = [{"id": "bad", "image": "gone.png", "labels": {}}]
    first = build(appending(write_lines(posts, old + left_out + bad), max_refused=0.2), tmp_path / "run", now=0)
    assert (first.left_out["no_consent"], first.refused) == (1, 1)
    later = 1.8e9
    more = [{"id": "new", "text": "t", "labels": {}}, {**old[0], "id": "late"}, {**left_out[0], "id": "no too"}]
    config = appending(write_lines(posts, old + left_out + bad + more), max_refused=0.2)
    second = build(config, tmp_path / "run", now=later)
    assert sum(second.splits.values()) == 6
    assert second.left_out == {"restricted": 0, "no_consent": 2, "expired": 1, "limit": 0}
    assert second.refused == 1
    # The media of a refused post was mended: now it is a new one.
    (tmp_path / "gone.png").write_bytes(picture())
    third = build(config, tmp_path / "run", now=later)
    assert third.version == 3
    assert (sum(third.splits.values()), third.refused) == (7, 0)
    moved = [{**old[0], "expires_at": "2026-05-01"}]
    with pytest.raises(UserError, match="1 changed"):
        build(appending(write_lines(posts, moved + old[1:] + left_out + bad + more)), tmp_path / "run", now=later)


def test_the_limit_counts_the_posts_that_are_there(posts: Path, tmp_path: Path) -> None:
    build(appending(write_lines(posts, make_posts(20)), data={"limit": 25}), tmp_path / "run")
    manifest = build(appending(write_lines(posts, make_posts(40)), data={"limit": 25}), tmp_path / "run")
    assert sum(manifest.splits.values()) == 25
    assert manifest.left_out["limit"] == 15


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("append.compare", 1),
        ("plan.write_atomic", 1),
        ("writer.encode_index", 2),
        ("build.Manifest.keep", 1),  # every shard is done
        ("manifest.write_atomic", 2),  # the old manifest is kept, the new one is not in place
        ("workspace.shutil.rmtree", 2),  # the new one is
    ],
)
def test_a_killed_append_goes_on_and_another_one_removes_it(
    posts: Path, tmp_path: Path, function: str, call: int
) -> None:
    for name in ("whole", "run", "other"):
        build(make_config(write_lines(posts, some(0, 8)), samples_per_shard=2), tmp_path / name)
    old = files_of(tmp_path / "run/shards")
    write_lines(posts, some(0, 14))
    whole = build(appending(posts, samples_per_shard=2), tmp_path / "whole")
    for name in ("run", "other"):
        line = build_line(posts, tmp_path / name, 1, f"crossguard.data.shards.{function}", str(call))
        ended = subprocess.run([*line, "append"], stderr=subprocess.DEVNULL, check=False)
        assert ended.returncode == -signal.SIGKILL
        found = files_of(tmp_path / name / "shards")
        assert {path: found[path] for path in old if path != "manifest.json"} == {
            path: data for path, data in old.items() if path != "manifest.json"
        }
        assert Manifest.load(tmp_path / name / "shards")
    assert build(appending(posts, samples_per_shard=2), tmp_path / "run") == whole
    assert files_of(tmp_path / "run/shards") == files_of(tmp_path / "whole/shards")

    # Where the next build is one of other posts, nothing is left of the one that was killed before its manifest.
    finished = function.startswith("workspace")
    write_lines(posts, [*some(0, 14), *make_posts(16)[15:]] if finished else [*some(0, 8), *make_posts(16)[15:]])
    manifest = build(appending(posts, samples_per_shard=2), tmp_path / "other")
    assert manifest.version == 2 + finished
    listed = {path for shard in manifest.shards for path in (shard.path, shard.index_path)}
    versions = {f"manifests/{json.loads(old['manifest.json'])['sha256']}.json"} | (
        {version_name(whole.sha256)} if finished else set()
    )
    assert set(files_of(tmp_path / "other/shards")) == {"manifest.json", *listed, *versions}


def test_a_nightly_job_builds_only_what_is_new(posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nightly.yaml").write_text(NIGHTLY)
    job = Job.from_arguments(["recipe=nightly.yaml"])
    write_lines(posts, some(0, 30))
    assert run_stage(BUILD, job)
    assert not run_stage(BUILD, job)
    before = stamps(Path(job.config.shards_location))
    write_lines(posts, some(0, 40))
    assert run_stage(BUILD, job)
    assert Manifest.load(Path(job.config.shards_location)).version == 2
    assert before.items() - stamps(Path(job.config.shards_location)).items() == {
        ("manifest.json", before["manifest.json"])
    }
    assert not run_stage(BUILD, job)
    # Nothing new for the shards: the stage looks, and the next time knows.
    write_lines(posts, [*some(0, 40), {"id": "no", "text": "t", "labels": {}, "consent": False}])
    assert run_stage(BUILD, job)
    assert Manifest.load(Path(job.config.shards_location)).version == 2
    assert not run_stage(BUILD, job)


def test_shards_that_are_damaged_are_not_appended_to(posts: Path, tmp_path: Path) -> None:
    manifest = build(make_config(write_lines(posts, some(0, 30))), tmp_path / "run")
    index = tmp_path / "run/shards" / manifest.shards[1].index_path
    write_lines(posts, some(0, 31))
    data = index.read_bytes()
    index.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{index.name}: changed since the manifest was written"):
        build(appending(posts), tmp_path / "run")
    index.unlink()
    with pytest.raises(UserError, match=rf"{index.name}: is missing; restore it, or build all anew"):
        build(appending(posts), tmp_path / "run")
    index.write_bytes(data)
    assert build(appending(posts), tmp_path / "run").version == 2
