"""One function a command."""

from __future__ import annotations

import time
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.launchers import one_node
from crossguard.recipes.job import Job
from crossguard.recipes.stages import BUILD, EVALUATE, EXPORT, TRAIN, Stage, run_stage
from crossguard.recipes.work import check_ranks

# File systems show what another node has written some time later.
SECONDS_TO_SEE = 60.0


def run(argv: list[str]) -> None:
    """All stages of the recipe, its ablations included; on several nodes of torchrun one of them builds and exports."""
    job = Job.from_arguments(argv)
    ablations = job.ablations()
    check_ranks(job)
    if job.config.data.has_posts or not job.has_shards:
        _build_on_one_node(job)
    _do(TRAIN, job)
    for name, ablation in ablations.items():
        print(f"train: ablation {name}", flush=True)
        _do(TRAIN, ablation, f" (ablation {name})")
    _do(EVALUATE, job)
    if one_node.is_here(job.config.launcher):
        _do(EXPORT, job)


def build(argv: list[str]) -> None:
    """Posts to shards."""
    _build(Job.from_arguments(argv))


def train(argv: list[str]) -> None:
    """Shards to checkpoints."""
    _do(TRAIN, Job.from_arguments(argv))


def evaluate(argv: list[str]) -> None:
    """A checkpoint to predictions and a report."""
    _do(EVALUATE, Job.from_arguments(argv))


def export(argv: list[str]) -> None:
    """A checkpoint to a bundle."""
    _do(EXPORT, Job.from_arguments(argv))


def predict(argv: list[str]) -> None:
    """Posts and a bundle to scores."""
    from crossguard.recipes.predicting import predict_posts

    predict_posts(argv)


def launch(argv: list[str]) -> None:
    """All stages by way of a launcher, a scheduler's as well; or a sweep."""
    from crossguard.recipes.launching import launch as launch_job

    launch_job(argv)


def plan(argv: list[str]) -> None:
    """Memory, batch and time of a job, before anything runs."""
    from crossguard.recipes.planning import plan_job

    plan_job(argv)


def shards(argv: list[str]) -> None:
    """Tools for shards."""
    from crossguard.recipes.shard_tools import shards as use_tool

    use_tool(argv)


def report(argv: list[str]) -> None:
    """Tools for reports."""
    from crossguard.recipes.report_tools import report as use_tool

    use_tool(argv)


def prevalence(argv: list[str]) -> None:
    """Which posts to label, and what their labels say about all."""
    from crossguard.recipes.prevalence_tools import prevalence as use_tool

    use_tool(argv)


def recipes(argv: list[str]) -> None:
    """The recipes that can be named from here."""
    _no_arguments("recipes", argv)
    from crossguard.configs.describe import recipe_sentences

    for name, sentence in recipe_sentences().items():
        print(f"{name:<24}{sentence}")


def config(argv: list[str]) -> None:
    """Every field of a recipe's configuration."""
    from crossguard.configs.describe import describe

    print(describe(argv))


def doctor(argv: list[str]) -> None:
    """What this machine can do."""
    _no_arguments("doctor", argv)
    from crossguard.recipes.doctor import examine

    examine(Path.cwd())


def _build(job: Job) -> None:
    from crossguard.data.shards.executor import open_executor

    open_executor(job.config.build)  # what is not installed is told before all posts are read
    _do(BUILD, job)


def _build_on_one_node(job: Job) -> None:
    launcher = job.config.launcher
    if one_node.is_here(launcher):
        with one_node.at_work(launcher):
            _build(job)
        return
    print(f"build: done by the node of {launcher.torchrun.endpoint}, for which this one waits", flush=True)
    one_node.wait(launcher, "build")
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not job.has_shards and time.monotonic() < deadline:
        time.sleep(1.0)


def _do(stage: Stage, job: Job, which: str = "") -> None:
    if not run_stage(stage, job):
        print(f"{stage.name}{which}: done before, skipped", flush=True)


def _no_arguments(name: str, argv: list[str]) -> None:
    if argv:
        raise UserError(f"{name}: takes no arguments, got {' '.join(argv)}")
