"""`crossguard launch`: the same job as `crossguard run`, by way of any launcher, alone or as a sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from crossguard.configs.arguments import take
from crossguard.configs.errors import CrossguardError, JobError, Preempted, UserError
from crossguard.configs.suggest import did_you_mean
from crossguard.data.shards.files import write_atomic
from crossguard.launchers import submitting
from crossguard.launchers.submitting import SCHEDULERS, Submission
from crossguard.launchers.work import Stage, Work
from crossguard.recipes import commands
from crossguard.recipes.job import Job
from crossguard.recipes.sweeps import sweep
from crossguard.recipes.work import check_ranks

FOLDER = "launch"
RECORD = "submitted.json"
QUESTIONS = ("status", "logs", "cancel")
FLAGS = ("--dry-run", "--multirun")


def launch(argv: list[str]) -> None:
    """Run or submit what the arguments describe, or ask after what was submitted."""
    if argv and argv[0] in QUESTIONS:
        _ask(argv[0], argv[1:])
        return
    flags = {argument for argument in argv if argument.startswith("--")}
    if unknown := sorted(flags - set(FLAGS)):
        raise UserError(f"{unknown[0]}: unknown option; {did_you_mean(unknown[0], FLAGS)}")
    arguments = [argument for argument in argv if argument not in flags]
    if arguments and "=" not in arguments[0]:
        raise UserError(f"launch: {arguments[0]}: {did_you_mean(arguments[0], QUESTIONS)}")
    points, base, build = sweep(arguments) if "--multirun" in flags else ([arguments], None, None)
    jobs = [Job.from_arguments(point) for point in points]
    for job in jobs:
        _check(job)
    submission = Submission(
        [_work(job) for job in jobs],
        (base or jobs[0].run_dir).absolute() / FOLDER,
        _work(Job.from_arguments(build)) if build else None,
    )
    config = jobs[0].config.launcher
    if "--dry-run" in flags:
        print(submitting.rendered(submission, config), end="")
    elif config.name in SCHEDULERS:
        _submit(submission, jobs[0])
    else:
        _run(points)


def _check(job: Job) -> None:
    """What the ranks would refuse, before anything waits in a queue."""
    job.ablations()
    check_ranks(job)
    if job.config.launcher.name == "kubernetes" and job.config.train.restart:
        raise UserError("train.restart=true: every pod that is started again would begin anew; choose another run_dir")


def _work(job: Job) -> Work:
    stages = [Stage("build", False, job.arguments)] if job.config.data.has_posts or not job.has_shards else []
    stages.append(Stage("train", True, job.arguments))
    stages += [Stage(f"train-{name}", True, ablation.arguments) for name, ablation in job.ablations().items()]
    stages += [Stage("evaluate", True, job.arguments), Stage("export", False, job.arguments)]
    return Work(job.config.run_dir, job.arguments, stages)


def _submit(submission: Submission, job: Job) -> None:
    record_file = submission.folder / RECORD
    if record_file.exists():
        earlier = _read(record_file)
        if submitting.is_active(earlier):
            raise UserError(
                f"{submission.folder.parent}: in the queue as {_named(earlier)}; `crossguard launch cancel` ends it"
            )
    record = submitting.submit(submission, job.config.launcher)
    write_atomic(record_file, json.dumps(record).encode())
    print(f"launch: submitted as {_named(record)}; ask with `crossguard launch status run_dir={_shown(submission)}`")


def _run(points: list[list[str]]) -> None:
    """One job after the other; one that fails does not keep the others from their turn."""
    failed: list[str] = []
    for number, point in enumerate(points, 1):
        if len(points) > 1:
            print(f"launch: {number} of {len(points)}: {' '.join(point)}", flush=True)
        try:
            commands.run(point)
        except Preempted:
            raise
        except CrossguardError as error:
            if len(points) == 1:
                raise
            print(f"crossguard: {error}", file=sys.stderr, flush=True)
            failed.append(Job.from_arguments(point).config.run_dir)
    if failed:
        raise JobError(
            f"{len(failed)} of {len(points)} jobs failed: {', '.join(failed)}; the same command tries them again"
        )


def _ask(question: str, argv: list[str]) -> None:
    own, rest = take(argv, "run_dir")
    if rest or "run_dir" not in own:
        raise UserError(f"launch {question}: takes run_dir=DIR alone, that of the job or of the sweep")
    folder = Path(own["run_dir"]) / FOLDER
    record = _read(folder / RECORD)
    if question == "status":
        print(submitting.status(record))
    elif question == "logs":
        print(submitting.logs(record, folder))
    else:
        submitting.cancel(record)
        print(f"launch: {_named(record)}: cancelled; what was saved stays")


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; was this job submitted with `crossguard launch`?") from None
    except ValueError:
        raise UserError(f"{file}: not what `crossguard launch` wrote; submit again") from None
    return record


def _named(record: dict[str, Any]) -> str:
    return f"{record['launcher']} {', '.join(record['jobs'])}"


def _shown(submission: Submission) -> str:
    folder = submission.folder.parent
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
