"""The names that the encoders of the installed transformers know: of their settings and of their parameters.

`python tests/encoder_names.py [FILE]` writes the snapshot that `model.*.config` and `train.freeze` are checked against.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from crossguard.configs.schema.fusion import JOINT, KINDS, FusionConfig
from crossguard.configs.schema.heads import HeadConfig
from crossguard.configs.schema.ngrams import NgramsConfig
from crossguard.data.taxonomy import Policy, Taxonomy

BEHIND = ("text", "ngrams", "video", "audio")
SNAPSHOT = Path(__file__).parent.parent / "configs" / "model" / "encoder_names.json"

# The lists of transformers that name encoders of text, images, audio or video.
LISTS = (
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_TEXT_ENCODING",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_BACKBONE",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
    "MODEL_FOR_AUDIO_CLASSIFICATION",
    "MODEL_FOR_VIDEO_CLASSIFICATION",
)
# A derived or older setting is listed nowhere: the configuration's code takes it out of its arguments by name.
TAKEN = re.compile(r"""kwargs(?:\.(?:pop|get|setdefault)\(\s*|\[)"(\w+)"|"(\w+)" in kwargs""")
# Or the model's code does, with a default (DeBERTa's position_buckets).
ASKED = re.compile(r"""getattr\(config, "(\w+)\"""")


def installed_names() -> dict[str, Any]:
    """What `encoder_names.json` must hold."""
    import transformers
    from transformers.models.auto import modeling_auto

    listed = {name for part in LISTS for name in getattr(modeling_auto, f"{part}_MAPPING_NAMES")}
    configs: dict[str, Any] = {}
    for model_type in sorted(listed & set(transformers.CONFIG_MAPPING.keys())):
        _collect(transformers.AutoConfig.for_model(model_type), configs)
    settings = {model_type: _settings(config) for model_type, config in configs.items()}
    shared = set.intersection(*settings.values())
    parameters = {name: names for name in sorted(configs) if (names := _encoder_parameters(configs[name]))}
    return {
        "transformers": transformers.__version__,
        "model_types": " ".join(sorted(transformers.CONFIG_MAPPING.keys())),
        "shared_settings": " ".join(sorted(shared)),
        "settings": {name: " ".join(sorted(settings[name] - shared)) for name in sorted(settings)},
        "parts": {name: parts for name in sorted(configs) if (parts := _parts(configs[name]))},
        "parameters": {name: _joined(names) for name, names in parameters.items()},
        "fusion_parameters": {kind: _joined(_fusion_parameters(kind)) for kind in (*KINDS, "bottleneck")},
        "head_parameters": _joined(_head_parameters()),
        "modality_parameters": {name: _joined(_modality_parameters(name)) for name in BEHIND},
    }


def _collect(config: Any, configs: dict[str, Any]) -> None:
    """The configuration and those inside it, by type."""
    if config.model_type and config.model_type not in configs:
        configs[config.model_type] = config
        for part in config.sub_configs:
            if getattr(config, part, None) is not None:
                _collect(getattr(config, part), configs)


def _settings(config: Any) -> set[str]:
    """`name`, or `name:type` where transformers demands a plain type."""
    from transformers import PreTrainedConfig

    names = {*config.to_dict(), *config.attribute_map, *(field.name for field in dataclasses.fields(config))}
    own = [part for part in type(config).__mro__ if part.__module__.startswith("transformers.models.")]
    rotary = [config.convert_rope_params_to_dict] if hasattr(config, "rope_parameters") else []
    for code in (*own, *rotary, PreTrainedConfig.__post_init__):
        names |= {name for found in TAKEN.findall(inspect.getsource(code)) for name in found if name}
    modeling = type(config).__module__.replace("configuration_", "modeling_")
    if importlib.util.find_spec(modeling):
        names |= set(ASKED.findall(inspect.getsource(importlib.import_module(modeling))))
    types = {field.name: _plain_types(field.type) for field in dataclasses.fields(config)}
    return {name + types.get(name, "") for name in names if not name.startswith("_")}


def _plain_types(annotation: Any) -> str:
    """`:int|None` of an annotation, or nothing where it holds anything else than plain types."""
    written = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    parts = sorted(part.strip() for part in written.split("|"))
    return ":" + "|".join(parts) if set(parts) <= {"int", "float", "bool", "str", "None"} else ""


def _parts(config: Any) -> dict[str, str]:
    """Settings that are configurations themselves -> their type by default."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part.model_type for name, part in sorted(parts.items()) if part is not None and part.model_type}


def _encoder_parameters(config: Any) -> set[str]:
    """Names of the encoder's parameters; none where this machine cannot build it or only a part of it is used."""
    import torch
    from transformers import AutoModel

    if {"text_config", "vision_config"} & set(config.sub_configs):
        return set()
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
            encoder = model.get_encoder() if config.is_encoder_decoder else model
    except Exception:  # A package is missing, or the type is only a part of another one.
        return set()
    return {name for name, _ in encoder.named_parameters()}


def _fusion_parameters(kind: str) -> set[str]:
    """Names of a fusion's parameters; those of the modality `text` stand for those of every modality."""
    from crossguard.train.models.fusion import build_fusion

    bottleneck = 2 * (kind == "bottleneck")
    config = FusionConfig(JOINT if bottleneck else kind, width=4, layers=2, heads=2, bottleneck=bottleneck)
    names = (name for name, _ in build_fusion(config, {"text": 4, "image": 4}).named_parameters())
    return {f"fusion.{name}" for name in names if ".image" not in f".{name}"}


def _head_parameters() -> set[str]:
    """Names of the parameters of a head that has all there can be, called `main`."""
    from crossguard.train.models.heads import Heads

    taxonomy = Taxonomy("all", "1", (Policy("hate", "", "", severity_levels=3),))
    heads = Heads({"main": HeadConfig(["hate"], hidden=4)}, taxonomy, width=4)
    return {f"heads.{name}" for name, _ in heads.named_parameters()}


def _modality_parameters(name: str) -> set[str]:
    """Names of what the classifier adds behind the tower of a modality."""
    from crossguard.train.models.audio import Hearing
    from crossguard.train.models.ngrams import NgramTower
    from crossguard.train.models.segments import Segments
    from crossguard.train.models.video import FramePool

    parts = {
        "text": ("segments", Segments(2, 4)),
        "video": ("frames", FramePool(4, 1)),
        "audio": ("hearing", Hearing(4)),
        "ngrams": ("ngrams", NgramTower(NgramsConfig(buckets=4))),
    }
    attribute, part = parts[name]
    return {f"{attribute}.{name}" for name, _ in part.named_parameters()}


def _joined(names: set[str]) -> str:
    """Layers' numbers as 0, the parameters of a module together: `dense.bias|weight`."""
    modules: dict[str, set[str]] = {}
    for name in names:
        module, _, parameter = re.sub(r"\.\d+(?=\.)", ".0", name).rpartition(".")
        modules.setdefault(module, set()).add(parameter)
    return " ".join(f"{module}.{'|'.join(sorted(modules[module]))}".lstrip(".") for module in sorted(modules))


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else SNAPSHOT).write_text(json.dumps(installed_names(), indent=1) + "\n")
