"""Schema of a taxonomy: a versioned, ordered set of policies."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import one_of

# Statement categories of the transparency database of the EU Digital Services Act.
DSA_CATEGORIES = (
    "ANIMAL_WELFARE",
    "CONSUMER_INFORMATION",
    "CYBER_VIOLENCE",
    "CYBER_VIOLENCE_AGAINST_WOMEN",
    "DATA_PROTECTION_AND_PRIVACY_VIOLATIONS",
    "ILLEGAL_OR_HARMFUL_SPEECH",
    "INTELLECTUAL_PROPERTY_INFRINGEMENTS",
    "NEGATIVE_EFFECTS_ON_CIVIC_DISCOURSE_OR_ELECTIONS",
    "NOT_SPECIFIED_NOTICE",
    "OTHER_VIOLATION_TC",
    "PROTECTION_OF_MINORS",
    "RISK_FOR_PUBLIC_SECURITY",
    "SCAMS_AND_FRAUD",
    "SELF_HARM",
    "UNSAFE_AND_PROHIBITED_PRODUCTS",
    "VIOLENCE",
)

# What strata call a post without a known violation: benign where a label says so, unknown where there is no label.
BENIGN, UNKNOWN = "benign", "unknown"


@dataclass
class PolicyConfig:
    """One thing that the platform forbids."""

    # The key under `labels` in a post: lower-case letters, digits and underscores.
    name: str = ""
    # One sentence that a reviewer would recognise.
    description: str = ""
    # The category of the EU Digital Services Act's transparency database that it is reported under.
    dsa_category: str = "OTHER_VIOLATION_TC"
    # A policy that this one is a part of: what violates this one violates that one too, and its score is never above
    # that one's, calibrated or not. Actions keep the promises of each policy by itself.
    parent: str | None = None
    # Levels of severity above 0, which is none (posts carry `severity: {POLICY: 0 … LEVELS}`); 0 is a policy without.
    severity_levels: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UserError(f"taxonomy.policies: name '{self.name}': use lower-case letters, digits and underscores")
        one_of(f"taxonomy.policies.{self.name}.dsa_category", self.dsa_category, DSA_CATEGORIES)
        if self.severity_levels < 0 or self.severity_levels == 1:
            raise UserError(
                f"taxonomy.policies.{self.name}.severity_levels={self.severity_levels}: 2 or more, or 0 for none"
            )


@dataclass
class TaxonomyConfig:
    """A versioned, ordered set of policies; the order is the order of the model's logits."""

    # Name of the taxonomy.
    name: str = ""
    # Version of the taxonomy; raise it whenever a policy is added, removed or redefined.
    version: str = "1"
    # The policies, in the order of the model's outputs.
    policies: list[PolicyConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [policy.name for policy in self.policies]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise UserError(f"taxonomy.policies: '{doubled[0]}' stands twice")
        for name, what in ((BENIGN, "a post that violates nothing"), (UNKNOWN, "a post without any known label")):
            if name in names:
                raise UserError(f"taxonomy.policies: '{name}' is no policy: it is {what}")
        if not names:
            raise UserError("taxonomy.policies: empty; choose one with taxonomy=NAME or list policies in the recipe")
        self._check_parents()

    def _check_parents(self) -> None:
        parents = {policy.name: policy.parent for policy in self.policies}
        for name, parent in parents.items():
            if parent is None:
                continue
            one_of(f"taxonomy.policies.{name}.parent", parent, parents)
            above = [name]
            while parent is not None:
                if parent in above:
                    raise UserError(f"taxonomy.policies.{name}.parent: {' < '.join([*above, parent])} is a circle")
                above.append(parent)
                parent = parents[parent]
