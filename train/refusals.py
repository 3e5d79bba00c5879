"""Samples that turn out to be unusable while training: named at once, counted together, agreed on at checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crossguard.configs.errors import JobError
from crossguard.data.curation.governance import RULES
from crossguard.train.inputs import Inputs, missing_samples
from crossguard.train.metrics_log import LineLog
from crossguard.train.ranks import Ranks

# Fewer damaged samples than these never stop a run: a share of few samples says little.
TOLERATED = 20


class Refusals:
    """Takes the samples that could not be used, of training and of the evaluations in it.

    Args:
        run_dir: whose quarantine.jsonl names them.
        inputs: whose order goes around them from the next checkpoint on.
        max_refused: share of the samples read that may be damaged.
        ranks: all of them.
    """

    def __init__(self, run_dir: Path, inputs: Inputs, max_refused: float, ranks: Ranks):
        self._log = LineLog(run_dir / "quarantine.jsonl")
        self._inputs, self._max_refused, self._ranks = inputs, max_refused, ranks
        # (row, step) of this rank, since the last checkpoint.
        self._found: list[tuple[int, int]] = []
        self._new_damaged = 0
        self._steps, self._damaged, self._missing = 0, 0, 0

    def open(self, step: int) -> None:
        """Name the samples of missing shards, before `step`; all ranks call it.

        Raises:
            UserError: they are too many.
        """
        missing = self._ranks.on_first(lambda: missing_samples(self._inputs, self._max_refused, step))
        self._missing = len(missing)
        if self._ranks.is_first:
            for record in missing:
                self._log.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Name a sample and why it was not used."""
        self._log.write(record)
        if record["stage"] == "train" and "row" in record:
            self._found.append((record["row"], record["step"]))
            self._new_damaged += record["reason"] not in RULES

    def take(self) -> int:
        """How many of this rank's samples were damaged since the last call."""
        taken, self._new_damaged = self._new_damaged, 0
        return taken

    def check(self, damaged: int) -> None:
        """Before a step among whose samples the ranks together met so many damaged ones.

        Raises:
            JobError: on every rank, when their share is too large.
        """
        self._steps += 1
        self._damaged += damaged
        read = self._steps * self._inputs.order.batch_size
        if self._damaged > max(TOLERATED, self._max_refused * read):
            raise JobError(
                f"train: {self._damaged} of {read} samples read are damaged, more than "
                f"train.max_refused={self._max_refused}; quarantine.jsonl names them; restore the shards "
                "(`crossguard shards verify` finds what is damaged), or raise it"
            )

    def agree(self) -> None:
        """At a checkpoint: from here on, all ranks go around what any of them has found."""
        found = [pair for pairs in self._ranks.gather(self._found) for pair in pairs]
        self._found = []
        refused = self._inputs.refused
        for step in sorted({step for _, step in found}):
            refused = refused.add(np.array([row for row, since in found if since == step], dtype=np.int64), step)
        if found:
            self._inputs.refuse(refused)

    def close(self) -> None:
        """Say how many there were."""
        self._log.close()
        if self._damaged or self._missing:
            self._ranks.say(
                f"train: warning: {self._damaged} damaged samples were met and {self._missing} are missing with their "
                "shards; others took their places, quarantine.jsonl names them"
            )
