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
    options = ["--yes", "--quiet", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=15"]
    install = ["install", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120", *missing]
    if _apt(*options, *install) != "":
        _apt(*options, "update")
        if reason := _apt(*options, *install):
            raise RuntimeError(f"{', '.join(missing)} cannot be installed: {reason}")


def _apt(*words: str) -> str:
    """Run apt-get; says why it failed, or nothing."""
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(["apt-get", *words], env=quiet, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "apt-get does not end"
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return said[-1] if done.returncode else ""


def _in_path(folder: str) -> bool:
    return folder in os.environ["PATH"].split(os.pathsep)
