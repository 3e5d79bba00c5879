"""Layouts and orders for the tests of the sample order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from crossguard.configs.schema.mixing import MixingConfig, WeightChange
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.strata import Layout


def plain_layout(samples: int, samples_per_shard: int = 100) -> Layout:
    """One dataset of one stratum."""
    starts = range(0, samples, samples_per_shard)
    counts = np.array([[min(samples_per_shard, samples - start)] for start in starts])
    return Layout.of_counts(["own"], [["und/benign"]], [counts])


def skewed_layout(
    seed: int, shards: Sequence[int] = (7, 3), strata: Sequence[int] = (9, 4), scale: float = 1
) -> Layout:
    """Datasets `own`, `a`, `b` … whose strata differ in size by orders of magnitude; some are missing in some shards."""
    draw = np.random.default_rng(seed)
    names = ["own", *"abcdefg"][: len(shards)]
    tables = [
        draw.poisson(scale * draw.lognormal(1, 1.5, own), (count, own))
        for count, own in zip(shards, strata, strict=True)
    ]
    for table in tables:
        table[0, 0] += 1  # no dataset is empty
    return Layout.of_counts(names, [[f"l{number}/benign" for number in range(own)] for own in strata], tables)


def plain_order(samples: int, batch_size: int, seed: int, **options: Any) -> SampleOrder:
    """Without mixing."""
    return SampleOrder(plain_layout(samples), batch_size, seed, MixingConfig(), **options)


def mixed_config(temperature: float = 3.0, change_after: int = 20) -> MixingConfig:
    """Two datasets whose weights change."""
    return MixingConfig(
        temperature=temperature,
        datasets={"a": "elsewhere"},
        weights={"own": 3.0, "a": 1.0},
        changes=[WeightChange(change_after, {"own": 1.0, "a": 1.0})],
    )


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    """With and without mixing, planning and refused rows."""
    seed = draw(st.integers(0, 2**40))
    layout = draw(st.sampled_from([plain_layout(draw(st.integers(1, 700))), skewed_layout(seed % 1000)]))
    mixing = MixingConfig()
    if len(layout.datasets.names) > 1:
        mixing = draw(
            st.sampled_from(
                [MixingConfig(datasets={"a": "x"}), mixed_config(1.0, 3), mixed_config(4.0, draw(st.integers(1, 40)))]
            )
        )
    rows = layout.num_rows
    numbers = np.random.default_rng(seed)
    return SampleOrder(
        layout,
        draw(st.integers(1, 40)),
        seed,
        mixing,
        lengths=numbers.integers(0, 99, rows) if draw(st.booleans()) else None,
        refused=numbers.choice(rows, draw(st.integers(0, min(rows - 1, 30))), replace=False),
    )


def fresh(order: SampleOrder) -> SampleOrder:
    """The same order, which has computed nothing yet."""
    return SampleOrder(
        order.layout,
        order.batch_size,
        order.seed,
        order.mixing_config,
        lengths=order.lengths,
        refused=order.redirects.refused,
        first_step=order.first_step,
    )
