"""Debian packages that some tests need: installed where they are missing and this is root."""

from __future__ import annotations

import os
import shutil
import subprocess


def installed(programs: dict[str, str]) -> None:
    """See to it that the programs are there.

    Args:
        programs: program -> the Debian package that brings it.

    Raises:
        RuntimeError: one is missing and cannot be installed; says why.
    """
    os.environ["PATH"] += "".join(f"{os.pathsep}{folder}" for folder in ("/usr/sbin", "/sbin") if not _in_path(folder))
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"needs {', '.join(missing)} (Debian packages), or root to install them")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    line = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing]
    for attempt in (line, ["apt-get", "update", "--quiet"], line):
        done = subprocess.run(attempt, env=quiet, capture_output=True, text=True, timeout=240, check=False)
        if attempt is line and done.returncode == 0:
            return
    raise RuntimeError(f"{', '.join(missing)} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")


def _in_path(folder: str) -> bool:
    return folder in os.environ["PATH"].split(os.pathsep)
