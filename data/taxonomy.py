"""The taxonomy: a versioned, ordered set of policies, in the order of every label vector and of the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crossguard.configs.schema.taxonomy import TaxonomyConfig


@dataclass(frozen=True, slots=True)
class Policy:
    """One thing that the platform forbids."""

    name: str
    description: str
    dsa_category: str


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """A versioned, ordered set of policies."""

    name: str
    version: str
    policies: tuple[Policy, ...]

    @classmethod
    def from_config(cls, config: TaxonomyConfig) -> Taxonomy:
        """The taxonomy that a recipe names."""
        policies = tuple(Policy(p.name, p.description, p.dsa_category) for p in config.policies)
        return cls(config.name, str(config.version), policies)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Taxonomy:
        """The taxonomy that `to_json` wrote."""
        return cls(value["name"], value["version"], tuple(Policy(**policy) for policy in value["policies"]))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the policies."""
        return {"name": self.name, "version": self.version, "policies": [asdict(policy) for policy in self.policies]}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the policies, in order."""
        return tuple(policy.name for policy in self.policies)

    def label_vector(self, labels: Mapping[str, float | None]) -> np.ndarray:
        """The labels as float32[P] in the order of the policies; NaN where nobody gave one."""
        given = (labels.get(policy.name) for policy in self.policies)
        return np.array([np.nan if label is None else label for label in given], dtype=np.float32)
