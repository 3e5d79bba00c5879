"""Strata, mixing cycles, the windowed shuffle and redirects: exact, and the same forwards and backwards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import mixed_config, skewed_layout

from crossguard.configs.errors import UserError
from crossguard.configs.schema.mixing import MixingConfig, WeightChange
from crossguard.data.loading.mixing import MAX_CYCLE, Mixing, Phase, cycle_quotas, temperature_shares
from crossguard.data.loading.order import SampleOrder
from crossguard.data.loading.permutation import SMALL, Permutation, derive_key
from crossguard.data.loading.redirects import Redirects
from crossguard.data.loading.windows import WindowedShuffle

quotas = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any).map(np.array)


@given(size=st.one_of(st.integers(1, 50), st.integers(SMALL - 2, SMALL + 500)), seed=st.integers(0, 2**63))
def test_a_permutation_runs_backwards(size: int, seed: int) -> None:
    permutation = Permutation(size, derive_key("test", seed))
    assert np.array_equal(permutation.inverse(permutation(np.arange(size))), np.arange(size))


def test_a_large_permutation_runs_backwards() -> None:
    permutation = Permutation(10**10, derive_key("test", 0))
    indices = np.random.default_rng(0).integers(0, 10**10, 10_000)
    assert np.array_equal(permutation.inverse(permutation(indices)), indices)


@given(seed=st.integers(0, 10_000))
def test_groups_partition_the_rows(seed: int) -> None:
    layout = skewed_layout(seed)
    rows = np.arange(layout.num_rows)
    for groups in (layout.datasets, layout.strata):
        found, ordinals = groups.find(rows)
        assert np.array_equal(np.bincount(found, minlength=len(groups.names)), groups.sizes)
        for group, size in enumerate(groups.sizes.tolist()):
            own = groups.rows(group, np.arange(size))
            assert np.array_equal(own, rows[found == group])
            assert np.array_equal(ordinals[own], np.arange(size))


def test_temperature_evens_out_up_to_the_cap() -> None:
    sizes = np.array([100_000, 1_000, 10, 0])
    natural = sizes / sizes.sum()
    np.testing.assert_allclose(temperature_shares(sizes, 1, 10), natural)
    np.testing.assert_allclose(temperature_shares(sizes, 1e9, 1e9), [1 / 3, 1 / 3, 1 / 3, 0])
    root = np.sqrt(sizes)
    np.testing.assert_allclose(temperature_shares(sizes, 2, 1e9), root / root.sum())
    capped = temperature_shares(sizes, 5, 10)
    np.testing.assert_allclose(capped[1:], 10 * natural[1:])
    assert capped.sum() == pytest.approx(1)


@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=300).map(np.array), temperature=st.floats(1, 20))
def test_quotas_are_the_shares_to_within_a_slot(sizes: np.ndarray, temperature: float) -> None:
    shares = temperature_shares(sizes, temperature, 10)
    found = cycle_quotas(shares)
    assert found.min() >= 1
    assert found.sum() <= MAX_CYCLE + len(sizes)
    # One slot of rounding, and what groups get that would have none.
    assert np.all(np.abs(found - shares * found.sum()) <= 2 + np.count_nonzero(found == 1) * shares)


@given(first=quotas, seed=st.integers(0, 99), cycles=st.integers(0, 10**6))
def test_each_cycle_meets_its_quotas_exactly(first: np.ndarray, seed: int, cycles: int) -> None:
    mixing = Mixing([Phase(0, first)], seed)
    length = int(first.sum())
    groups, draws = mixing.draws(cycles * length, (cycles + 1) * length)
    assert np.array_equal(np.bincount(groups, minlength=len(first)), first)
    for group, quota in enumerate(first.tolist()):
        assert draws[groups == group].tolist() == list(range(cycles * quota, (cycles + 1) * quota))


@given(first=quotas, seed=st.integers(0, 99), change=st.integers(1, 300), data=st.data())
def test_draws_go_on_where_weights_change_and_run_backwards(
    first: np.ndarray, seed: int, change: int, data: st.DataObject
) -> None:
    second = np.array(data.draw(st.permutations(first.tolist())))
    mixing = Mixing([Phase(0, first), Phase(change, second)], seed)
    groups, draws = mixing.draws(0, 600)
    for group in range(len(first)):
        places = np.flatnonzero(groups == group)
        assert draws[places].tolist() == list(range(len(places)))
        for draw, place in enumerate(places.tolist()):
            assert mixing.position(group, draw) == place
        assert mixing.draws_before(group, 600) == len(places)
    start = data.draw(st.integers(0, 599))
    assert np.array_equal(mixing.draws(start, 600)[1], draws[start:])


@given(size=st.integers(1, 3000), block=st.integers(1, 60), epoch=st.integers(0, 10**6))
def test_a_windowed_shuffle_reaches_every_row_once_and_runs_backwards(size: int, block: int, epoch: int) -> None:
    shuffle = WindowedShuffle(size, block, "test")
    shuffled = shuffle(epoch, np.arange(size))
    assert np.array_equal(np.sort(shuffled), np.arange(size))
    assert np.array_equal(shuffle.inverse(epoch, shuffled), np.arange(size))


@pytest.mark.parametrize("size", [10**6, 10**8, 10**10])
def test_neighbours_of_the_order_are_not_correlated(size: int) -> None:
    for epoch in range(3):
        shuffle = WindowedShuffle(size, max(1, size // 100_000), "test")
        positions = np.sort(np.random.default_rng(epoch).choice(size - 1, 100_000, replace=False))
        here, following = shuffle(epoch, positions), shuffle(epoch, positions + 1)
        assert abs(np.corrcoef(here, following)[0, 1]) < 0.03


def test_reads_stay_in_a_window_of_blocks() -> None:
    shuffle = WindowedShuffle(1_000_000, 1000, "test")
    for start in (0, 300_000, 640_000):
        assert len(np.unique(shuffle(5, np.arange(start, start + 10_000)) // 1000)) <= 128


def test_every_sample_comes_once_in_an_epoch_of_its_stratum() -> None:
    layout = skewed_layout(5)
    order = SampleOrder(layout, 32, 0, MixingConfig(datasets={"a": "x"}, temperature=3))
    window = order.window_batches
    rows = np.concatenate([order.rows(step) for step in range(1, window * 40 + 1)])
    groups, _ = layout.strata.find(rows)
    for group, size in enumerate(layout.strata.sizes.tolist()):
        drawn = rows[groups == group]
        for epoch in range(len(drawn) // size if size else 0):
            assert len(np.unique(drawn[epoch * size : (epoch + 1) * size])) == size


def test_weights_are_met_before_and_after_a_change() -> None:
    layout = skewed_layout(5)
    order = SampleOrder(layout, 64, 0, mixed_config(temperature=1, change_after=640))
    for steps, share in ((range(1, 641), 0.25), (range(641, 1281), 0.5)):
        datasets, _ = layout.datasets.find(np.concatenate([order.rows(step) for step in steps]))
        assert np.mean(datasets == 1) == pytest.approx(share, abs=0.001)


@given(seed=st.integers(0, 1000), share=st.floats(0, 0.99))
def test_redirects_run_backwards(seed: int, share: float) -> None:
    strata = skewed_layout(seed % 50).strata
    numbers = np.random.default_rng(seed)
    rows = np.arange(strata.num_rows)
    redirects = Redirects.of(strata, seed, numbers.choice(rows, int(share * len(rows)), replace=False))
    resolved = redirects.resolve(rows)
    assert not np.any(redirects.is_refused(resolved))
    for row in numbers.choice(rows[~redirects.is_refused(rows)], 5).tolist():
        assert sorted([row, *redirects.replaced_by(row)]) == np.flatnonzero(resolved == row).tolist()


def test_found_bad_while_reading_is_the_same_as_refused_before() -> None:
    strata = skewed_layout(2).strata
    known = np.arange(0, strata.num_rows, 7)
    bad = np.arange(3, strata.num_rows, 5)
    before = Redirects.of(strata, 0, known)
    for row in range(strata.num_rows):
        found, redirects = before.resolve(np.array([row])), before
        while found[0] in bad:  # as a reader does: one after the other
            redirects = redirects.with_refused(found)
            found = redirects.resolve(np.array([row]))
        assert found == before.with_refused(bad).resolve(np.array([row]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": 0.5}, "data.mixing.temperature=0.5"),
        ({"datasets": {"own": "x"}}, "data.mixing.datasets.own"),
        ({"datasets": {"a": "x"}, "weights": {"own": 1.0}}, "data.mixing.weights: must name each of a, own"),
        ({"weights": {"own": 0.0}}, "data.mixing.weights: must not be negative"),
        ({"changes": [WeightChange(5, {"own": 1.0})]}, "data.mixing.changes: set data.mixing.weights"),
        (
            {"weights": {"own": 1.0}, "changes": [WeightChange(5, {"own": 1.0}), WeightChange(5, {"own": 1.0})]},
            r"data.mixing.changes\[1\].after_step=5: must be above 5",
        ),
    ],
)
def test_wrong_mixing_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixingConfig(**config)  # type: ignore[arg-type]
