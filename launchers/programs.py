"""Programs of a scheduler: run, with one line where they fail."""

from __future__ import annotations

import shutil
import subprocess

from crossguard.configs.errors import JobError, UserError


def need(program: str, instead: str) -> None:
    """
    Raises:
        UserError: there is no such program here; says what to do instead.
    """
    if shutil.which(program) is None:
        raise UserError(f"{program}: not found; {instead}")


def output(line: list[str], given: str | None = None, *, wrong: type[JobError] | type[UserError] = JobError) -> str:
    """What a program prints.

    Args:
        line: the command line.
        given: its standard input.
        wrong: what to raise where it fails.

    Raises:
        JobError, UserError: it failed; with the first line that it said.
        UserError: there is no such program here.
    """
    try:
        done = subprocess.run(line, input=given, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError(f"{line[0]}: not found; ask from a machine of the cluster") from None
    except subprocess.CalledProcessError as failed:
        said = (failed.stderr or failed.stdout).strip().splitlines()
        first = said[0].removeprefix(f"{line[0]}: ") if said else f"exit status {failed.returncode}"
        raise wrong(f"{line[0]}: {first}") from None
    return done.stdout.strip()
