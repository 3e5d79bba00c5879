"""The sample order: exact, the same for any cut, and nearly without padding."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossguard.configs.errors import UserError
from crossguard.data.loading.order import SampleOrder, micro_batches
from crossguard.data.loading.permutation import SMALL, Permutation, derive_key

orders = st.builds(
    lambda samples, batch, seed, planned: SampleOrder(
        samples, batch, seed, np.random.default_rng(seed).integers(0, 99, samples) if planned else None
    ),
    samples=st.integers(1, 700),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    planned=st.booleans(),
)


def skewed_lengths(samples: int) -> np.ndarray:
    return np.clip(np.exp(np.random.default_rng(0).normal(3.7, 0.8, samples)), 2, 512).astype(np.uint32)


@settings(deadline=None)
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


@settings(deadline=None)
@given(order=orders)
def test_every_sample_comes_once_in_every_epoch(order: SampleOrder) -> None:
    n = order.num_samples
    steps = -(-3 * n // order.batch_size)
    delivered = np.concatenate([order.rows(step) for step in range(1, steps + 1)])[: 3 * n]
    for epoch in delivered.reshape(3, n):
        assert np.array_equal(np.sort(epoch), np.arange(n))


@settings(deadline=None)
@given(order=orders, steps=st.lists(st.integers(1, 10**9), min_size=1, max_size=5))
def test_a_step_does_not_depend_on_the_steps_before(order: SampleOrder, steps: list[int]) -> None:
    fresh = [SampleOrder(order.num_samples, order.batch_size, order.seed, order.lengths) for _ in steps]
    for step, other in zip(steps, fresh, strict=True):
        assert np.array_equal(order.rows(step), other.rows(step))


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int, lengths: np.ndarray | None) -> list[int]:
        order = SampleOrder(640, 64, seed, lengths)
        return np.concatenate([order.rows(step) for step in range(number * 10 + 1, number * 10 + 11)]).tolist()

    for lengths in (None, skewed_lengths(640)):
        assert len({tuple(epoch(seed, number, lengths)) for seed in (0, 1) for number in (0, 1)}) == 4


@pytest.mark.parametrize(("batch_size", "ranks", "micro"), [(64, 2, 32), (256, 8, 32), (32, 4, 8)])
def test_little_padding_and_ranks_in_balance(batch_size: int, ranks: int, micro: int) -> None:
    lengths = skewed_lengths(50_000)
    order = SampleOrder(len(lengths), batch_size, 0, lengths)
    steps = len(lengths) // batch_size
    taken = np.stack([lengths[order.rows(step)] for step in range(1, steps + 1)]).reshape(steps, ranks, -1, micro)
    padded = taken.max(axis=-1) * micro
    assert 1 - taken.sum() / padded.sum() < 0.04
    by_rank = padded.sum(axis=-1)
    assert by_rank.max(axis=1).sum() / by_rank.mean(axis=1).sum() < 1.06


@settings(deadline=None)
@given(order=orders, data=st.data())
def test_refused_rows_never_come_and_move_no_other_position(order: SampleOrder, data: st.DataObject) -> None:
    n = order.num_samples
    refused = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    other = SampleOrder(n, order.batch_size, order.seed, order.lengths, np.array(sorted(refused)))
    for step in range(1, 8):
        before, after = order.rows(step), other.rows(step)
        assert not refused & set(after.tolist())
        kept = ~np.isin(before, list(refused))
        assert np.array_equal(before[kept], after[kept])


def test_nothing_left_to_read() -> None:
    with pytest.raises(UserError, match="none of the split's 3 samples"):
        SampleOrder(3, 2, 0, refused=np.arange(3))


def test_state_names_what_changed() -> None:
    lengths = skewed_lengths(50)
    order = SampleOrder(50, 8, 0, lengths)
    saved = json.loads(json.dumps(order.state("a" * 64, 80)))
    assert saved["position"] == 80
    assert len(json.dumps(saved)) < 1024
    order.check_state(saved, "a" * 64)
    changes = {
        "hash of the manifest": (order, "b" * 64),
        "seed: 0 before, 1 now": (SampleOrder(50, 8, 1, lengths), "a" * 64),
        "train.batch_size: 8 before, 10 now": (SampleOrder(50, 10, 0, lengths), "a" * 64),
        "token lengths": (SampleOrder(50, 8, 0, lengths + 1), "a" * 64),
    }
    for message, (changed, manifest) in changes.items():
        with pytest.raises(UserError, match=message):
            changed.check_state(saved, manifest)


def test_more_posts_may_expire_between_two_runs_but_none_comes_back() -> None:
    some, more = (SampleOrder(50, 8, 0, refused=np.arange(count)) for count in (3, 5))
    more.check_state(some.state("", 0), "")
    with pytest.raises(UserError, match="refused samples"):
        some.check_state(more.state("", 0), "")


def test_micro_batch_is_the_largest_divisor_not_above_the_bound() -> None:
    assert micro_batches(64, 2, 32) == (32, 1)
    assert micro_batches(64, 2, 31) == (16, 2)
    assert micro_batches(60, 4, 8) == (5, 3)
    assert micro_batches(14, 2, 100) == (7, 1)
    with pytest.raises(UserError, match=r"train.batch_size=10: 4 ranks do not divide it"):
        micro_batches(10, 4, 2)
