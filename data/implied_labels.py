"""Labels that other labels imply, and those that contradict each other.

What violates a policy violates those above it, and what is benign in one is benign in those below it. A severity above
0 is a violation, and 0 is none. A share of rater votes implies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from crossguard.data.taxonomy import POSITIVE_FROM, Taxonomy


def complete_labels(
    taxonomy: Taxonomy, labels: Mapping[str, float], severity: Mapping[str, int]
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """The labels with those that they imply where nobody gave one, and (field, message) for each contradiction."""
    found, wrong = dict(labels), []
    for policy in taxonomy.policies:
        if not policy.severity_levels or policy.name not in severity:
            continue
        level, field = severity[policy.name], f"severity.{policy.name}"
        label = found.setdefault(policy.name, float(level > 0))
        if level > policy.severity_levels:
            wrong.append((field, f"must not be above {policy.severity_levels}, as {level} is"))
        elif (label >= POSITIVE_FROM) != (level > 0):
            wrong.append((field, f"is {level}, and labels.{policy.name} is {label:g}; 0 is no violation, more is one"))
    for child, parent in reversed(taxonomy.parents):
        if found.get(child) == 1:
            found.setdefault(parent, 1.0)
        if found.get(child, 0) >= POSITIVE_FROM > found.get(parent, 1):
            given = "is" if child in labels else "is implied to be"
            message = f"{given} {found[child]:g}, and labels.{parent} is {found[parent]:g}, of which it is a part"
            wrong.append((f"labels.{child}", f"{message}; what violates '{child}' violates '{parent}'"))
    for child, parent in taxonomy.parents:
        if found.get(parent) == 0:
            found.setdefault(child, 0.0)
    return found, wrong
