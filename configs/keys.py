"""The names that a configuration may use, read from the schema: which keys exist, what type they have."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config
from crossguard.configs.suggest import did_you_mean

# Hydra groups: each is a folder of YAML files and, but for `recipe`, a field of the configuration.
GROUPS = tuple(
    name for name, annotation in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(annotation)
)


class UnknownKey(Exception):
    """A key that the schema does not have; carries the innermost wrong name and the names valid in its place."""

    def __init__(self, path: str, name: str, valid: list[str]):
        super().__init__(path)
        self.path, self.name, self.valid = path, name, valid

    def explain(self) -> str:
        """What is wrong and the nearest valid name, for the end of a line."""
        return f"unknown key '{self.name}'; {did_you_mean(self.name, self.valid)}"


def type_of(path: str) -> Any:
    """The annotation at a dotted path such as `train.loss.gamma`; `Any` below a free-form mapping.

    Raises:
        UnknownKey: the schema has no such key.
    """
    current: Any = Config
    for name in path.split("."):
        if dataclasses.is_dataclass(current):
            hints = typing.get_type_hints(current)
            if name not in hints:
                raise UnknownKey(path, name, list(hints))
            current = hints[name]
        elif typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        elif current is not Any:
            raise UnknownKey(path, name, [])
    return current


def is_free_form(path: str) -> bool:
    """Whether the key at `path` is, or lies inside, a mapping whose names the schema leaves open."""
    parts = path.split(".")
    return any(typing.get_origin(type_of(".".join(parts[:count]))) is dict for count in range(1, len(parts) + 1))


def described_mapping(path: str) -> str | None:
    """The mapping of open names to values with a schema that `path` is or lies inside, if there is one."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        annotation = type_of(above := ".".join(parts[:count]))
        if typing.get_origin(annotation) is dict and dataclasses.is_dataclass(typing.get_args(annotation)[1]):
            return above
    return None


def accepts_text(path: str) -> bool:
    """Whether the field at `path` takes a string."""
    annotation = type_of(path)
    union = typing.get_args(annotation) if typing.get_origin(annotation) is types.UnionType else ()
    return annotation is Any or str in (annotation, *union)


def check_file_keys(file: Path, prefix: str = "") -> None:
    """Compare the keys of a YAML file with the schema.

    Args:
        file: the YAML file of a recipe (`prefix` empty) or of a group's choice.
        prefix: the group that the file belongs to, e.g. "train".

    Raises:
        UserError: `file:line: key: unknown; nearest valid name`, or the file is no valid YAML.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else f"{file}"
        raise UserError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{file}: must be a mapping of keys to values")
    for path, line in _paths(root, prefix):
        try:
            type_of(path)
        except UnknownKey as unknown:
            raise UserError(f"{file}:{line}: {path}: {unknown.explain()}") from None


def _paths(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    """Dotted path and line of every key, Hydra's own `defaults` at the top left out."""
    for key_node, value_node in node.value:
        name = str(key_node.value)
        if name == "defaults" and not prefix:
            continue
        path = f"{prefix}.{name}" if prefix else name
        yield path, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            yield from _paths(value_node, path)


def describe_fields(cls: type) -> dict[str, str]:
    """The sentence that stands above each field of a schema dataclass, from its source or that of what it extends."""
    meanings: dict[str, str] = {}
    comment: list[str] = []
    names = {field.name for field in dataclasses.fields(cls)}
    source = "\n".join(inspect.getsource(part) for part in cls.__mro__ if dataclasses.is_dataclass(part))
    for line in map(str.strip, source.splitlines()):
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        name = line.split(":", 1)[0]
        if name in names and name not in meanings:
            meanings[name] = " ".join(comment)
        comment = []
    return meanings
