"""The targets of adapters (`model.*.lora.targets`), judged before a model is built."""

from __future__ import annotations

import re
from collections.abc import Iterable

from crossguard.configs.encoder_names import known_parameters
from crossguard.configs.errors import UserError
from crossguard.configs.schema.encoders import ALL_LINEAR, EncoderConfig
from crossguard.configs.suggest import did_you_mean

_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


def check_targets(encoder: EncoderConfig, modality: str) -> None:
    """Refuse a target that no module of the encoder is called, as far as its names are known; what passes is judged
    again when the model is there.

    Raises:
        UserError: names the target and the nearest name.
    """
    names = {name.rpartition(".")[0] for name in known_parameters(encoder, modality)}
    if encoder.lora.rank and names:
        for target in encoder.lora.targets:
            if target != ALL_LINEAR and not any(is_end_of(_LAYER.sub("0", target), name) for name in names):
                raise no_target(f"model.{modality}.lora", target, names)


def is_end_of(target: str, name: str) -> bool:
    """Whether `target` is the name of a module, or its last parts."""
    return f".{name}".endswith(f".{target}")


def no_target(key: str, target: str, names: Iterable[str]) -> UserError:
    """The error of a target that matches no linear module; `names` are those of the modules."""
    ends = {name.split(".", depth)[-1] for name in names for depth in range(name.count(".") + 1)}
    hint = did_you_mean(target, [ALL_LINEAR, *(end for end in ends if not end[:1].isdigit())])
    return UserError(f"{key}.targets: '{target}' matches no linear module of the encoder; {hint}")
