"""Losses and gradients that are not finite, losses that leap, too little memory, and the same bits twice."""

from __future__ import annotations

import json
import math
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_losses
import pytest
import torch
from conftest import write_posts
from own_losses import second_is_nan
from rank_guards import BAD_GRADIENT, BAD_LOSS, PLANNED, STEPS, find, train
from rank_jobs import run_crossguard
from rank_models import alone, run_ranks
from rank_training import arguments, write_shards

from crossguard.configs.compose import compose
from crossguard.configs.errors import JobError, OutOfMemory, UserError, is_out_of_memory
from crossguard.data.shards.build import build_shards
from crossguard.train.checkpoint_folder import checkpoints_of, read_state
from crossguard.train.guards import ENOUGH, WINDOW, typical
from crossguard.train.training import run_training

HERE = Path(__file__).parent
# Text and image, without dropout: what two ranks draw apart is drawn otherwise by one.
BOTH = """
description: Text and image.
taxonomy: {name: tiny, version: "1", policies: [{name: spam, description: Spam.}, {name: insult, description: Rude.}]}
model:
  modalities: [text, image]
  text:
    config: {model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
      hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}
    max_length: 24
  image:
    size: 16
    config: {model_type: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
      patch_size: 8, hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}
  fusion: {width: 8, layers: 1, heads: 2, dropout: 0}
train: {batch_size: 16, micro_batch_size: 4, warmup_steps: 2, lr: 1e-2, num_workers: 0, max_steps: 6, deterministic: true}
zero: {stage: 2}
evaluation: {every_steps: 0}
tracker: {name: none}
"""
# So many steps of one pass each that there are losses enough to compare with.
LONG = [*PLANNED, "checkpoint.every_steps=0", "train.lr=1e-4", "train.micro_batch_size=8"]


def lines_of(file: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{file}: {word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def train_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(run_dir / "metrics.jsonl") if line["split"] == "train"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of texts with their recipe, and of texts with images with theirs."""
    folder = tmp_path_factory.mktemp("guards")
    write_shards(folder)
    write_posts(folder / "both")
    (folder / "both.yaml").write_text(BOTH)
    build_shards(compose(both(folder, "build")), folder / "both-shards", folder / "build" / "quarantine.jsonl")
    return folder


def both(folder: Path, run_dir: str, *overrides: str) -> list[str]:
    """A job on texts with images."""
    places = [f"recipe={folder / 'both.yaml'}", f"data.path={folder / 'both'}", f"data.shards={folder / 'both-shards'}"]
    return [*places, f"run_dir={folder / run_dir}", *overrides]


@pytest.fixture(scope="module")
def on_two(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks found; they trained a job in small micro-batches as well."""
    job = both(folder, "small", "train.micro_batch_size=2", "train.loss.name=own_losses:planned")
    run_ranks(2, HERE / "rank_guards.py", str(folder), json.dumps([job]))
    found: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    assert [rank["jobs"] for rank in found] == [["done"], ["done"]]
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def found(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [find(folder, alone())] if request.param == 1 else request.getfixturevalue("on_two")


def test_a_bad_step_changes_nothing_in_any_stage(found: list[dict[str, Any]]) -> None:
    assert len(found[0]["engine"]) == 8
    for case, results in found[0]["engine"].items():
        assert len(results) == 10
        assert all(results.values()), (case, results)


@pytest.mark.parametrize("stage", range(4))
def test_bad_steps_are_skipped_named_and_passed(folder: Path, found: list[dict[str, Any]], stage: int) -> None:
    assert [rank["trained"][stage][0] for rank in found] == ["done"] * len(found)
    run_dir = folder / f"bad-{len(found)}-{stage}"
    lines = {line["step"]: line for line in train_lines(run_dir)}
    assert lines.keys() == {BAD_LOSS, 4, BAD_GRADIENT, 8}
    assert (lines[BAD_LOSS]["loss"], lines[BAD_LOSS]["skipped"]) == (None, "loss")
    assert (lines[BAD_GRADIENT]["grad_norm"], lines[BAD_GRADIENT]["skipped"]) == (None, "gradient")
    assert lines[BAD_GRADIENT]["loss"] > 0
    assert not {"skipped", "spike"} & {*lines[4], *lines[8]}
    delivered = [lines_of(run_dir / "samples" / f"rank-{rank:05d}.jsonl") for rank in range(len(found))]
    assert [line["step"] for line in delivered[0]] == list(range(1, STEPS + 1))
    ids = {line["step"]: [*line["ids"]] for line in delivered[0]}
    for line in delivered[1] if len(found) == 2 else []:
        ids[line["step"]] += line["ids"]
    named = lines_of(run_dir / "quarantine.jsonl")
    # The second sample of the second micro-batch of the last rank.
    alone_bad = [(line["id"], line["position"]) for line in named if line["reason"] == "its loss is not finite"]
    place = 8 // len(found) * (len(found) - 1) + 3
    assert alone_bad == [(ids[BAD_LOSS][place], (BAD_LOSS - 1) * 8 + place)]
    rest = [line for line in named if line["reason"] == "in a batch whose gradient is not finite"]
    assert sorted(line["position"] for line in rest) == list(range((BAD_GRADIENT - 1) * 8, BAD_GRADIENT * 8))
    assert {line["id"] for line in rest} == set(ids[BAD_GRADIENT])
    assert len(named) == 1 + 8
    state = read_state(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    assert (state["optimizer_steps"], state["skipped_steps"], state["position"]) == (STEPS - 2, 2, STEPS * 8)
    said = found[0]["trained"][stage][1]
    assert said.count("is not finite; the step is skipped") == 2
    assert f"train: warning: 2 of {STEPS} steps were skipped" in said
    assert not any("train:" in rank["trained"][stage][1] for rank in found[1:])


def test_too_many_in_a_row_stop_all_ranks_also_after_a_resume(folder: Path, found: list[dict[str, Any]]) -> None:
    for rank in found:
        (first, _), (second, _) = rank["given up"]
        assert first == "done"
        assert "3 steps in a row, up to step 5, were skipped (train.max_skipped_steps)" in second
    assert found[0]["given up"][0][1].count("the step is skipped") == 2  # Steps 1 and 3: once an episode.
    assert found[0]["given up"][1][1].count("the step is skipped") == 0
    run_dir = folder / f"stopped-{len(found)}"
    assert [line.get("skipped") for line in train_lines(run_dir)] == ["loss", None, "loss", "loss", "loss"]
    assert checkpoints_of(run_dir)[-1].name == "step-00000004"


def test_a_loss_that_leaps_is_told_once_an_episode_and_alike_after_a_resume(folder: Path) -> None:
    leaps = {step: (0, lambda losses: losses * 30) for step in (40, 41, 42, 45)}

    def said(run_dir: str, last: int, first: int = 1, threshold: int = 10) -> str:
        settings = [*LONG, f"train.max_steps={last}", f"train.spike_threshold={threshold}"]
        ended, said = train(arguments(folder, run_dir, *settings), alone(), leaps, first, micro_batches=1)
        assert ended == "done"
        return said

    whole, before, after = said("leaps", 48), said("resumed", 41), said("resumed", 48, first=42)
    lines = train_lines(folder / "leaps")
    assert [line["step"] for line in lines if line.get("spike")] == [40, 41, 42, 45]
    assert [line.get("spike") for line in train_lines(folder / "resumed")] == [line.get("spike") for line in lines]
    for told in (whole, before + after):
        assert told.count("(train.spike_threshold)") == 2
        assert "`crossguard shards preview step=40`" in told
    assert "step=45" in after
    assert "spike" not in said("silent", 40, threshold=0)


def test_what_is_typical() -> None:
    draw = random.Random(0)
    assert typical([0.7] * (ENOUGH - 1)) == (math.inf, math.inf)
    assert typical([0.7] * WINDOW) == (0.7, pytest.approx(0.07))
    usual, far = typical([draw.gauss(2, 0.3) for _ in range(WINDOW)])
    assert usual == pytest.approx(2, abs=0.1)
    assert far == pytest.approx(0.3, rel=0.3)


@pytest.fixture(scope="module")
def greedy(folder: Path) -> str:
    """`crossguard train` on two ranks, of which one has no room for four samples: what was said."""
    job = both(
        folder, "greedy", "launcher.num_procs=2", "launcher.threads_per_proc=1", "train.loss.name=own_losses:greedy"
    )
    return run_crossguard(["train", *job], HERE).stderr


def test_a_rank_without_memory_halves_the_micro_batch(folder: Path, greedy: str, on_two: list[dict[str, Any]]) -> None:
    del on_two
    run_dir = folder / "greedy"
    assert json.loads((run_dir / "micro_batch.json").read_text()) == {
        "world_size": 2,
        "zero_stage": 2,
        "micro_batch_size": 4,
        "use": 2,
    }
    assert "crossguard: rank 1: train: out of memory with 4 posts in a micro-batch; the next start takes 2" in greedy
    assert "crossguard: rank 1 was out of memory; starting again\n" in greedy
    assert "train: 2 posts in a micro-batch, since train.micro_batch_size=4 did not fit into memory" in greedy
    assert "lost contact" not in greedy
    assert "can't allocate memory" in (run_dir / "logs" / "rank-00001.log").read_text()
    assert [line["loss"] for line in train_lines(run_dir)] == [line["loss"] for line in train_lines(folder / "small")]


def test_deterministic_runs_have_equal_bits(folder: Path, greedy: str, on_two: list[dict[str, Any]]) -> None:
    """Of the same number of ranks, threads and micro-batches, in processes of their own."""
    del greedy, on_two
    for rank in range(2):
        file = f"checkpoints/step-00000006/fragments-{rank:05d}.safetensors"
        assert (folder / "greedy" / file).read_bytes() == (folder / "small" / file).read_bytes()


def test_out_of_memory_at_any_step_goes_on_from_the_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(run_dir: str, *overrides: str) -> list[str]:
        settings = ["train.loss.name=own_losses:two_at_most", "checkpoint.every_steps=1", *overrides]
        return both(folder, run_dir, *settings, "train.deterministic=false", "train.batch_size=12")

    own_losses.plan({})
    with pytest.raises(OutOfMemory, match="out of memory with 4 posts in a micro-batch; the next start takes 2,"):
        run_training(compose(job("short")), alone())
    assert checkpoints_of(folder / "short")[-1].name == "step-00000002"
    run_training(compose(job("short")), alone())
    assert "train: 2 posts in a micro-batch" in capsys.readouterr().err
    run_training(compose(job("enough", "train.micro_batch_size=2")), alone())
    short, enough = ([line["loss"] for line in train_lines(folder / name)] for name in ("short", "enough"))
    assert len(short) == 6
    assert short == pytest.approx(enough, rel=1e-6)
    # What was written down is of no use for another size, stage or number of ranks.
    with pytest.raises(OutOfMemory, match="out of memory with 6 posts in a micro-batch; the next start takes 3,"):
        run_training(compose(job("short", "train.micro_batch_size=6", "train.max_steps=9")), alone())
    with pytest.raises(OutOfMemory, match="out of memory with 3 posts in a micro-batch; the next start takes 1,"):
        run_training(compose(job("short", "train.micro_batch_size=6", "train.max_steps=9")), alone())
    run_training(compose(job("short", "train.micro_batch_size=6", "train.max_steps=9")), alone())
    assert "train: 1 posts in a micro-batch" in capsys.readouterr().err


def test_a_single_post_that_does_not_fit_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(own_losses, "two_at_most", refuse)
    job = both(folder, "hopeless", "train.loss.name=own_losses:two_at_most", "train.micro_batch_size=1")
    with pytest.raises(JobError, match="out of memory with a single post"):
        run_training(compose(job), alone())
    (folder / "hopeless" / "micro_batch.json").write_text("{}")
    with pytest.raises(UserError, match="not what crossguard writes; remove it"):
        run_training(compose(job), alone())


def test_what_out_of_memory_is() -> None:
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(2**60)
    assert all(map(is_out_of_memory, (on_cpu.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory"))))
    assert not any(map(is_out_of_memory, (RuntimeError("shapes differ"), UserError("out of memory"))))


def test_an_operation_without_deterministic_form_is_named(folder: Path) -> None:
    job = both(folder, "undetermined", "train.loss.name=own_losses:without_deterministic_form")
    with pytest.raises(UserError, match=r"train\.deterministic=true: max_unpooling2d_forward_out has no deterministic"):
        run_training(compose(job), alone())
    assert not torch.are_deterministic_algorithms_enabled()
    run_training(compose([*job, "train.deterministic=false", "train.max_steps=1"]), alone())


def test_alerts_reach_wandb_offline(folder: Path) -> None:
    leaps = {33: (0, lambda losses: losses * 30)} | dict.fromkeys((35, 36), (0, second_is_nan))
    settings = [*LONG, "train.max_steps=40", "train.max_skipped_steps=2", "tracker.name=wandb"]
    ended, _ = train(arguments(folder, "alerting", *settings), alone(), leaps, micro_batches=1)
    assert "2 steps in a row, up to step 36" in ended
    (file,) = (folder / "alerting" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # W&B's service writes the end of the file after it has let the run go.
    while "exit" not in [record.WhichOneof("record_type") for record in records_of(file)]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    alerts = [record.alert for record in records_of(file) if record.WhichOneof("record_type") == "alert"]
    assert [alert.title for alert in alerts] == ["loss spike", "training stopped"]
    assert alerts[0].text.startswith("the loss of step 33 is ")


def records_of(file: Path) -> Iterator[Any]:
    """What W&B wrote: blocks of 32 KiB, and in them records, cut where a block ends, each with a checksum, a length and
    a kind (1 whole, 2 first, 3 middle, 4 last); as in LevelDB's log, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + length > len(content):  # It is being written.
            return
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
