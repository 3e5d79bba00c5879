"""When a stage runs again, with small stages in place of the real ones."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from build_job import build, make_config, write_lines

from crossguard.configs.errors import UserError
from crossguard.configs.schema import EvaluationConfig
from crossguard.recipes.job import Job
from crossguard.recipes.stages import EVALUATE, Stage, run_stage
from crossguard.recipes.work import check_splits


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    return Job.from_arguments(["recipe=quickstart"])


class Copying:
    """A stage that copies one number to another; both stand for artefacts."""

    def __init__(self) -> None:
        self.read, self.written, self.runs = 1, 0, 0
        self.stage = Stage("copy", ("seed",), self.inputs, self.outputs, self.work)

    def inputs(self, job: Job) -> dict[str, str]:
        return {"number": str(self.read)}

    def outputs(self, job: Job) -> dict[str, str]:
        return {"copy": str(self.written)} if self.written else {}

    def work(self, job: Job) -> None:
        self.runs += 1
        self.written = self.read


def test_a_stage_is_skipped_until_what_it_reads_or_wrote_changes(job: Job) -> None:
    copying = Copying()
    assert run_stage(copying.stage, job)
    assert not run_stage(copying.stage, job)
    copying.read = 2
    assert run_stage(copying.stage, job)
    copying.written = 0
    assert run_stage(copying.stage, job)
    assert copying.runs == 3


def test_a_stage_runs_again_for_another_configuration_but_not_for_other_ranks(job: Job) -> None:
    copying = Copying()
    run_stage(copying.stage, job)
    assert not run_stage(copying.stage, Job.from_arguments(["recipe=quickstart", "launcher.num_procs=1"]))
    assert run_stage(copying.stage, Job.from_arguments(["recipe=quickstart", "seed=1"]))


def test_every_setting_of_evaluation_that_decides_a_figure_makes_it_run_again() -> None:
    keys = {key.removeprefix("evaluation.") for key in EVALUATE.keys if key.startswith("evaluation.")}
    # What they name is hashed, they are training's, or they change no figure.
    elsewhere = {"suite", "against", "every_steps", "max_validation_posts", "batch_size"}
    assert keys | elsewhere == {field.name for field in fields(EvaluationConfig)}
    assert not keys & elsewhere


@pytest.mark.parametrize(("host", "records"), [("127.0.0.1", True), ("elsewhere.invalid", False)])
def test_of_several_nodes_one_records_a_stage(job: Job, host: str, records: bool) -> None:
    nodes = ["launcher=torchrun", "launcher.nodes=2", f"launcher.torchrun.endpoint={host}:29400"]
    run_stage(Copying().stage, Job.from_arguments(["recipe=quickstart", *nodes]))
    assert (job.run_dir / "stages" / "copy.json").exists() == records


def test_what_arrives_while_a_stage_works_is_work_for_the_next_run(job: Job) -> None:
    class Late(Copying):
        def work(self, job: Job) -> None:
            super().work(job)
            if self.runs == 1:
                self.read = 2

    copying = Late()
    assert run_stage(copying.stage, job)
    assert run_stage(copying.stage, job)
    assert copying.written == 2
    assert not run_stage(copying.stage, job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ["tset"]}, r"evaluation.splits: no split 'tset' in the shards; did you mean 'test'\?"),
        ({"every_steps": 5}, r"no split 'validation', which evaluation.every_steps needs; they have test, train"),
    ],
)
def test_splits_that_the_shards_lack_are_named_before_any_rank_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    posts = [{"id": f"p{number}", "text": "t", "labels": {}} for number in range(20)]
    config = make_config(write_lines(tmp_path / "p.jsonl", posts), splits={"train": 0.5, "test": 0.5})
    config.run_dir = str(tmp_path)
    build(config, tmp_path)
    check_splits(Job(config, []), training=True)
    check_splits(Job(config, []))
    for name, value in changes.items():
        setattr(config.evaluation, name, value)
    with pytest.raises(UserError, match=message):
        check_splits(Job(config, []), training=True)
