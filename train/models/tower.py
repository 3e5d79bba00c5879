"""What a tower is: the encoder of one modality, a vector for each of its tokens."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from crossguard.configs.errors import UserError
from crossguard.configs.own_parts import load_own, naming


class Tower(nn.Module):
    """Its `forward` gives float[B, T, width]."""

    width: int


def build_own_tower(spec: str, key: str, config: Any) -> Tower:
    """A tower of the user's own, `module:function`, called with the modality's configuration.

    Raises:
        UserError: there is no such function, or what it returns is no module or does not say how wide its output is.
    """
    tower = naming(load_own(spec, key), f"{key}={spec}")(config)
    if not isinstance(tower, nn.Module) or not isinstance(getattr(tower, "width", None), int):
        raise UserError(f"{key}={spec}: must return a torch.nn.Module with an integer attribute 'width'")
    return cast(Tower, tower)
