"""Every command of the README runs, in its order, in one working directory; only sizes are made small."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import README, ROOT, SMALL, readme_block, run_command

from crossguard.data.records import FIELDS

SMALLER = {
    "recipe=quickstart": [
        "data.options={train_posts: 192, validation_posts: 96, test_posts: 96, unseen_posts: 24}",
        "train.max_steps=3",
        "train.batch_size=16",
        "evaluation.every_steps=3",
        "evaluation.min_positives=2",
    ],
    "recipe=my_posts.yaml": SMALL,
}
# What `make setup` and `make test` do is what installs and runs this file.
NOT_RUN_HERE = {"make test"}
Results = dict[str, subprocess.CompletedProcess[str]]


def _commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in NOT_RUN_HERE]


def _demo() -> str:
    """The command that `make demo` runs after the set-up."""
    found = re.search(r"^demo:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


@pytest.fixture(scope="module")
def results(workspace: Path) -> Results:
    """Each command, run after those that stand before it."""
    done = {}
    for command in _commands():
        line = shlex.split(_demo() if command == "make demo" else command)
        extra = [setting for recipe, settings in SMALLER.items() if recipe in line for setting in settings]
        done[command] = run_command([*line, *extra], workspace, status=None)
    return done


@pytest.mark.parametrize("command", _commands(), ids=lambda command: command.split(" recipe=")[0])
def test_command_of_the_readme(command: str, results: Results) -> None:
    done = results[command]
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "Traceback" not in done.stderr


def test_ranks_started_by_hand_do_the_same_training(results: Results, workspace: Path) -> None:
    runs = {name: _losses(workspace / "runs" / name) for name in ("quickstart", "by_torchrun", "by_deepspeed")}
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
