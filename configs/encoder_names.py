"""The names that encoders of `transformers` know, from a committed snapshot: importing it takes seconds, and it ignores
a misspelled setting. A snapshot of another version than the installed one judges nothing; the ranks do, later."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import EncoderConfig
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.suggest import did_you_mean

# `name` or `owner/name`; everything else is a folder.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Modality -> a type of encoder, and the part of a dual encoder's (CLIP's) configuration that describes its tower.
EXAMPLES = {"text": "bert", "image": "vit", "video": "vit", "audio": "whisper"}
PARTS = {"text": "text_config", "image": "vision_config", "video": "vision_config", "audio": "audio_config"}
_FOLDERS = {"pretrained": "model (config.json)", "tokenizer": "tokenizer (tokenizer.json, tokenizer_config.json)"}


@cache
def snapshot() -> dict[str, Any]:
    """The names by type of model, separated by spaces: `settings` (beside `shared_settings`; `name:type` where a plain
    type is demanded), `parts` (settings that are configurations themselves -> their type), `parameters`; and the names
    of all types, in `model_types`."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / "model" / "encoder_names.json").read_text())
    return content


def check_settings(values: Mapping[str, Any], key: str) -> None:
    """Refuse an unknown `model_type`, and misspelled or mistyped settings of a configuration of `transformers`.

    Args:
        values: what stands under `key`.
        key: e.g. "model.text.config".

    Raises:
        UserError: names the key and the nearest valid name.
    """
    model_type = values.get("model_type")
    if model_type is None:
        raise UserError(f"{key}.model_type: missing; e.g. {EXAMPLES[key.split('.')[1]]}")
    if is_of_installed_version():
        _check(values, str(model_type), key)


def check_folders(encoder: EncoderConfig, key: str) -> None:
    """Refuse a folder with a model or a tokenizer that is not there.

    Raises:
        UserError: `pretrained` or `tokenizer` is no folder and cannot be the id of a model on the hub either.
    """
    for name in ("pretrained", "tokenizer"):
        value = getattr(encoder, name, None)
        if value and not _HUB_ID.fullmatch(value) and not Path(value).is_dir():
            raise UserError(f"{key}.{name}={value}: no such folder")
        if value and Path(value).is_dir() and not any(Path(value).glob("*.json")):
            raise UserError(f"{key}.{name}={value}: the folder holds no {_FOLDERS[name]}")


def tower_type(values: Mapping[str, Any], modality: str) -> str:
    """The type of the encoder of `modality` that a configuration describes: of a dual encoder (CLIP) one tower's."""
    model_type = str(values.get("model_type"))
    part = PARTS[modality]
    inside = values.get(part)
    default = snapshot()["parts"].get(model_type, {}).get(part, model_type)
    return str(inside.get("model_type", default)) if isinstance(inside, Mapping) else default


def parameter_names(model_type: str) -> list[str]:
    """Names of an encoder's parameters, the layers' numbers as 0; empty for a type that the snapshot lacks."""
    return _expanded(snapshot()["parameters"].get(model_type, ""))


def known_parameters(encoder: EncoderConfig, modality: str) -> list[str]:
    """Names of the parameters inside an encoder, the layers' numbers as 0, as far as they are known without building
    it: empty for one of the user's own, or one that nobody knows without asking a hub."""
    values: Mapping[str, Any] = encoder.config
    if encoder.pretrained:
        described = Path(encoder.pretrained) / "config.json"
        values = json.loads(described.read_text()) if described.is_file() else {}
    known = bool(values) and not encoder.build and is_of_installed_version()
    return parameter_names(tower_type(values, modality)) if known else []


def classifier_parameter_names(model: ModelConfig) -> list[str]:
    """Names of the parameters that the classifier adds to its encoders, the layers' numbers as 0."""
    kind = "bottleneck" if model.fusion.bottleneck else model.fusion.kind
    names = _expanded(f"{snapshot()['fusion_parameters'][kind]} {snapshot()['head_parameters']}")
    # Those of the modality `text` and of the head `main` stand for those of the others.
    for placeholder, given in (("text", model.modalities), ("main", list(model.heads) or ["main"])):
        place = re.compile(rf"(?<=\.){placeholder}(?=\.|$)")
        names = list(dict.fromkeys(place.sub(name, entry) for entry in names for name in given))
    behind_towers = snapshot()["modality_parameters"]
    return names + [entry for name in model.modalities for entry in _expanded(behind_towers.get(name, ""))]


def is_of_installed_version() -> bool:
    """Whether the snapshot says what the installed transformers knows."""
    return bool(version("transformers") == snapshot()["transformers"])


def _check(values: Mapping[str, Any], model_type: str, key: str) -> None:
    types = snapshot()["model_types"].split()
    if model_type not in types:
        raise UserError(f"{key}.model_type={model_type}: unknown; {did_you_mean(model_type, types)}")
    settings = snapshot()["settings"].get(model_type)
    if settings is None:
        return
    parts = snapshot()["parts"].get(model_type, {})
    entries = [*settings.split(), *snapshot()["shared_settings"].split()]
    valid = {name: types for name, _, types in (entry.partition(":") for entry in entries)}
    for name, value in values.items():
        if name not in valid:
            raise UserError(f"{key}.{name}: no setting of {model_type}; {did_you_mean(str(name), valid)}")
        # The types are exact: a float that is written 1 is refused.
        if valid[name] and type(value).__name__.removesuffix("Type") not in valid[name].split("|"):
            raise UserError(f"{key}.{name}={value}: must be {valid[name].replace('|', ' or ')}")
        if name in parts and isinstance(value, Mapping):
            _check(value, str(value.get("model_type", parts[name])), f"{key}.{name}")


def _expanded(joined: str) -> list[str]:
    """`dense.bias|weight` -> `dense.bias`, `dense.weight`."""
    names = []
    for entry in joined.split():
        module, dot, parameters = entry.rpartition(".")
        names += [f"{module}{dot}{parameter}" for parameter in parameters.split("|")]
    return names
