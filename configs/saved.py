"""The resolved configuration as a file of the run directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from crossguard.configs.compose import to_schema
from crossguard.configs.errors import UserError
from crossguard.configs.schema import Config

Part = TypeVar("Part")

# Fields that may hold a path, or paths by name.
PATHS = (
    "run_dir",
    "checkpoint.copy_to",
    "data.path",
    "data.shards",
    "data.cache.dir",
    "data.media_dir",
    "data.mixing.datasets",
    "evaluation.against",
    "evaluation.suite",
    "model.start_from",
    "model.text.pretrained",
    "model.text.tokenizer",
    "model.image.pretrained",
    "model.video.pretrained",
    "model.audio.pretrained",
    "train.embeddings_dir",
)


def as_plain(config: Config) -> dict[str, Any]:
    """Nested dictionaries and lists, without absolute paths: those become relative to the working directory; URLs stay.

    A run directory may be copied to another machine, where an absolute path would mean nothing.
    """
    plain: dict[str, Any] = _relative(dataclasses.asdict(config))
    return plain


def save_config(config: Config, file: Path) -> None:
    """Write the whole resolved configuration as YAML, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    staged.write_text(yaml.safe_dump(as_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    staged.replace(file)


def load_config(file: Path) -> Config:
    """Read what `save_config` wrote.

    Raises:
        UserError: there is no such file, or this version of the schema refuses it.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; is this the run directory of a job that has started?")
    loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(file))
    return to_schema(loaded)  # type: ignore[arg-type]


def part_of(schema: type[Part], values: Mapping[str, Any], place: Path) -> Part:
    """A part of the configuration, such as the model, as a run directory or a bundle describes it.

    Args:
        schema: the dataclass of the part.
        values: what `as_plain` made of it.
        place: where they stand, for the error.

    Raises:
        UserError: this version of the schema refuses them.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        raise UserError(f"{place}: {str(error).splitlines()[0]}; it is of another version of crossguard") from None
    assert isinstance(config, schema)
    return config


def select(plain: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The values at dotted `keys`, by key."""
    values = {}
    for key in keys:
        value: Any = plain
        for name in key.split("."):
            value = value[name]
        values[key] = value
    return values


def fingerprint(value: Any) -> str:
    """Hash of anything that JSON can hold, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _relative(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _relative(inner, f"{key}.{name}" if key else name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_relative(inner) for inner in value]
    if (key in PATHS or key.rpartition(".")[0] in PATHS) and isinstance(value, str) and os.path.isabs(value):
        return os.path.relpath(value)
    return value
