"""Sweeps in Hydra's own syntax: `train.lr=1e-3,1e-4 seed=range(0,3)` are six jobs, each with its own run directory."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from crossguard.configs.arguments import take
from crossguard.configs.errors import UserError
from crossguard.recipes.job import Job
from crossguard.recipes.stages import BUILD

# A sweep over these needs shards of its own for each job.
DECIDE_SHARDS = (*BUILD.keys, "data.path", "data.media_dir")
# Sources whose posts are there, whatever the seed.
FOUND = ("jsonl", "table", "hf", "webdataset")
MOST_JOBS = 1000


def sweep(arguments: list[str]) -> tuple[list[list[str]], Path, list[str] | None]:
    """The jobs of a sweep.

    Args:
        arguments: `recipe=NAME key=value …`, of which some values are sweeps; `run_dir` is the folder of all jobs, by
            default `runs/RECIPE-sweep`.

    Returns:
        The arguments of each job, the folder of all, and the arguments of the build whose shards they all read (None
        where each has its own).

    Raises:
        UserError: nothing is swept, or a sweep is one that cannot be listed.
    """
    own, rest = take(arguments, "run_dir", "recipe")
    if "recipe" not in own:
        raise UserError("recipe: not set; say recipe=NAME, one for all jobs of the sweep")
    fixed, swept = [], {}
    for argument in rest:
        values = _values(argument)
        if values is None:
            fixed.append(argument)
        else:
            swept[argument.partition("=")[0].lstrip("+")] = values
    if not swept:
        raise UserError("--multirun: no argument is a sweep; write e.g. train.lr=1e-3,1e-4 or seed=range(0,3)")
    common = [f"recipe={own['recipe']}", *fixed]
    points = [list(zip(swept, choice, strict=True)) for choice in itertools.product(*swept.values())]
    if len(points) > MOST_JOBS:
        raise UserError(f"--multirun: {len(points)} jobs; at most {MOST_JOBS}")
    base = Path(own.get("run_dir") or f"runs/{Path(own['recipe']).stem}-sweep")
    first = [f"{key}={value}" for key, value in points[0]]
    job = Job.from_arguments([*common, *first, f"run_dir={base}"])
    shares = job.config.launcher.name != "kubernetes" and not _decides_shards(set(swept), job)
    if shares and not job.config.data.shards:
        common.append(f"data.shards={base / 'shards'}")
    jobs = [
        [*common, *(f"{key}={value}" for key, value in point), f"run_dir={base / _folder(point)}"] for point in points
    ]
    build = [*common, *first, f"run_dir={base}"] if shares and job.config.data.has_posts else None
    return jobs, base, build


def _decides_shards(swept: set[str], job: Job) -> bool:
    """Whether the jobs of a sweep over these keys would build different shards."""
    if "seed" in swept and job.config.data.source not in FOUND:
        return True
    return any(
        f"{key}.".startswith(f"{own}.") or f"{own}.".startswith(f"{key}.") for key in swept for own in DECIDE_SHARDS
    )


def _values(argument: str) -> list[str] | None:
    """The values of a sweep as Hydra would list them, or None where the argument has one value."""
    try:
        override: Override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return None  # Text with characters of Hydra's grammar, or wrong, which composing tells better.
    if not override.is_sweep_override():
        return None
    if not override.is_discrete_sweep():
        raise UserError(f"{argument}: cannot be listed; write choices (a,b) or range(start,stop,step)")
    return [str(value) for value in override.sweep_string_iterator()]


def _folder(point: list[tuple[str, str]]) -> str:
    """The name of a job's run directory, e.g. `train.lr-1e-3_seed-1`: no shell has to quote it."""
    return "_".join(re.sub(r"[^\w.+-]+", "-", f"{key}-{value}") for key, value in point)
