"""Heads: which policies are learned together on top of the fused vector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, one_of


@dataclass
class HeadConfig:
    """Some of the policies, with weights of their own."""

    # The policies that it decides; each policy of the taxonomy has exactly one head.
    policies: list[str] = field(default_factory=list)
    # Width of a hidden layer; 0 is a linear head.
    hidden: int = 0

    def __post_init__(self) -> None:
        at_least("model.heads.HEAD.hidden", self.hidden, 0)


def check_heads(heads: Mapping[str, HeadConfig], policies: list[str]) -> None:
    """Whether each policy of the taxonomy has one head, if there are any.

    Raises:
        UserError: names the head or the policy.
    """
    owners: dict[str, str] = {}
    for name, head in heads.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"model.heads: name '{name}': use lower-case letters, digits and underscores")
        if not head.policies:
            raise UserError(f"model.heads.{name}.policies: empty")
        for policy in head.policies:
            one_of(f"model.heads.{name}.policies", policy, policies)
            if policy in owners:
                raise UserError(f"model.heads.{name}.policies: '{policy}' is in head '{owners[policy]}' already")
            owners[policy] = name
    left = [policy for policy in policies if policy not in owners]
    if heads and left:
        raise UserError(f"model.heads: no head has {', '.join(left)}; add them to one, or leave out model.heads")
