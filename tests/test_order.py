"""The sample order: exact, the same for any cut, and nearly without padding."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import fresh, mixed_config, orders, plain_order, skewed_layout
from resumed_order import Resumes

from crossguard.configs.errors import UserError
from crossguard.configs.schema.mixing import MixingConfig
from crossguard.data.loading.length_batches import MAX_WINDOW, batches_to_sort
from crossguard.data.loading.order import SampleOrder, micro_batches
from crossguard.data.loading.permutation import SMALL, Permutation, derive_key


def skewed_lengths(samples: int) -> np.ndarray:
    return np.clip(np.exp(np.random.default_rng(0).normal(3.7, 0.8, samples)), 2, 512).astype(np.uint32)


@given(size=st.one_of(st.integers(0, 50), st.integers(SMALL - 2, SMALL + 500)), seed=st.integers(0, 2**63))
def test_a_permutation_reaches_every_index_once(size: int, seed: int) -> None:
    shuffled = Permutation(size, derive_key("test", seed))(np.arange(size))
    assert np.array_equal(np.sort(shuffled), np.arange(size))


@pytest.mark.parametrize("size", [10**6, 10**8, 10**10])
def test_neighbours_are_not_correlated(size: int) -> None:
    for seed in range(4):
        shuffled = Permutation(size, derive_key("test", seed))(np.arange(100_000))
        assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.03
        assert abs(np.corrcoef(shuffled, np.arange(100_000))[0, 1]) < 0.03


def test_the_permutation_is_the_same_for_ever() -> None:
    """Checkpoints of older versions must go on with the same order."""
    key = derive_key("epoch", 0, 0)
    assert Permutation(10, key)(np.arange(10)).tolist() == [0, 2, 3, 7, 8, 4, 1, 9, 6, 5]
    assert Permutation(10**9, key)(np.arange(4)).tolist() == [606970188, 578546736, 741594531, 341246267]


@given(samples=st.integers(1, 700), batch=st.integers(1, 40), seed=st.integers(0, 2**40), planned=st.booleans())
def test_without_mixing_every_sample_comes_once_in_every_epoch(
    samples: int, batch: int, seed: int, planned: bool
) -> None:
    lengths = np.random.default_rng(seed).integers(0, 99, samples) if planned else None
    order = plain_order(samples, batch, seed, lengths=lengths)
    steps = -(-3 * samples // batch)
    delivered = np.concatenate([order.rows(step) for step in range(1, steps + 1)])[: 3 * samples]
    for epoch in delivered.reshape(3, samples):
        assert np.array_equal(np.sort(epoch), np.arange(samples))


@given(order=orders(), steps=st.lists(st.integers(1, 10**9), min_size=1, max_size=5))
def test_a_step_does_not_depend_on_the_steps_before(order: SampleOrder, steps: list[int]) -> None:
    for step in steps:
        assert np.array_equal(order.rows(step), fresh(order).rows(step))


def test_resumes_go_on_with_the_uninterrupted_order() -> None:
    """While mixing, with weights that change, planning by length and redirecting, on any ranks, workers and
    micro-batches; `make soak` does a thousand."""
    resumes, draw = Resumes(), random.Random(0)
    for workers in (0, 1, 2):
        for _ in range(3):
            assert resumes.try_one(draw, workers) >= 10_000


@given(order=orders())
def test_running_backwards_finds_every_step_of_a_row(order: SampleOrder) -> None:
    steps = 3 * order.window_batches // 2
    delivered = np.stack([order.rows(step) for step in range(1, steps + 1)])
    for row in np.random.default_rng(0).integers(0, order.num_samples, 5).tolist():
        counts = (delivered == row).sum(axis=1)
        sources = [] if order.redirects.is_refused(np.array(row)) else [row, *order.redirects.replaced_by(row)]
        found = sorted(step for source in sources for step in order.steps_of(source, steps))
        assert found == np.repeat(np.arange(1, steps + 1), counts).tolist()


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int, lengths: np.ndarray | None) -> list[int]:
        order = plain_order(640, 64, seed, lengths=lengths)
        return np.concatenate([order.rows(step) for step in range(number * 10 + 1, number * 10 + 11)]).tolist()

    for lengths in (None, skewed_lengths(640)):
        assert len({tuple(epoch(seed, number, lengths)) for seed in (0, 1) for number in (0, 1)}) == 4


def test_no_more_is_sorted_than_little_padding_needs() -> None:
    """So that batches stay as mixed as they can be."""
    alike, less_so = (np.random.default_rng(0).integers(30, longest, 50_000) for longest in (33, 60))
    assert batches_to_sort(np.full(1000, 7), 64) == batches_to_sort(np.zeros(1000, dtype=np.int64), 64) == 1
    assert batches_to_sort(alike, 64) == 1
    assert 1 < batches_to_sort(less_so, 64) <= 8
    assert batches_to_sort(skewed_lengths(50_000), 64) >= 64
    assert batches_to_sort(skewed_lengths(50), 64) == MAX_WINDOW


@pytest.mark.parametrize(("batch_size", "ranks", "micro"), [(64, 2, 32), (256, 8, 32), (32, 4, 8)])
def test_little_padding_and_ranks_in_balance(batch_size: int, ranks: int, micro: int) -> None:
    lengths = skewed_lengths(50_000)
    order = plain_order(len(lengths), batch_size, 0, lengths=lengths)
    steps = len(lengths) // batch_size
    taken = np.stack([lengths[order.rows(step)] for step in range(1, steps + 1)]).reshape(steps, ranks, -1, micro)
    padded = taken.max(axis=-1) * micro
    assert 1 - taken.sum() / padded.sum() < 0.05
    by_rank = padded.sum(axis=-1)
    assert by_rank.max(axis=1).sum() / by_rank.mean(axis=1).sum() < 1.12


@given(order=orders(), data=st.data())
def test_refused_rows_never_come_and_move_no_other_position(order: SampleOrder, data: st.DataObject) -> None:
    rows = st.integers(0, order.num_samples - 1)
    more = data.draw(st.sets(rows, max_size=order.num_samples - 1 - len(order.redirects.refused)))
    other = fresh(order)
    other.refuse(np.array(sorted(more), dtype=np.int64))
    refused = [*more, *order.redirects.refused.tolist()]
    for step in range(1, 8):
        before, after = order.rows(step), other.rows(step)
        assert not set(refused) & set(after.tolist())
        kept = ~np.isin(before, refused)
        assert np.array_equal(before[kept], after[kept])


def test_a_refused_sample_is_replaced_inside_its_stratum_as_long_as_one_is_left() -> None:
    layout = skewed_layout(3)
    numbers = np.random.default_rng(0)
    refused = numbers.choice(layout.num_rows, layout.num_rows // 2, replace=False)
    order = SampleOrder(layout, 16, 0, mixed_config(), refused=refused)
    sizes = layout.strata.sizes
    left = sizes - np.bincount(layout.strata.find(refused)[0], minlength=len(sizes))
    assert np.any((left == 0) & (sizes > 0))
    for step in range(1, 200):
        planned, _ = layout.strata.find(order.planned_rows(step))
        read, _ = layout.strata.find(order.rows(step))
        assert np.all((planned == read) | (left[planned] == 0))


def test_nothing_left_to_read() -> None:
    with pytest.raises(UserError, match="none of the split's 3 samples"):
        plain_order(3, 2, 0, refused=np.arange(3))


def test_a_new_order_begins_at_its_first_step() -> None:
    order, later = (plain_order(500, 8, 0, first_step=step) for step in (1, 101))
    assert np.array_equal(order.rows(3), later.rows(103))
    assert later.steps_of(7, 400) == [step + 100 for step in order.steps_of(7, 300)]
    with pytest.raises(UserError, match="step 100: drawn from another order; the one in force begins with step 101"):
        later.rows(100)


def test_state_names_what_changed() -> None:
    lengths = skewed_lengths(50)
    order = plain_order(50, 8, 0, lengths=lengths)
    saved = json.loads(json.dumps(order.state("a" * 64, 80)))
    assert saved["position"] == 80
    assert len(json.dumps(saved)) < 1024
    none = np.zeros(0, dtype=np.int64)
    order.go_on(saved, "a" * 64, none)
    warmer = SampleOrder(order.layout, 8, 0, MixingConfig(temperature=2), lengths=lengths)
    changes = {
        "hash of the manifest": (order, "b" * 64),
        "seed: 0 before, 1 now": (plain_order(50, 8, 1, lengths=lengths), "a" * 64),
        "train.batch_size: 8 before, 10 now": (plain_order(50, 10, 0, lengths=lengths), "a" * 64),
        "token lengths": (plain_order(50, 8, 0, lengths=lengths + 1), "a" * 64),
        "refused samples": (plain_order(50, 8, 0, lengths=lengths, refused=[3]), "a" * 64),
        "train.new_order=true": (plain_order(51, 8, 1), "a" * 64),
    }
    for message, (changed, manifest) in changes.items():
        with pytest.raises(UserError, match=message):
            changed.go_on(saved, manifest, none)
    # One stratum is one group at any temperature: the same quotas, the same order.
    warmer.go_on(saved, "a" * 64, none)


def test_micro_batch_is_the_largest_divisor_not_above_the_bound() -> None:
    assert micro_batches(64, 2, 32) == (32, 1)
    assert micro_batches(64, 2, 31) == (16, 2)
    assert micro_batches(60, 4, 8) == (5, 3)
    assert micro_batches(14, 2, 100) == (7, 1)
    with pytest.raises(UserError, match=r"train.batch_size=10: 4 ranks do not divide it"):
        micro_batches(10, 4, 2)
