"""The hostfile of DeepSpeed's launcher: a line `HOST slots=N` for each host; `#` begins a comment."""

from __future__ import annotations

import re
from pathlib import Path

from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean

_LINE = re.compile(r"(?P<host>\S+)\s+slots\s*=\s*(?P<slots>\S+)")
Slots = dict[str, list[int]]


def read_hostfile(file: Path) -> Slots:
    """Host -> its slots, in the order of the file.

    Raises:
        UserError: names `file:line`, what is wrong there, and what a line looks like.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"launcher.deepspeed.hostfile={file}: {reason}") from None
    hosts: Slots = {}
    for number, line in enumerate(lines, 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        place = f"{file}:{number}"
        # DeepSpeed reads `slots=2x` as 2 and refuses `slots = 2`; both are refused here.
        match = _LINE.fullmatch(content)
        if match is None or "slots=" not in content:
            raise UserError(f"{place}: '{content}': must be HOST slots=N, e.g. worker-0 slots=8")
        host, slots = match["host"], match["slots"]
        if not re.fullmatch(r"[1-9]\d*", slots):
            raise UserError(f"{place}: slots={slots}: must be a whole number from 1")
        if host in hosts:
            raise UserError(f"{place}: host '{host}' stands here twice; give it one line with all its slots")
        hosts[host] = list(range(int(slots)))
    if not hosts:
        raise UserError(f"{file}: names no host; a line is HOST slots=N, e.g. worker-0 slots=8")
    return hosts


def chosen(hosts: Slots, include: str | None, exclude: str | None, file: str) -> Slots:
    """The hosts and slots that are left by `include` or `exclude`, written HOST[:SLOT,SLOT][@HOST…].

    Raises:
        UserError: one names a host or a slot that the hostfile lacks, or nothing is left.
    """
    if include:
        named = _named("include", include, hosts, file)
        left = {host: named[host] for host in hosts if host in named}
    else:
        named = _named("exclude", exclude, hosts, file) if exclude else {}
        left = {host: [slot for slot in slots if slot not in named.get(host, [])] for host, slots in hosts.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise UserError(f"launcher.deepspeed.exclude={exclude}: leaves no slot of {file}")
    return left


def _named(key: str, text: str, hosts: Slots, file: str) -> Slots:
    named: Slots = {}
    for part in text.split("@"):
        host, colon, listed = part.partition(":")
        if host not in hosts:
            hint = did_you_mean(host, hosts)
            raise UserError(f"launcher.deepspeed.{key}={text}: host '{host}' is not in {file}; {hint}")
        slots = listed.split(",") if colon else [str(slot) for slot in hosts[host]]
        for slot in slots:
            if not slot.isdecimal() or int(slot) not in hosts[host]:
                raise UserError(f"launcher.deepspeed.{key}={text}: {host} has no slot '{slot}' in {file}")
        named[host] = sorted({*named.get(host, []), *map(int, slots)})
    return named
