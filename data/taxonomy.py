"""The taxonomy: a versioned, ordered set of policies, in the order of every label vector and of the logits.

A label vector has a column for each policy, and behind them, for each policy with a severity, one for each of its
levels: whether the post is so severe or more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from crossguard.configs.schema.taxonomy import TaxonomyConfig

# A share of rater votes counts as violating from here on.
POSITIVE_FROM = 0.5


@dataclass(frozen=True, slots=True)
class Policy:
    """One thing that the platform forbids."""

    name: str
    description: str
    dsa_category: str
    # The policy that this one is a part of.
    parent: str | None = None
    # Levels of severity above 0; 0 is a policy without.
    severity_levels: int = 0


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """A versioned, ordered set of policies."""

    name: str
    version: str
    policies: tuple[Policy, ...]

    @classmethod
    def from_config(cls, config: TaxonomyConfig) -> Taxonomy:
        """The taxonomy that a recipe names."""
        policies = tuple(
            Policy(p.name, p.description, p.dsa_category, p.parent, p.severity_levels) for p in config.policies
        )
        return cls(config.name, str(config.version), policies)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Taxonomy:
        """The taxonomy that `to_json` wrote."""
        return cls(value["name"], value["version"], tuple(Policy(**policy) for policy in value["policies"]))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the policies; no parent and no levels are left out."""
        policies = [
            {name: value for name, value in asdict(policy).items() if value not in (None, 0)}
            for policy in self.policies
        ]
        return {"name": self.name, "version": self.version, "policies": policies}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the policies, in order."""
        return tuple(policy.name for policy in self.policies)

    @property
    def parents(self) -> list[tuple[str, str]]:
        """(child, parent), every parent before its own children."""
        found: list[tuple[str, str]] = []
        rest = [(policy.name, policy.parent) for policy in self.policies if policy.parent is not None]
        while rest:
            waiting = {child for child, _ in rest}
            found += [(child, parent) for child, parent in rest if parent not in waiting]
            rest = [(child, parent) for child, parent in rest if parent in waiting]
        return found

    @property
    def severities(self) -> dict[str, slice]:
        """Policy -> its levels' columns of the label vector, the mildest first."""
        found, start = {}, len(self.policies)
        for policy in self.policies:
            if policy.severity_levels:
                found[policy.name] = slice(start, start + policy.severity_levels)
                start += policy.severity_levels
        return found

    @property
    def num_labels(self) -> int:
        """Length of the label vector."""
        return len(self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """What the columns of the label vector say: `hate`, …, `hate >= 1`, `hate >= 2`, …"""
        levels = ((policy.name, level) for policy in self.policies for level in range(1, policy.severity_levels + 1))
        return *self.names, *(f"{name} >= {level}" for name, level in levels)

    def columns_of(self, policies: Collection[str]) -> list[int]:
        """The columns of some of the policies, then those of their levels, both in the order of the taxonomy."""
        own = [number for number, name in enumerate(self.names) if name in policies]
        levels = [range(where.start, where.stop) for name, where in self.severities.items() if name in policies]
        return [*own, *chain.from_iterable(levels)]

    def label_vector(self, labels: Mapping[str, float | None], severity: Mapping[str, int] | None = None) -> np.ndarray:
        """Labels and levels as float32[num_labels]; NaN where nobody gave one. What is benign has severity 0."""
        given = (labels.get(policy.name) for policy in self.policies)
        columns = [np.nan if label is None else label for label in given]
        for name, where in self.severities.items():
            known = (severity or {}).get(name, 0 if labels.get(name) == 0 else None)
            levels = range(1, where.stop - where.start + 1)
            columns += [np.nan if known is None else float(known >= level) for level in levels]
        return np.array(columns, dtype=np.float32)
