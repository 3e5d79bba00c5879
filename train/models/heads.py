"""Heads: from the fused vector to one logit for each policy, and the levels of those that have a severity.

A policy below another one (`parent`) gets the product of conditional probabilities, P(child) = P(child | parent) ·
P(parent): for whatever weights its score is never above its parent's. Severity has cumulative logits with one vector of
weights and ordered biases (arXiv 1901.07884): P(severity ≥ k) never rises with k.
"""

from __future__ import annotations

from itertools import accumulate, chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossguard.configs.errors import UserError
from crossguard.configs.schema.heads import HeadConfig
from crossguard.data.taxonomy import Taxonomy

# The one head of a model whose configuration names none.
MAIN = "main"


class Heads(nn.ModuleDict):
    """All heads, by name; each has policies of its own, so that none changes when another is added or trained."""

    def __init__(self, config: dict[str, HeadConfig], taxonomy: Taxonomy, width: int, beside: int = 0):
        """
        Args:
            config: name → its policies; without any, one head has all of them.
            taxonomy: the order of the policies, their parents and levels.
            width: of the fused vector; 0 without one.
            beside: of the vector of n-grams; 0 without them.

        Raises:
            UserError: a name that no head can have.
        """
        config = config or {MAIN: HeadConfig(list(taxonomy.names))}
        try:
            super().__init__({name: Head(one, taxonomy, width, beside) for name, one in config.items()})
        except KeyError as error:  # It is what a method of torch's modules is called.
            raise UserError(f"model.heads: choose another name ({error.args[0]})") from None
        made = list(chain.from_iterable(taxonomy.columns_of(one.policies) for one in config.values()))
        # Where each column of the label vector stands in what the heads say, one after the other.
        self._order = [made.index(column) for column in range(taxonomy.num_labels)]
        self._parents = [(taxonomy.names.index(child), taxonomy.names.index(up)) for child, up in taxonomy.parents]

    def forward(self, features: Tensor, beside: Tensor | None = None) -> Tensor:
        """float[B, width] and float[B, beside] → float32[B, L]: logits of the columns of the label vector."""
        logits = torch.cat([head(features, beside) for head in self.values()], dim=1)
        if self._order != sorted(self._order):
            logits = logits[:, self._order]
        if not self._parents:
            return logits
        columns = list(logits.unbind(1))
        for child, parent in self._parents:
            columns[child] = both(columns[child], columns[parent])
        return torch.stack(columns, dim=1)


def rows_of(config: dict[str, HeadConfig], taxonomy: Taxonomy) -> dict[str, list[tuple[str, str]]]:
    """Each tensor of the heads → for each of its rows the policy that it belongs to ("" where it is all of the head's),
    and what it means: rows that mean the same can be exchanged between any two models with the same trunk.

    Args:
        config: as for `Heads`.
        taxonomy: as for `Heads`.
    """
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, head in (config or {MAIN: HeadConfig(list(taxonomy.names))}).items():
        # Behind a hidden layer, only with that layer.
        layer = f"{name} hidden {head.hidden} " if head.hidden else ""
        own = [policy for policy in taxonomy.policies if policy.name in head.policies]
        graded = [policy for policy in own if policy.severity_levels]
        meanings = [(one.name, f"{layer}{one.name} in {one.parent}") for one in own]
        levels = [(one.name, f"{layer}{one.name} of {one.severity_levels}") for one in graded]
        for kind in ("weight", "bias"):
            if head.hidden:
                rows[f"heads.{name}.hidden.{kind}"] = [("", f"{layer}{kind} {row}") for row in range(head.hidden)]
            rows[f"heads.{name}.logits.{kind}"] = [(one, f"{kind} {meaning}") for one, meaning in meanings]
            if graded:
                rows[f"heads.{name}.severity.score.{kind}"] = [(one, f"level {kind} {level}") for one, level in levels]
        if graded:
            rows[f"heads.{name}.severity.gaps"] = [
                (policy, f"gap {gap} {level}")
                for (policy, level), one in zip(levels, graded, strict=True)
                for gap in range(1, one.severity_levels)
            ]
    return rows


class Head(nn.Module):
    """Some of the policies: their logits, then the levels of those with a severity."""

    def __init__(self, config: HeadConfig, taxonomy: Taxonomy, width: int, beside: int = 0):
        super().__init__()
        self.hidden = nn.Linear(width, config.hidden) if config.hidden else None
        levels = [policy.severity_levels for policy in taxonomy.policies if policy.name in config.policies]
        self.logits = nn.Linear((config.hidden or width) + beside, len(levels))
        # Every policy starts at probability one half (given its parent), whatever the encoders say.
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        if beside:  # The n-grams' table is zero: were this zero as well, neither would ever learn.
            nn.init.orthogonal_(self.logits.weight.detach()[:, -beside:])
        self.severity = Severity([count for count in levels if count], self.logits.in_features) if any(levels) else None

    def forward(self, features: Tensor, beside: Tensor | None = None) -> Tensor:
        """float[B, width] and float[B, beside] → float32[B, columns]."""
        if self.hidden is not None:
            features = F.gelu(self.hidden(features))
        if beside is not None:
            features = torch.cat([features, beside], dim=-1)
        logits: Tensor = self.logits(features).float()
        return logits if self.severity is None else torch.cat([logits, self.severity(features)], dim=1)


class Severity(nn.Module):
    """The logit of "this severe or more" for each level of some policies."""

    def __init__(self, levels: list[int], width: int):
        """
        Args:
            levels: of each policy, 2 or more; the level 0, which is none, does not count.
            width: of what it reads.
        """
        super().__init__()
        self.levels = levels
        # Its bias is that of level 1.
        self.score = nn.Linear(width, len(levels))
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        # How far each further bias lies below the one before it, by softplus.
        self.gaps = nn.Parameter(torch.zeros(sum(levels) - len(levels)))

    def forward(self, features: Tensor) -> Tensor:
        """float[B, width] → float32[B, Σ levels]."""
        scores = self.score(features).float().unbind(1)
        gaps = F.softplus(self.gaps.float()).split([count - 1 for count in self.levels])
        # One after the other: rounding cannot turn two levels around.
        levels = (accumulate([score, *gap], torch.sub) for score, gap in zip(scores, gaps, strict=True))
        return torch.stack(list(chain.from_iterable(levels)), dim=1)


def both(first: Tensor, second: Tensor) -> Tensor:
    """The logit of the product of two probabilities, from their logits: never above either of them, rounding included.

    (1 - pq) / pq = e^-x + e^-y + e^-(x+y), whose logarithm is at least that of each summand.
    """
    return -torch.logsumexp(torch.stack([-first, -second, -first - second]), dim=0)
