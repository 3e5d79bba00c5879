"""Damaged samples, missing shards, mixed datasets and new orders in real training: ranks in step, nothing unnamed."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import run_crossguard
from rank_models import alone, run_ranks
from rank_training import RECIPE

from crossguard.configs.compose import compose
from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import CacheConfig
from crossguard.data.loading.reader import ShardReader
from crossguard.data.shards.build import build_shards
from crossguard.data.shards.folder import ShardFolder
from crossguard.train.training import run_training

HERE = Path(__file__).parent
POSTS = 1000
RANKS = 4
STEPS = 50
BATCH = 32
# On ranks two passes a step, alone one.
EVERY = [f"train.batch_size={BATCH}", "checkpoint.every_steps=10", "data.mixing.temperature=3"]
SMALL = f"train.micro_batch_size={BATCH // RANKS // 2}"


def write_posts(file: Path, prefix: str, count: int) -> None:
    """Posts of three languages, one of them rare."""
    draw = random.Random(prefix)
    with file.open("w") as posts:
        for number in range(count):
            text = " ".join(draw.choices(["abc", "def", "ghij", "klm"], k=draw.randint(1, 12)))
            post = {
                "id": f"{prefix}{number}",
                "text": text,
                "language": draw.choices(["en", "de", "sw"], [8, 3, 0.3])[0],
            }
            posts.write(json.dumps(post | {"labels": {"spam": int(draw.random() < 0.3)}, "split": "train"}) + "\n")


def arguments(folder: Path, run_dir: str, *overrides: str, shards: str = "shards") -> list[str]:
    places = [f"recipe={folder / 'tiny.yaml'}", f"data.path={folder / 'posts.jsonl'}", f"data.shards={folder / shards}"]
    return [*places, f"run_dir={folder / run_dir}", *EVERY, *overrides]


def build(folder: Path, shards: str, path: str = "posts.jsonl") -> ShardReader:
    overrides = [f"data.path={folder / path}", "build.samples_per_shard=50", "build.num_workers=1"]
    config = compose(arguments(folder, "build", *overrides, shards=shards))
    build_shards(config, folder / shards, folder / "build" / "quarantine.jsonl")
    return ShardReader([ShardFolder.open(folder / shards, CacheConfig())], "train")


def damage(reader: ShardReader, row: int) -> str:
    """Flip a bit of a sample's text; its id."""
    sample = reader.read(row).id
    shard = reader.shard_of(row)
    entry = reader._index(shard)[row - int(reader.starts[shard])]
    tar = Path(reader.folder_of(shard).location) / reader.shards[shard].path
    data = bytearray(tar.read_bytes())
    data[int(entry["offset"]) + 600] ^= 1
    tar.chmod(0o644)
    tar.write_bytes(data)
    return sample


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def delivered(run_dir: Path) -> dict[int, list[str]]:
    """Step -> ids over all ranks, each step once."""
    steps: dict[int, list[str]] = {}
    for file in sorted((run_dir / "samples").glob("rank-*.jsonl")):
        lines = lines_of(file)
        assert [line["step"] for line in lines] == list(range(lines[0]["step"], lines[-1]["step"] + 1))
        for line in lines:
            steps.setdefault(line["step"], []).extend(line["ids"])
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "tiny.yaml").write_text(RECIPE)
    write_posts(folder / "posts.jsonl", "p", POSTS)
    write_posts(folder / "more.jsonl", "more", 300)
    return folder


@pytest.fixture(scope="module")
def lost(folder: Path) -> dict[str, Any]:
    """Shards with 1 % damaged samples and one shard missing, and others of which a tenth is damaged; trained on 4 ranks."""
    reader = build(folder, "shards")
    gone = reader.shards[7]
    missing = {reader.read(row).id for row in range(int(reader.starts[7]), int(reader.starts[8]))}
    rows = [row for row in range(0, POSTS, 100) if reader.shard_of(row) != 7]
    damaged = {damage(reader, row) for row in rows}
    (folder / "shards" / gone.path).unlink()
    rotten = build(folder, "rotten")
    for row in range(0, POSTS, 10):
        damage(rotten, row)
    whole = [f"train.schedule_steps={STEPS}", "train.max_refused=0.1", SMALL]
    jobs = [
        arguments(folder, "lost", f"train.max_steps={STEPS // 2}", *whole),
        arguments(folder, "lost", f"train.max_steps={STEPS}", *whole),
        arguments(folder, "strict", f"train.max_steps={STEPS}", SMALL),
        arguments(folder, "rot", f"train.max_steps={STEPS}", SMALL, shards="rotten"),
    ]
    run_ranks(RANKS, HERE / "rank_refusals.py", str(folder), json.dumps(jobs))
    outcomes = [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(RANKS)]
    return {"missing": missing, "damaged": damaged, "outcomes": outcomes}


def test_ranks_stay_in_step_and_every_bad_sample_is_named(folder: Path, lost: dict[str, Any]) -> None:
    """A rank with fewer batches than the others would leave them waiting: all have as many, whatever is refused."""
    assert [outcomes[:2] for outcomes in lost["outcomes"]] == [["done", "done"]] * RANKS
    steps = delivered(folder / "lost")
    assert steps.keys() == set(range(1, STEPS + 1))
    assert {len(ids) for ids in steps.values()} == {BATCH}
    everything = {id for ids in steps.values() for id in ids}
    assert not everything & (lost["missing"] | lost["damaged"])
    named = lines_of(folder / "lost" / "quarantine.jsonl")
    keys = {line["key"]: line["reason"] for line in named}
    assert Counter("missing" in reason for reason in keys.values()) == {
        True: len(lost["missing"]),
        False: len(lost["damaged"]),
    }
    met = [line for line in named if "position" in line]
    assert all((line["step"] - 1) * BATCH <= line["position"] < line["step"] * BATCH for line in met)
    assert {line["reason"] for line in named if "position" not in line} == {"its shard is missing"}


def test_the_preview_equals_what_was_delivered(folder: Path, lost: dict[str, Any]) -> None:
    del lost
    steps = delivered(folder / "lost")
    for step in (1, 2, 19, STEPS // 2, STEPS // 2 + 1, STEPS):
        shown = run_crossguard(["shards", "preview", *arguments(folder, "lost"), f"step={step}"], folder)
        assert json.loads(shown.stdout) == {"step": step, "ids": steps[step]}


def test_exposure_equals_the_log_of_what_was_delivered(folder: Path, lost: dict[str, Any]) -> None:
    from crossguard.configs.saved import load_config
    from crossguard.recipes.sample_queries import _exposure

    steps = delivered(folder / "lost")
    config = load_config(folder / "lost" / "config.yaml")
    config.run_dir, config.data.shards = str(folder / "lost"), str(folder / "shards")
    often = Counter(id for ids in steps.values() for id in ids)
    rare = [id for id, count in often.most_common(15)] + [f"p{number}" for number in range(0, POSTS, 40)]
    for id in (id for id in rare if id not in lost["missing"]):
        expected = sorted(step for step, ids in steps.items() for other in ids if other == id)
        found = _exposure(config, id)
        assert found["steps"] == expected
        kept = [STEPS - 10, STEPS]
        assert found["checkpoints"] == [f"step-{step:08d}" for step in kept if expected and step >= expected[0]]
    places = [f"run_dir={folder / 'lost'}", f"data.shards={folder / 'shards'}"]
    shown = run_crossguard(["shards", "exposure", rare[0], *places], folder)
    assert json.loads(shown.stdout)["id"] == rare[0]


def test_too_much_is_an_error_on_all_ranks(lost: dict[str, Any]) -> None:
    for outcomes in lost["outcomes"]:
        assert "shards of 50 of the 1000 training samples are missing, more than train.max_refused=0.01" in outcomes[2]
        assert "samples read are damaged, more than train.max_refused=0.01" in outcomes[3]
    assert len({outcomes[3] for outcomes in lost["outcomes"]}) == 1


def test_datasets_are_mixed_by_weight(folder: Path) -> None:
    build(folder, "whole")
    build(folder, "more", "more.jsonl")
    overrides = [
        "train.max_steps=30",
        f"data.mixing.datasets.more={folder / 'more'}",
        "data.mixing.weights={own: 1.0, more: 1.0}",
        "data.mixing.changes=[{after_step: 20, weights: {own: 0.0, more: 1.0}}]",
    ]
    run_training(compose(arguments(folder, "mixed", *overrides, shards="whole")), alone())
    steps = delivered(folder / "mixed")
    of_more = {step: sum(id.startswith("more") for id in ids) for step, ids in steps.items()}
    assert sum(of_more[step] for step in range(1, 21)) == pytest.approx(20 * BATCH / 2, abs=30)
    assert all(of_more[step] == BATCH for step in range(21, 31))


def test_a_new_order_goes_on_with_the_weights(folder: Path) -> None:
    build(folder, "first")
    run_training(compose(arguments(folder, "grown", "train.max_steps=10", shards="first")), alone())
    with (folder / "posts.jsonl").open() as posts, (folder / "grown.jsonl").open("w") as grown:
        shutil.copyfileobj(posts, grown)
        grown.write((folder / "more.jsonl").read_text())
    build(folder, "second", "grown.jsonl")
    job = arguments(folder, "grown", f"data.path={folder / 'grown.jsonl'}", "train.max_steps=20", shards="second")
    with pytest.raises(
        UserError, match=r"the sample order is not that of the checkpoint: shards .*train\.new_order=true"
    ):
        run_training(compose(job), alone())
    with pytest.raises(UserError, match=r"seed: was 0, is now 5"):
        run_training(compose([*job, "seed=5"]), alone())
    run_training(compose([*job, "seed=5", "train.new_order=true"]), alone())
    steps = delivered(folder / "grown")
    assert steps.keys() == set(range(1, 21))
    assert not any(id.startswith("more") for step in range(1, 11) for id in steps[step])
    assert any(id.startswith("more") for step in range(11, 21) for id in steps[step])
    # Resumed once more, it goes on with that order, and says what it cannot tell of the one before.
    run_training(compose([*job, "seed=5", "train.max_steps=22"]), alone())
    line = ["shards", "preview", *job, "seed=5"]
    shown = run_crossguard([*line, "step=22"], folder)
    assert json.loads(shown.stdout)["ids"] == delivered(folder / "grown")[22]
    refused = run_crossguard([*line, "step=10"], folder, status=2)
    assert "step 10: drawn from another order; the one in force begins with step 11" in refused.stderr
