"""Questions about any step of a run, answered without reading the steps before it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.reader import SampleError, ShardReader
from crossguard.data.loading.redirects import Redirects
from crossguard.data.loading.refused import Refused


def preview(reader: ShardReader, order: SampleOrder, refused: Refused, step: int) -> list[str]:
    """Ids of the global batch of `step`, in the order of their positions.

    A sample that no rank has found to be damaged so far is shown as planned; where not even its id can be read, by the
    key of its members.

    Raises:
        UserError: no such step in this order.
    """
    return [_id(reader, row) for row in _at(order, refused, step).resolve(order.planned_rows(step)).tolist()]


def exposure(order: SampleOrder, refused: Refused, row: int, last_step: int) -> list[int]:
    """The steps up to `last_step` that delivered a row, once for each time.

    The order is run backwards: a row comes where it is planned, and in the place of each refused row that is redirected
    to it, as long as that one was refused.
    """
    # Between two of these steps, the same rows were refused.
    changes = [order.first_step, *np.unique(refused.since[refused.since > order.first_step]).tolist(), last_step + 1]
    steps: list[int] = []
    planned: dict[int, list[int]] = {}
    for begin, end in pairwise(changes):
        redirects = _at(order, refused, begin)
        if not redirects.is_refused(np.array(row)):
            for source in (row, *redirects.replaced_by(row)):
                if source not in planned:
                    planned[source] = order.steps_of(source, last_step)
                steps += [step for step in planned[source] if begin <= step < end]
    return sorted(steps)


def _at(order: SampleOrder, refused: Refused, step: int) -> Redirects:
    """The redirects that were in force in a step."""
    return Redirects.of(order.layout.strata, order.seed, refused.in_step(step))


def _id(reader: ShardReader, row: int) -> str:
    try:
        return reader.read_head(row).id
    except SampleError as error:
        return error.key
