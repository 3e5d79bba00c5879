"""Tracking: one W&B run over resumes, offline without a key, and never a reason to stop."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest
from rank_models import alone, tiny_config

from crossguard.configs.errors import JobError, OutOfMemory, Preempted
from crossguard.configs.schema import Config
from crossguard.train import preemption, step_log, tracking
from crossguard.train.loop import StepResult
from crossguard.train.metrics_log import LineLog, cut_after, metrics_file, samples_file
from crossguard.train.step_log import StepLog
from crossguard.train.throughput import Work
from crossguard.train.tracking import NullTracker, WandbTracker, mode_of, open_tracker


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_config()
    config.run_dir = str(tmp_path)
    return config


def test_one_run_over_resumes(config: Config, tmp_path: Path) -> None:
    first = open_tracker(config, None, first=True)
    first.log({"train/loss": 0.5}, 1)
    first.close()
    second = open_tracker(config, first.run_id, first=True)
    second.log({"train/loss": 0.4}, 2)
    second.close()
    assert first.run_id
    assert second.run_id == first.run_id
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files
    assert {file.stem for file in files} == {f"run-{first.run_id}"}


def test_other_ranks_and_none_track_nothing_but_keep_the_run(config: Config) -> None:
    assert isinstance(open_tracker(config, "kept", first=False), NullTracker)
    config.tracker.name = "none"
    untracked = open_tracker(config, "kept", first=True)
    assert untracked.run_id == "kept"
    untracked.alert("loss spike", "step 1")


def test_a_broken_tracker_says_so_once_and_is_silent(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = WandbTracker(config, "id")
    tracker.log({"train/loss": 0.5}, 1)
    tracker.alert("loss spike", "step 1")
    tracker.close()
    assert tracker.run_id == "id"
    assert capsys.readouterr().err.count("W&B failed (ConnectionError)") == 1


def test_an_alert_that_fails_stops_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: object) -> None:
        raise ConnectionError("no network")

    tracker = WandbTracker(config, None)
    run, tracker._run = tracker._run, type("Run", (), {"alert": staticmethod(fail)})()
    tracker.alert("loss spike", "step 1")
    run.finish()
    assert capsys.readouterr().err.count("W&B failed (ConnectionError)") == 1


@pytest.mark.parametrize("asked", [False, True])
def test_a_tracker_that_never_ends_is_left_behind(config: Config, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    """In time, where this rank was asked to stop: its launcher waits for launcher.grace_seconds."""
    import threading

    if asked:
        config.launcher.grace_seconds = tracking.SECONDS_TO_END + 0.1
        monkeypatch.setattr(preemption._Rank, "asked_at", time.monotonic())
    else:
        monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.1)
    tracker = WandbTracker(config, None)
    forever = threading.Event()
    run, tracker._run = tracker._run, type("Run", (), {"finish": lambda self, exit_code: forever.wait()})()
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 60
    forever.set()
    run.finish()


@pytest.mark.parametrize(
    ("error", "status"), [(None, 0), (JobError("failed"), 1), (Preempted("goes on"), 0), (OutOfMemory("too"), 0)]
)
def test_a_failed_job_is_a_failed_run(
    config: Config, tmp_path: Path, error: Exception | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = open_tracker(config, None, first=True)
    assert isinstance(tracker, WandbTracker)
    finished: list[int] = []
    finish = tracker._run.finish
    monkeypatch.setattr(tracker._run, "finish", lambda exit_code: (finished.append(exit_code), finish(exit_code)))
    with suppress(JobError, OutOfMemory, Preempted), StepLog(tmp_path, config.train, alone(), tracker):
        if error is not None:
            raise error
    assert finished == [status]


def test_the_tracker_hears_of_fast_steps_now_and_then_and_of_every_evaluation(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now)
    heard: list[tuple[int, str]] = []
    tracker = NullTracker()
    monkeypatch.setattr(tracker, "log", lambda metrics, step: heard.append((step, next(iter(metrics)))))
    with StepLog(tmp_path, config.train, alone(), tracker) as log:
        for step in range(1, 51):
            log.step(step, StepResult(0.5, 1.0, 0.1, Work(8, 8, 8, 0)), [])
            now += 1 / 8
            if step == 27:
                log.evaluation("validation", step, {"loss": 1})
    train = [step for step, name in heard if name == "train/loss"]
    assert train == [1, 9, 17, 25, 27, 36, 44, 50]
    assert [step for step, name in heard if name == "validation/loss"] == [27]
    assert len(metrics_file(tmp_path).read_text().splitlines()) == 51


def test_offline_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mode_of("auto") == "offline"
    assert mode_of("online") == "online"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    assert mode_of("auto") == "online"


def test_lines_after_the_restored_step_are_cut(tmp_path: Path) -> None:
    for file in (metrics_file(tmp_path), samples_file(tmp_path, 1)):
        log = LineLog(file)
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 0.1 + 0.2})
        log.close()
        with file.open("a") as opened:
            opened.write('{"step": 1, "lo')  # Torn by a kill.
    cut_after(tmp_path, 2)
    expected = '{"step": 1, "loss": 0.30000000000000004}\n{"step": 2, "loss": 0.30000000000000004}\n'
    assert metrics_file(tmp_path).read_text() == samples_file(tmp_path, 1).read_text() == expected
    cut_after(tmp_path, 0)
    assert metrics_file(tmp_path).read_text() == ""
