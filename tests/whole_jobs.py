"""The commands of the end-to-end tests, which take minutes: a program that runs them beside the other tests.

`conftest.py` starts it with a folder when tests are there that want it:

workspace/          a working directory with `posts/`, the README's recipe `my_posts.yaml`, and its job `runs/my_posts`
readme/             the same, in which every command of the README has run, in its order; only sizes are made small
workspace.json      how each command ended, once all of them have: [[command, exit status, stdout, stderr], …]
readme.json

The workspace's job is started as a user starts it. Of the README's commands, those that need torch are forked from the
pool of the tests, and so are their ranks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from conftest import README, ROOT, readme_block, write_posts
from rank_jobs import LONGEST, run_crossguard

from crossguard.configs.parent_death import die_with_parent

# What makes the README's first recipe small enough for a test; everything else stays as the README has it.
SMALL = [
    "train.max_steps=4",
    "evaluation.every_steps=2",
    "evaluation.min_positives=2",
    "train.log_samples=true",
    "checkpoint.every_steps=2",
]
SMALLER = {
    "recipe=quickstart": [
        "data.options={train_posts: 192, validation_posts: 96, test_posts: 96, unseen_posts: 24}",
        "train.max_steps=3",
        "train.batch_size=16",
        "evaluation.every_steps=3",
        "evaluation.min_positives=2",
        # As ranks that are started by hand have here, with whose losses those of the launcher's are compared.
        "launcher.threads_per_proc=1",
    ],
    "recipe=my_posts.yaml": SMALL,
}
# What `make setup` and `make test` do is what installs and runs this file.
NOT_RUN_HERE = {"make test"}
FORKED = {"run", "build", "train", "evaluate", "export", "predict", "plan", "launch"}


def readme_commands() -> list[str]:
    """In their order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in NOT_RUN_HERE]


def demo() -> str:
    """The command that `make demo` runs after the set-up."""
    found = re.search(r"^demo:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1)


def run(command: str, folder: Path, forked: Collection[str] = ()) -> list[str | int]:
    """Run a command there; itself, and how it ended."""
    program, *line = shlex.split(demo() if command == "make demo" else command)
    line += [setting for recipe, settings in SMALLER.items() if recipe in line for setting in settings]
    if program == "crossguard" and line[0] in forked:
        done = run_crossguard(line, folder, status=None, timeout=LONGEST)
    else:
        done = subprocess.run(
            [program, *line], cwd=folder, capture_output=True, text=True, timeout=LONGEST, check=False
        )
    return [command, done.returncode, done.stdout, done.stderr]


def write(file: Path, outcomes: list[list[str | int]]) -> None:
    """At once."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(outcomes))
    half.rename(file)


def main(folder: Path, with_readme: bool) -> None:
    """The workspace first: more tests wait for it."""
    workspace, readme = folder / "workspace", folder / "readme"
    write_posts(workspace / "posts")
    (workspace / "my_posts.yaml").write_text(readme_block("yaml"), encoding="utf-8")
    outcome = run("crossguard run recipe=my_posts.yaml", workspace)
    if with_readme:
        shutil.copytree(workspace, readme)
    write(folder / "workspace.json", [outcome])
    if with_readme:
        write(folder / "readme.json", [run(command, readme, FORKED) for command in readme_commands()])


if __name__ == "__main__":
    die_with_parent()
    os.nice(5)  # The other tests are waited for.
    main(Path(sys.argv[1]), sys.argv[2:] == ["readme"])
