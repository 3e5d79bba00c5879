"""`crossguard doctor`: whether this machine can build, train and evaluate, and what to do where it cannot."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from crossguard.configs.cores import usable_cores
from crossguard.configs.errors import JobError

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """What was found; `remedy` is empty where all is well, `fatal` where nothing works without it."""

    found: str
    remedy: str = ""
    fatal: bool = False


def examine(directory: Path) -> None:
    """Print one line for each check.

    Raises:
        JobError: something is missing that a job cannot do without.
    """
    fatal = []
    for name, check in CHECKS.items():
        try:
            finding = check(directory)
        except (ImportError, OSError) as error:  # OSError: of a library that is missing.
            finding = Finding(str(error), "run `make setup`", fatal=True)
        mark = "ok  " if not finding.remedy else ("FAIL" if finding.fatal else "note")
        print(f"{mark}  {name:<14} {finding.found}{f'; {finding.remedy}' if finding.remedy else ''}", flush=True)
        if finding.fatal:
            fatal.append(name)
    if fatal:
        raise JobError(f"doctor: mend first: {', '.join(fatal)}")


def _python(_: Path) -> Finding:
    found = sys.version.split()[0]
    return Finding(found) if sys.version_info >= (3, 11) else Finding(found, "install Python 3.11 or newer", fatal=True)


def _versions(_: Path) -> Finding:
    """Installed versions against the ranges that the package declares."""
    wrong = []
    for text in metadata.requires("crossguard") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Finding("; ".join(wrong), "run `make setup`", fatal=True)
    return Finding(", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "transformers")))


def _compiler(_: Path) -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return Finding("no C++ compiler", "train.compile and optimizer states on NVMe need one: install g++")
    return Finding(compiler) if shutil.which("ninja") else Finding(compiler, "no ninja: pip install ninja")


def _accelerator(_: Path) -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(f"none; training runs on {usable_cores()} CPU cores")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding(", ".join(names))


def _communication(_: Path) -> Finding:
    """A process group of one rank, as training makes it."""
    import tempfile

    import torch

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
            torch.distributed.all_reduce(torch.ones(1, device="cuda" if backend == "nccl" else "cpu"))
            torch.distributed.destroy_process_group()
        except RuntimeError as error:
            return Finding(
                f"{backend}: {str(error).splitlines()[0]}", "check host name and network interface", fatal=True
            )
    return Finding(backend)


def _shared_memory(_: Path) -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("no /dev/shm", "loading processes hand over batches through it; set train.num_workers=0")
    free = shutil.disk_usage(folder).free
    remedy = (
        "" if free >= GIB else "less than 1 GiB: give the container a larger --shm-size, or set train.num_workers=0"
    )
    return Finding(f"{free / GIB:.1f} GiB free", remedy)


def _disk(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    remedy = "" if free >= 5 * GIB else "less than 5 GiB: choose another run_dir, or lower checkpoint.keep_last"
    return Finding(f"{free / GIB:.0f} GiB free here", remedy)


def _tracking(_: Path) -> Finding:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if os.environ.get("WANDB_API_KEY") or (netrc.is_file() and "api.wandb.ai" in netrc.read_text()):
        return Finding("W&B: an API key is set")
    return Finding("W&B: no API key, runs are kept offline in run_dir/wandb (`wandb sync` sends them)")


CHECKS: dict[str, Callable[[Path], Finding]] = {
    "python": _python,
    "versions": _versions,
    "compiler": _compiler,
    "accelerator": _accelerator,
    "communication": _communication,
    "shared memory": _shared_memory,
    "disk": _disk,
    "tracking": _tracking,
}
