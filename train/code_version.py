"""Ranks on several machines must run the same code: what they learn together would be nobody's otherwise."""

from __future__ import annotations

import hashlib
import socket
from functools import cache
from importlib.metadata import version
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.train.ranks import Ranks

PACKAGE = Path(__file__).parent.parent
FLOORS = ("configs", "data", "launchers", "recipes", "train")
LIBRARIES = ("crossguard", "torch", "deepspeed", "transformers")


def check_same_code(ranks: Ranks) -> None:
    """Compare this package's sources and the versions of what decides a training over all ranks.

    Raises:
        UserError: they differ; names a machine of each kind.
    """
    if ranks.world_size == 1:
        return
    machine_of: dict[str, str] = {}
    for machine, code in ranks.gather((socket.gethostname(), code_version())):
        machine_of.setdefault(code, machine)
    if len(machine_of) > 1:
        found = "; ".join(f"{machine} has {code}" for code, machine in machine_of.items())
        raise UserError(f"the ranks run different code: {found}; install the same on all machines")


@cache
def code_version() -> str:
    """Versions of libraries and a hash of this package's files: `crossguard 0.1.0 (4be1…), torch 2.13.0, …`."""
    digest = hashlib.blake2b(digest_size=6)
    for floor in FLOORS:
        for file in sorted((PACKAGE / floor).rglob("*")):
            if file.suffix in (".py", ".yaml", ".json"):
                digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    versions = {name: version(name) for name in LIBRARIES}
    versions["crossguard"] += f" ({digest.hexdigest()})"
    return ", ".join(f"{name} {number}" for name, number in versions.items())
