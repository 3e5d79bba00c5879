"""The key names of DeepSpeed's own configuration, from a committed snapshot: DeepSpeed ignores a misspelled one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean

_KINDS = {"number": "a number", "bool": "true or false"}


@cache
def snapshot() -> dict[str, Any]:
    """Valid names: a block's name -> the names inside it; any other name -> "number", "bool" or None (anything)."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / "zero" / "deepspeed_keys.json").read_text())
    return content


def check_names(block: Mapping[str, Any]) -> None:
    """Refuse a misspelled key under `zero.deepspeed`, and a word where a number or a truth value belongs.

    Raises:
        UserError: names the key and the nearest valid one.
    """
    _check(block, snapshot(), "zero.deepspeed")


def _check(block: Mapping[str, Any], valid: dict[str, Any], path: str) -> None:
    for name, value in block.items():
        if name not in valid:
            raise UserError(f"{path}.{name}: DeepSpeed has no such key; {did_you_mean(str(name), valid)}")
        inside = valid[name]
        if isinstance(inside, dict) and isinstance(value, Mapping):
            _check(value, inside, f"{path}.{name}")
        if isinstance(inside, str) and not isinstance(value, int | float | None) and value != "auto":
            raise UserError(f"{path}.{name}={value}: must be {_KINDS[inside]}")
