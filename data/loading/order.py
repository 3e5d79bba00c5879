"""The sample order: which sample comes when, as pure arithmetic on (shards, seed, position).

Position p counts samples delivered so far over all ranks; step s ≥ 1 covers positions [(s-1)·B, s·B). A position is
mapped to a group and the number of its draw (mixing), that to an epoch of the group and a place in it, that to a row by
the group's shuffle of that epoch (windows); rows that may not be read are replaced (redirects), and the batches of a
window are planned by length. Nothing depends on ranks, workers or what was read before: any step is known without the
steps before it, a few hundred bytes are the whole state, and the order can be run backwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from crossguard.configs.errors import UserError
from crossguard.configs.schema.mixing import MixingConfig
from crossguard.data.loading.length_batches import MAX_WINDOW, batches_to_sort, plan_by_length
from crossguard.data.loading.mixing import Mixing, Phase, cycle_quotas, temperature_shares
from crossguard.data.loading.redirects import Redirects
from crossguard.data.loading.strata import Layout
from crossguard.data.loading.windows import WindowedShuffle

STATE_FORMAT = 2
# Batches planned together by length. The posts of a small group come round in fewer; being of one length, the repeated
# ones share batches, so that the window is shortened, but not below this.
MIN_WINDOW_BATCHES = 32
# What the parts of the state are called where the user sets them.
STATE_NAMES = {
    "format": "format of the state",
    "manifest": "shards (hash of the manifest)",
    "seed": "seed",
    "batch_size": "train.batch_size",
    "mixing": "data.mixing",
    "lengths": "token lengths (tokenizer or its max_length)",
    "refused": "refused samples",
}


def micro_batches(batch_size: int, world_size: int, micro_batch_size: int) -> tuple[int, int]:
    """Samples in one forward pass of a rank, and passes in a step.

    `micro_batch_size` is an upper bound: the largest divisor of batch_size / world_size not above it is taken.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    if batch_size % world_size:
        raise UserError(
            f"train.batch_size={batch_size}: {world_size} ranks do not divide it; choose a multiple of {world_size}"
        )
    share = batch_size // world_size
    micro = next(size for size in range(min(micro_batch_size, share), 0, -1) if share % size == 0)
    return micro, share // micro


class SampleOrder:
    """The order of one split.

    Args:
        layout: its datasets and strata.
        batch_size: samples of a step over all ranks, B.
        seed: chooses the order.
        mixing: the shares of datasets and strata.
        lengths: token length of each row, int[n]; None plans nothing.
        refused: rows that may not be read.
        first_step: the first step that is drawn from this order; where it is not 1, another order came before.

    Raises:
        UserError: no sample is left.
    """

    def __init__(
        self,
        layout: Layout,
        batch_size: int,
        seed: int,
        mixing: MixingConfig,
        *,
        lengths: np.ndarray | None = None,
        refused: np.ndarray | None = None,
        first_step: int = 1,
    ):
        if lengths is not None and len(lengths) != layout.num_rows:
            raise ValueError(f"{len(lengths)} lengths for {layout.num_rows} samples")
        self.layout, self.batch_size, self.seed, self.lengths = layout, batch_size, seed, lengths
        self.mixing_config, self.first_step = mixing, first_step
        self.num_samples = layout.num_rows
        # As the posts are, a dataset is one group and each post comes once in an epoch of it.
        self.groups = layout.datasets if mixing.temperature == 1 else layout.strata
        self.mixing = Mixing(_phases(layout, mixing, batch_size, first_step), seed)
        self.shuffles = [
            WindowedShuffle(size, max(1, -(-size // max(1, shards))), seed, name)
            for name, size, shards in zip(
                self.groups.names, self.groups.sizes.tolist(), self.groups.shards, strict=True
            )
        ]
        self.redirects = Redirects.of(
            layout.strata, seed, np.asarray([] if refused is None else refused, dtype=np.int64)
        )
        wanted = MAX_WINDOW if lengths is None else batches_to_sort(lengths, batch_size)
        self.window_batches = min(wanted, max(MIN_WINDOW_BATCHES, self._shortest_epoch() // batch_size))
        # The window that was used last: as it is planned, and with its redirects.
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None
        self._resolved: tuple[int, np.ndarray] | None = None

    def positions(self, step: int) -> np.ndarray:
        """int64[B]: the positions of `step` ≥ 1, as the contract counts them."""
        return np.arange((step - 1) * self.batch_size, step * self.batch_size, dtype=np.int64)

    def rows(self, step: int) -> np.ndarray:
        """int64[B]: the rows of `step`, in the order of their positions.

        Raises:
            UserError: the step came before this order.
        """
        window, batch = self._window_of(step)
        if self._resolved is None or self._resolved[0] != window:
            self._resolved = window, self.redirects.resolve(self._window(window)[1])
        return self._resolved[1][batch]

    def planned_rows(self, step: int) -> np.ndarray:
        """int64[B]: like `rows`, before those that may not be read are replaced."""
        window, batch = self._window_of(step)
        return self._window(window)[1][batch]

    def _window_of(self, step: int) -> tuple[int, slice]:
        """The window of a step, and where the step stands in it."""
        if step < self.first_step:
            raise UserError(
                f"step {step}: drawn from another order; the one in force begins with step {self.first_step}"
                if step >= 1
                else f"step {step}: steps begin at 1"
            )
        window, batch = divmod(step - self.first_step, self.window_batches)
        return window, slice(batch * self.batch_size, (batch + 1) * self.batch_size)

    def steps_of(self, row: int, last_step: int) -> list[int]:
        """The steps up to `last_step` that `row` is planned for, itself and not in another one's place."""
        group, ordinal = (int(found[0]) for found in self.groups.find(np.array([row])))
        size, shuffle = int(self.groups.sizes[group]), self.shuffles[group]
        window_size = self.window_batches * self.batch_size
        # To the end of the window: its plan may move what is drawn later to an earlier step.
        windows = -(-max(0, last_step - self.first_step + 1) // self.window_batches)
        drawn = self.mixing.draws_before(group, windows * window_size)
        steps = []
        for epoch in range(-(-drawn // size)):
            draw = epoch * size + int(shuffle.inverse(epoch, np.array([ordinal]))[0])
            position = self.mixing.position(group, draw) if draw < drawn else None
            if position is not None:
                window, offset = divmod(position, window_size)
                place = int(np.flatnonzero(self._window(window)[0] == offset)[0])
                steps.append(self.first_step + window * self.window_batches + place // self.batch_size)
        return sorted(step for step in steps if step <= last_step)

    def refuse(self, rows: np.ndarray) -> None:
        """From now on, these rows are not read either. No other position moves."""
        self.redirects = self.redirects.with_refused(rows)
        self._resolved = None

    def epoch(self, step: int) -> float:
        """After `step`: samples delivered, in multiples of the split."""
        return step * self.batch_size / self.num_samples

    def state(self, manifest_hash: str, position: int) -> dict[str, Any]:
        """All that a resumed run needs to go on at `position`; JSON, under 1 KB."""
        return self._identity(manifest_hash) | {"first_step": self.first_step, "position": position}

    def go_on(self, saved: Mapping[str, Any], manifest_hash: str, refused: np.ndarray) -> None:
        """Go around the rows that a saved order went around, and make sure that this one continues it.

        Args:
            saved: its state.
            manifest_hash: of the shards as they are now.
            refused: int64[…], its refused rows.

        Raises:
            UserError: names everything that changed.
        """
        if saved.get("manifest") == manifest_hash:  # The rows of other shards are other samples.
            self.refuse(refused)
        mine = self._identity(manifest_hash)
        changed = [name for name in mine if saved.get(name) != mine[name]]
        if "manifest" in changed:
            changed = [name for name in changed if name != "refused"]
        if changed:
            details = "; ".join(f"{STATE_NAMES[name]}: {saved.get(name)} before, {mine[name]} now" for name in changed)
            raise UserError(
                f"the sample order is not that of the checkpoint: {details}; restore it, begin anew with "
                "train.restart=true, or keep the weights and start a new order from here with train.new_order=true"
            )

    def _identity(self, manifest_hash: str) -> dict[str, Any]:
        refused = self.redirects.refused
        return {
            "format": STATE_FORMAT,
            "manifest": manifest_hash,
            "seed": self.seed,
            "batch_size": self.batch_size,
            # With the quotas themselves, since they come from floating-point numbers.
            "mixing": _hash(repr([(phase.start, phase.quotas.tolist()) for phase in self.mixing.phases]).encode()),
            "lengths": self._lengths_hash,
            "refused": {"count": len(refused), "hash": _hash(refused.astype("<i8").data)},
        }

    @cached_property
    def _lengths_hash(self) -> str | None:
        return None if self.lengths is None else _hash(np.ascontiguousarray(self.lengths, dtype="<u4").data)

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a window: which of its samples, as they are drawn, comes there, and the row of it."""
        if self._planned is None or self._planned[0] != window:
            size = self.window_batches * self.batch_size
            start = window * size
            drawn = self._drawn_rows(start, start + size)
            plan = np.arange(size) if self.lengths is None else self._plan(drawn, start)
            self._planned = window, plan, drawn[plan]
        return self._planned[1], self._planned[2]

    def _plan(self, drawn: np.ndarray, start: int) -> np.ndarray:
        """Rearrange a window by length, in pieces."""
        assert self.lengths is not None
        lengths = self.lengths[drawn]
        cuts = [start, *self._cuts(start, start + len(drawn)), start + len(drawn)]
        return np.concatenate(
            [
                begin - start + plan_by_length(lengths[begin - start : end - start], self.batch_size, begin, self.seed)
                for begin, end in pairwise(cuts)
            ]
        )

    def _cuts(self, start: int, stop: int) -> list[int]:
        """The positions inside a window that no sample is moved across: where the weights change and, where there is
        one group, where its epochs end."""
        phases = [phase.start for phase in self.mixing.phases]
        size = int(self.groups.sizes[0]) if len(self.groups.names) == 1 else stop
        epochs = range((start // size + 1) * size, stop, size)
        return sorted({cut for cut in (*phases, *epochs) if start < cut < stop})

    def _drawn_rows(self, start: int, stop: int) -> np.ndarray:
        """int64: the rows at positions [start, stop) of this order, before planning and redirects."""
        groups, draws = self.mixing.draws(start, stop)
        rows = np.empty(stop - start, dtype=np.int64)
        # Sorted by group and epoch, the draws of each fall into few runs.
        by_group = np.lexsort((draws, groups))
        epochs = draws[by_group] // self.groups.sizes[groups[by_group]]
        changes = (np.diff(groups[by_group]) != 0) | (np.diff(epochs) != 0)
        for run in np.split(by_group, np.flatnonzero(changes) + 1):
            group = int(groups[run[0]])
            epoch, first = divmod(int(draws[run[0]]), int(self.groups.sizes[group]))
            places = draws[run] - (draws[run[0]] - first)
            rows[run] = self.groups.rows(group, self.shuffles[group](epoch, places))
        return rows

    def _shortest_epoch(self) -> int:
        """Positions in which the group that comes round most often does so once."""
        return min(
            int((self.groups.sizes * phase.quotas.sum() // np.maximum(phase.quotas, 1))[phase.quotas > 0].min())
            for phase in self.mixing.phases
        )


def _phases(layout: Layout, mixing: MixingConfig, batch_size: int, first_step: int) -> list[Phase]:
    """The quotas of every group from the first step and from each change of the weights on."""
    sizes = dict(zip(layout.datasets.names, layout.datasets.sizes.tolist(), strict=True))
    # Steps done when the weights change -> the weights; what changed before the first step is in force from there.
    weights = {0: mixing.weights or sizes}
    for change in mixing.changes:
        weights[max(0, change.after_step - (first_step - 1))] = change.weights
    return [
        Phase(steps * batch_size, cycle_quotas(group_shares(layout, mixing, weight)))
        for steps, weight in weights.items()
    ]


def group_shares(layout: Layout, mixing: MixingConfig, weight_of: Mapping[str, float]) -> np.ndarray:
    """float64[groups]: the share of each stratum in training; of each dataset where the temperature is 1.

    Args:
        layout: the training split.
        mixing: the temperature.
        weight_of: dataset -> its weight.
    """
    weights = np.array([weight_of[name] for name in layout.datasets.names], dtype=np.float64)
    weights /= weights.sum()
    if mixing.temperature == 1:
        return weights
    shares = np.zeros(len(layout.strata.names))
    for dataset, weight in enumerate(weights):
        own = layout.dataset_of_stratum == dataset
        shares[own] = weight * temperature_shares(layout.strata.sizes[own], mixing.temperature, mixing.max_repeats)
    return shares


def _hash(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
