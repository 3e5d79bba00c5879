"""Every command of the README runs, in its order, in one working directory; only sizes are made small."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import README, ROOT, SMALL, run_command

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


def _commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in NOT_RUN_HERE]


def _demo() -> str:
    """The command that `make demo` runs after the set-up."""
    found = re.search(r"^demo:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize("command", _commands())
def test_command_of_the_readme(command: str, workspace: Path) -> None:
    line = shlex.split(_demo() if command == "make demo" else command)
    extra = [setting for recipe, settings in SMALLER.items() if recipe in line for setting in settings]
    if line[:2] in (["crossguard", "config"], ["crossguard", "doctor"]):
        extra = []
    done = run_command([*line, *extra], workspace)
    assert "Traceback" not in done.stderr


def test_the_first_recipe_is_short() -> None:
    from conftest import readme_block

    assert len(readme_block("yaml").splitlines()) < 30


def test_every_field_of_a_post_is_in_the_readme() -> None:
    from crossguard.data.records import FIELDS

    rows = re.search(r"All fields of a post:\n\n(.*?)\n\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert rows is not None
    named = {name for row in rows.group(1).splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == FIELDS
