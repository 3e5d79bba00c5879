"""`crossguard recipes` and `crossguard config`: what there is to choose, and where a value comes from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from crossguard.configs.compose import Composition, composition, group_file
from crossguard.configs.keys import check_file_keys, describe_fields
from crossguard.configs.recipe_files import available_recipes


def recipe_sentences() -> dict[str, str]:
    """Name -> description of every recipe that can be named from here."""
    recipes = available_recipes()
    for file in recipes.values():
        check_file_keys(file)
    return {name: str(_yaml(file).get("description", "")) for name, file in recipes.items()}


def describe(argv: list[str]) -> str:
    """A line for each field of the configuration: `key = value`, its meaning and its origin.

    Raises:
        UserError: the configuration is wrong.
    """
    composed = composition(argv)
    origins = _origins(composed)
    lines = []
    for key, value, meaning in _fields(composed.config, ""):
        lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
        lines.append(f"    {meaning}  [{_origin(key, origins)}]")
    return "\n".join(lines)


def _fields(group: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    meanings = describe_fields(type(group))
    for field in dataclasses.fields(group):
        value, key = getattr(group, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{key}.")
        else:
            yield key, _plain(value), meanings[field.name]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _origins(composed: Composition) -> dict[str, str]:
    """Key (of a field, or of the mapping it lies in) -> who set it last."""
    origins: dict[str, str] = {}
    for group, choice in composed.choices.items():
        if (file := group_file(group, choice)) is not None:
            origins |= {f"{group}.{key}": f"{group}={choice}" for key in _keys(_yaml(file))}
    origins |= dict.fromkeys(_keys(_yaml(composed.recipe_file)), f"recipe {composed.recipe_file.name}")
    for override in composed.arguments.overrides:
        origins[override.lstrip("+").partition("=")[0]] = "command line"
    return origins


def _origin(key: str, origins: dict[str, str]) -> str:
    """The origin of a field: its own, that of a key inside it, or the schema's default."""
    inside = [origin for named, origin in origins.items() if named == key or named.startswith(f"{key}.")]
    return inside[-1] if inside else "default"


def _keys(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _yaml(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
