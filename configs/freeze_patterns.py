"""Patterns of `train.freeze` and `train.lr_factors`, judged before a model is built: against the names that its
parameters will have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from crossguard.configs.encoder_names import classifier_parameter_names, known_parameters
from crossguard.configs.errors import UserError
from crossguard.configs.schema.model import ModelConfig
from crossguard.configs.suggest import did_you_mean


def freezes(pattern: str, name: str) -> bool:
    """Whether a pattern is that of a parameter, or of a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def check_patterns(patterns: Iterable[str], model: ModelConfig, key: str = "train.freeze") -> None:
    """Refuse a pattern that can match no parameter of the model.

    Numbers and single wildcards match any number here, and every name may follow `text.` where the encoder is the
    user's own or one that nobody knows without asking a hub: what passes is judged again when the model is there.

    Raises:
        UserError: names the pattern and the nearest one that matches something.
    """
    names, open_ended = classifier_parameter_names(model), []
    for modality, encoder in model.encoders.items():
        inside = known_parameters(encoder, modality)
        names += [f"{modality}.encoder.{name}" for name in inside]
        if not inside:
            open_ended.append(f"{modality}." if encoder.build else f"{modality}.encoder.")
    for pattern in patterns:
        if not pattern.strip("*") and key == "train.freeze":
            raise UserError(f"train.freeze: '{pattern}' freezes every parameter; leave at least one to train")
        loose = re.sub(r"\[[^]]*\]|\d+|\?", "*", pattern)
        start = re.split(r"[*?[]", pattern)[0]
        if any(prefix.startswith(start) or start.startswith(prefix) for prefix in open_ended):
            continue
        if not any(freezes(loose, name) for name in names):
            raise no_match(pattern, [*names, *open_ended], key)


def no_match(pattern: str, names: Iterable[str], key: str = "train.freeze") -> UserError:
    """The error of a pattern that matches no parameter; `names` are those of the parameters."""
    parts = [name.split(".") for name in names]
    below = {".".join(part[:depth]) + ".*" for part in parts for depth in range(1, len(part))}
    return UserError(f"{key}: '{pattern}' matches no parameter; {did_you_mean(pattern, [*below, *names])}")
