"""Every command of the README runs, in its order, in one working directory; only sizes are made small."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import README, WholeJobs, readme_block
from whole_jobs import readme_commands

from crossguard.data.records import FIELDS


@pytest.fixture(scope="module")
def results(readme: WholeJobs) -> dict[str, subprocess.CompletedProcess[str]]:
    """How each command ended."""
    return readme.outcomes("readme")


@pytest.mark.parametrize("command", readme_commands(), ids=lambda command: command.split(" recipe=")[0])
def test_command_of_the_readme(command: str, results: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = results[command]
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("results")
def test_ranks_started_by_hand_do_the_same_training(readme: WholeJobs) -> None:
    run_dirs = {
        name: readme.folder / "readme" / "runs" / name for name in ("quickstart", "by_torchrun", "by_deepspeed")
    }
    runs = {name: _losses(run_dir) for name, run_dir in run_dirs.items()}
    assert len(runs["quickstart"]) == 3
    assert runs["by_torchrun"] == runs["quickstart"]
    assert runs["by_deepspeed"] == runs["quickstart"]


def _losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_the_first_recipe_is_short() -> None:
    assert len(readme_block("yaml").splitlines()) < 30


def test_every_field_of_a_post_is_in_the_readme() -> None:
    rows = re.search(r"All fields of a post:\n\n(.*?)\n\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert rows is not None
    named = {name for row in rows.group(1).splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == FIELDS
