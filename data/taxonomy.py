"""The taxonomy: a versioned, ordered set of policies, in the order of every label vector and of the logits.

What a model learns has a column for each policy, and behind them, for each policy with a severity, one for each of its
levels: whether the post is so severe or more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
        """Policy -> the columns of its levels, the mildest first."""
        found, start = {}, len(self.policies)
        for policy in self.policies:
            if policy.severity_levels:
                found[policy.name] = slice(start, start + policy.severity_levels)
                start += policy.severity_levels
        return found

    @property
    def num_labels(self) -> int:
        """How many columns a model learns."""
        return len(self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a model learns: `hate`, …, `hate >= 1`, `hate >= 2`, …"""
        levels = ((policy.name, level) for policy in self.policies for level in range(1, policy.severity_levels + 1))
        return *self.names, *(f"{name} >= {level}" for name, level in levels)

    def columns_of(self, policies: Collection[str]) -> list[int]:
        """The columns of some of the policies, then those of their levels, both in the order of the taxonomy."""
        own = [number for number, name in enumerate(self.names) if name in policies]
        levels = [range(where.start, where.stop) for name, where in self.severities.items() if name in policies]
        return [*own, *chain.from_iterable(levels)]

    def label_vector(self, labels: Mapping[str, float | None]) -> np.ndarray:
        """The labels as float32[P] in the order of the policies; NaN where nobody gave one."""
        given = (labels.get(policy.name) for policy in self.policies)
        return np.array([np.nan if label is None else label for label in given], dtype=np.float32)

    def level_vector(self, labels: Mapping[str, float | None], severity: Mapping[str, int]) -> np.ndarray:
        """For each level of each severity 1 where the post reaches it, else 0, in the order of `columns`; float32, NaN
        where nobody gave a severity. What is benign has severity 0."""
        levels: list[float] = []
        for policy in self.policies:
            known = severity.get(policy.name, 0 if labels.get(policy.name) == 0 else None)
            steps = range(1, policy.severity_levels + 1)
            levels += [np.nan if known is None else float(known >= step) for step in steps]
        return np.array(levels, dtype=np.float32)


def hold_parents(values: np.ndarray, policies: Sequence[str], parents: Iterable[tuple[str, str]]) -> np.ndarray:
    """Probabilities [posts, policies]: each at most its parent's.

    Args:
        values: left as they are.
        policies: in the order of the columns.
        parents: (child, parent), every parent before its own children.
    """
    held = values.copy()
    for child, parent in parents:
        column, above = policies.index(child), policies.index(parent)
        held[:, column] = np.minimum(held[:, column], held[:, above])
    return held
