"""Resuming: bit for bit after SIGKILL in every ZeRO stage, on other ranks and stages, with what may change and may not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import LONGEST, RankJob, alive, wait_until
from rank_models import alone, run_ranks, torchrun
from rank_training import arguments, token_lengths, write_shards

from crossguard.configs.compose import compose
from crossguard.configs.errors import JobError, UserError
from crossguard.configs.resume import changed_on_resume
from crossguard.data.shards.build import build_shards
from crossguard.train.checkpoint_folder import checkpoints_of, latest_checkpoint, step_of
from crossguard.train.run_lock import run_lock
from crossguard.train.stored_weights import load_weights
from crossguard.train.training import run_training

HERE = Path(__file__).parent
STEPS, KILLED_AT = 20, 10
STAGES = range(4)
# There the ranks sit in sessions of their own, which a kill of the launcher does not reach: by themselves they would
# train on, and save.
UNDER_TORCHRUN = 1
SCHEDULE = [f"train.schedule_steps={STEPS}", f"checkpoint.every_steps={KILLED_AT}"]
MULTI = [f"train.max_steps={STEPS}", *SCHEDULE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe, posts and shards."""
    folder = tmp_path_factory.mktemp("job")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """For each stage a run of 20 steps, and one of 10 that was killed and then went on for 10; all on 2 ranks."""
    for stage in STAGES:
        run_dir, line = folder / f"killed-{stage}", endless(folder, stage)
        if stage == UNDER_TORCHRUN:
            with subprocess.Popen([*torchrun(2, Path("-m")), *line], stderr=subprocess.DEVNULL, cwd=HERE) as launcher:
                kill_midway(launcher.pid, run_dir)
        else:
            with RankJob(["-m", *line], 2) as job:
                kill_midway(job.job, run_dir)
    jobs = [
        arguments(folder, f"{run}-{stage}", f"zero={stage}", *MULTI) for stage in STAGES for run in ("whole", "killed")
    ]
    run_ranks(2, HERE / "rank_training.py", json.dumps(jobs))
    return folder


def endless(folder: Path, stage: int) -> list[str]:
    """The real entry, and arguments of a run that is there to be killed."""
    settings = (f"zero={stage}", "train.max_steps=100000", *SCHEDULE)
    return ["crossguard.train", *arguments(folder, f"killed-{stage}", *settings)]


def kill_midway(launcher: int, run_dir: Path) -> None:
    """SIGKILL what has started the ranks, and it alone, once the state after step 10 is there, and see its ranks gone."""
    try:
        wait_until(lambda: latest_checkpoint(run_dir) is not None or not alive(launcher), LONGEST, between=0.005)
        assert alive(launcher), [file.read_text()[-3000:] for file in run_dir.glob("logs/*")]
    finally:
        os.kill(launcher, signal.SIGKILL)
    wait_until(lambda: is_free(run_dir / ".lock") and is_free(run_dir / ".lock.ranks"), 10)
    assert [step_of(path) for path in checkpoints_of(run_dir)] == [KILLED_AT]


def is_free(lock: Path) -> bool:
    """No process, so no rank, holds it."""
    with lock.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def steps_in(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    complete = file.read_bytes().rpartition(b"\n")[0].splitlines() if file.is_file() else []
    return [json.loads(line)["step"] for line in complete]


def results(run_dir: Path) -> list[tuple[int, float, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines_of(run_dir / "metrics.jsonl")]


def test_tokens_are_counted_over_all_ranks(finished: Path) -> None:
    tokens, run_dir = token_lengths(finished), finished / "whole-0"
    of_ranks = [lines_of(run_dir / f"samples/rank-{rank:05d}.jsonl") for rank in range(2)]
    for line, *samples in zip(lines_of(run_dir / "metrics.jsonl"), *of_ranks, strict=True):
        expected = sum(tokens[post] for sample in samples for post in sample["ids"]) / 8
        assert line["tokens_per_second"] / line["samples_per_second"] == pytest.approx(expected)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_never_killed(finished: Path, stage: int) -> None:
    whole, killed = finished / f"whole-{stage}", finished / f"killed-{stage}"
    assert [line[0] for line in results(whole)] == list(range(1, STEPS + 1))
    assert results(killed) == results(whole)
    for rank in range(2):
        file = f"samples/rank-{rank:05d}.jsonl"
        assert lines_of(killed / file) == lines_of(whole / file)
    one, other = (load_weights(run / "checkpoints" / f"step-{STEPS:08d}") for run in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stages_agree(finished: Path) -> None:
    for stage in STAGES[1:]:
        for one, other in zip(results(finished / "whole-0"), results(finished / f"whole-{stage}"), strict=True):
            assert one[1] == pytest.approx(other[1], rel=1e-5)


def test_run_directory_holds_no_absolute_path(finished: Path) -> None:
    checkpoint = finished / "whole-1" / "checkpoints"
    assert (checkpoint / "latest").read_text() == f"step-{STEPS:08d}"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["latest", "step-00000010", "step-00000020"]
    assert f'"{finished}' not in (checkpoint / "step-00000020" / "state.json").read_text()


def test_goes_on_with_one_rank_and_another_stage(finished: Path) -> None:
    """The order of samples goes on where it was, and the loss stays that of the first run."""
    longer = [f"train.max_steps={STEPS + 2}", *SCHEDULE]
    run_training(compose(arguments(finished, "whole-2", "zero=3", *longer)), alone())
    fresh = compose(arguments(finished, "alone", *longer))
    run_training(fresh, alone())
    ids = {line["step"]: line["ids"] for line in lines_of(finished / "whole-2" / "samples" / "rank-00000.jsonl")}
    expected = {line["step"]: line["ids"] for line in lines_of(finished / "alone" / "samples" / "rank-00000.jsonl")}
    assert [ids[step] for step in (STEPS + 1, STEPS + 2)] == [expected[step] for step in (STEPS + 1, STEPS + 2)]
    other = {line["step"]: line["ids"] for line in lines_of(finished / "whole-2" / "samples" / "rank-00001.jsonl")}
    assert all(ids[step] + other[step] == expected[step] for step in range(1, STEPS + 1))


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved in the background; the newest is altered, and the run goes on from the one before, each step once."""
    settings = [
        "train.max_steps=12",
        "train.schedule_steps=12",
        "checkpoint.every_steps=4",
        "checkpoint.async_save=true",
    ]
    run_training(compose(arguments(folder, "undamaged", *settings)), alone())
    run_training(compose(arguments(folder, "damaged", *settings, "train.max_steps=10")), alone())
    run_dir = folder / "damaged"
    assert {step_of(path) for path in checkpoints_of(run_dir)} == {8, 10}
    file = run_dir / "checkpoints" / "step-00000010" / "fragments-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run_training(compose(arguments(folder, "damaged", *settings)), alone())
    assert f"{file}: altered" in capsys.readouterr().err
    assert results(run_dir) == results(folder / "undamaged")
    assert steps_in(run_dir) == list(range(1, 13))
    one, other = (load_weights(run / "checkpoints" / "step-00000012") for run in (run_dir, folder / "undamaged"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {
        *("latest", "step-00000008", "step-00000010.damaged", "step-00000012")
    }


def test_a_finished_job_does_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "whole-0" / "metrics.jsonl").read_bytes()
    run_training(compose(arguments(finished, "whole-0", *MULTI)), alone())
    assert (finished / "whole-0" / "metrics.jsonl").read_bytes() == before
    assert f"done before, at step {STEPS}" in capsys.readouterr().err


def test_other_changes_are_refused(finished: Path) -> None:
    config = compose(arguments(finished, "whole-0", *MULTI, "train.lr=0.5", "seed=3"))
    with pytest.raises(UserError, match=r"seed: was 0, is now 3; train\.lr: was 0\.01, is now 0\.5"):
        run_training(config, alone())


def test_the_best_checkpoint_is_kept_and_patience_stops(folder: Path) -> None:
    """A validation that gets worse from the second evaluation on, as the learning rate is far too high."""
    overrides = ["evaluation.every_steps=2", "checkpoint.every_steps=0", "checkpoint.keep_last=1", "train.patience=3"]
    run_training(compose(arguments(folder, "patient", *overrides, "train.max_steps=60", "train.lr=3e-2")), alone())
    run_dir = folder / "patient"
    evaluations = [line for line in lines_of(run_dir / "metrics.jsonl") if line["split"] == "validation"]
    values = [line["macro.average_precision"] for line in evaluations]
    best = max(range(len(values)), key=values.__getitem__)
    assert len(values) == best + 1 + 3
    assert (run_dir / "checkpoints" / "best").read_text() == f"step-{evaluations[best]['step']:08d}"
    kept = {(best + 1) * 2, len(values) * 2}
    assert {step_of(path) for path in checkpoints_of(run_dir)} == kept
    before = (run_dir / "metrics.jsonl").read_bytes()
    run_training(compose(arguments(folder, "patient", *overrides, "train.max_steps=90", "train.lr=3e-2")), alone())
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_epochs_end_training(folder: Path) -> None:
    run_training(compose(arguments(folder, "epochs", "train.max_epochs=0.5", "checkpoint.every_steps=0")), alone())
    assert steps_in(folder / "epochs") == list(range(1, 8))  # 7 batches of 8 cover half of the 110 posts.


def test_restart_moves_the_old_run_aside(folder: Path) -> None:
    overrides = ["train.max_steps=2", "checkpoint.every_steps=0"]
    run_training(compose(arguments(folder, "restarted", *overrides)), alone())
    run_training(compose(arguments(folder, "restarted", *overrides, "train.restart=true", "seed=3")), alone())
    run_dir = folder / "restarted"
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / "step-00000002"
    assert (run_dir / "checkpoints.moved-1" / "step-00000002").is_dir()
    assert steps_in(run_dir) == [1, 2]
    assert len(lines_of(run_dir / "metrics.jsonl.moved-1")) == 2


def test_checkpoints_that_are_gone_are_no_fresh_start(folder: Path) -> None:
    """DeepSpeed's own load of a checkpoint that is missing returns nothing, and training begins at step 0."""
    job = compose(arguments(folder, "emptied", "train.max_steps=2", "checkpoint.every_steps=0"))
    run_training(job, alone())
    before = (folder / "emptied" / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "emptied" / "checkpoints" / "step-00000002")
    for _ in range(2):
        with pytest.raises(UserError, match=r"latest names step-00000002, but no checkpoint is there; .*restart=true"):
            run_training(job, alone())
    assert (folder / "emptied" / "metrics.jsonl").read_bytes() == before


def test_posts_without_any_known_label_are_refused(folder: Path) -> None:
    unlabeled = folder / "unlabeled.jsonl"
    posts = [json.loads(line) for line in (folder / "posts.jsonl").read_text().splitlines()]
    unlabeled.write_text("\n".join(json.dumps(post | {"labels": {"spam": None}}) for post in posts))
    own = [f"data.path={unlabeled}", f"data.shards={folder / 'unlabeled'}"]
    config = compose(arguments(folder, "unlabeled-run", *own))
    build_shards(config, folder / "unlabeled", folder / "quarantine.jsonl")
    with pytest.raises(UserError, match="none of the 110 training posts has a known label"):
        run_training(config, alone())


def test_weights_that_diverged_stop_the_job(folder: Path) -> None:
    config = compose(arguments(folder, "diverged", "train.lr=1e30", "train.grad_clip=0", "train.warmup_steps=0"))
    with pytest.raises(JobError, match=r"5 steps in a row, up to step \d+, were skipped \(train\.max_skipped_steps\)"):
        run_training(config, alone())
    run_dir = folder / "diverged"
    skipped = [line["step"] for line in lines_of(run_dir / "metrics.jsonl") if "skipped" in line]
    assert len(skipped) == 5
    delivered = {line["step"]: line["ids"] for line in lines_of(run_dir / "samples" / "rank-00000.jsonl")}
    named = {(line["step"], line["id"]) for line in lines_of(run_dir / "quarantine.jsonl")}
    assert {step for step, _ in named} == set(skipped)
    assert all(post in delivered[step] for step, post in named)


def test_a_run_directory_in_use_names_its_holder(tmp_path: Path) -> None:
    holder = rf"in use by process {os.getpid()} on"
    with run_lock(tmp_path, alone()), pytest.raises(JobError, match=holder), run_lock(tmp_path, alone(), wait=0.3):
        pass
    with run_lock(tmp_path, alone(), wait=0):
        pass


def test_a_wrong_setting_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", "-m", "crossguard.train", "recipe=quickstartt"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "crossguard: " in done.stderr
    assert "| torch" not in done.stderr


def test_what_may_change() -> None:
    saved = {"seed": 1, "train": {"lr": 0.1, "max_steps": 5}, "zero": {"stage": 1}, "model": {"text": {"config": {}}}}
    now = {"seed": 1, "train": {"lr": 0.1, "max_steps": 9}, "zero": {"stage": 3, "deepspeed": {"a": 1}}, "model": {}}
    assert changed_on_resume(saved, now) == []
    now["train"]["ema_decay"] = 0.0  # An older version had no such key, and no averages.
    assert changed_on_resume(saved, now) == []
    now["train"]["ema_decay"] = 0.9
    assert changed_on_resume(saved, now) == ["train.ema_decay: was 0.0, is now 0.9"]
    del now["train"]["ema_decay"]
    now["model"] = {"text": {"config": {"hidden_size": 8}}}
    assert changed_on_resume(saved, now) == ["model.text.config.hidden_size: was not set, is now 8"]
