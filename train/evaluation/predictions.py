"""What a model said about a split: one row a post, kept as `predictions/<split>.parquet`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossguard.configs.errors import UserError
from crossguard.data.shards.files import write_atomic
from crossguard.train.evaluation.slices import NONE

SCORE, LABEL, SLICE, SEVERITY, SEVERITY_LABEL = "score.", "label.", "slice.", "severity.", "severity_label."


@dataclass(frozen=True)
class Predictions:
    """Scores beside labels, rows in the order of the ids."""

    policies: tuple[str, ...]
    ids: list[str]
    languages: list[str]
    # float64 [posts, policies], in [0, 1].
    scores: np.ndarray
    # float32 [posts, policies], in [0, 1]; NaN where nobody gave a label.
    labels: np.ndarray
    # Fields of the posts that slices are made of: name -> object[posts].
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    # Policies with a severity -> float64[posts, 2]: the level to be expected, and the one given; NaN where nobody did.
    severity: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def gather(cls, policies: Sequence[str], parts: Iterable[Predictions]) -> Predictions:
        """Join the ranks' parts: each id once, sorted by id, whatever the parts were."""
        parts = list(parts)
        width = len(policies)
        ids = np.array([post for part in parts for post in part.ids], dtype=object)
        languages = np.array([language for part in parts for language in part.languages], dtype=object)
        scores = np.concatenate([np.zeros((0, width)), *(part.scores for part in parts)])
        labels = np.concatenate([np.zeros((0, width), np.float32), *(part.labels for part in parts)])
        levels = {policy: np.concatenate([part.severity[policy] for part in parts]) for policy in _severities(parts)}
        _, rows = np.unique(ids, return_index=True)
        severity = {policy: values[rows] for policy, values in levels.items()}
        return cls(
            tuple(policies), list(ids[rows]), list(languages[rows]), scores[rows], labels[rows], severity=severity
        )

    def take(self, rows: Sequence[int]) -> Predictions:
        """Some of the posts, in this order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return Predictions(
            self.policies,
            [self.ids[row] for row in chosen],
            [self.languages[row] for row in chosen],
            self.scores[chosen],
            self.labels[chosen],
            {name: values[chosen] for name, values in self.fields.items()},
            {policy: values[chosen] for policy, values in self.severity.items()},
        )

    def with_fields(self, fields: Mapping[str, Mapping[str, str]]) -> Predictions:
        """The same with fields of the posts, given as id -> name -> value."""
        names = list(next(iter(fields.values()), {}))
        of_posts = [fields.get(post, {}) for post in self.ids]
        columns = {name: np.array([one.get(name, NONE) for one in of_posts], dtype=object) for name in names}
        return replace(self, fields=columns)

    def write(self, path: Path, further: Mapping[str, pa.Array] | None = None) -> None:
        """Write the rows to `path`, with `further` columns: complete or not at all."""
        columns: dict[str, pa.Array] = {
            "id": pa.array(self.ids, pa.string()),
            "language": pa.array(self.languages, pa.string()),
        }
        for column, policy in enumerate(self.policies):
            columns[SCORE + policy] = pa.array(self.scores[:, column], pa.float64())
        for column, policy in enumerate(self.policies):
            columns[LABEL + policy] = pa.array(self.labels[:, column], pa.float32(), from_pandas=True)
        for policy, values in self.severity.items():
            columns[SEVERITY + policy] = pa.array(values[:, 0], pa.float64())
            columns[SEVERITY_LABEL + policy] = pa.array(values[:, 1], pa.float64(), from_pandas=True)
        for name, values in self.fields.items():
            columns[SLICE + name] = pa.array(list(values), pa.string())
        columns |= further or {}
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), buffer)
        write_atomic(path, buffer.getvalue().to_pybytes())

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """Read what `write` wrote.

        Raises:
            UserError: the file is missing or is no table of predictions.
        """
        try:
            table = pq.read_table(path)
            policies = tuple(name.removeprefix(SCORE) for name in table.column_names if name.startswith(SCORE))
            scores = [table[SCORE + policy].to_numpy() for policy in policies]
            labels = [table[LABEL + policy].to_numpy(zero_copy_only=False) for policy in policies]
            ids, languages = table["id"].to_pylist(), table["language"].to_pylist()
            severity = {
                policy: np.stack([_floats(table[SEVERITY + policy]), _floats(table[SEVERITY_LABEL + policy])], axis=1)
                for name in table.column_names
                if (policy := name.removeprefix(SEVERITY)) != name
            }
            fields = {
                name.removeprefix(SLICE): np.array(table[name].to_pylist(), dtype=object)
                for name in table.column_names
                if name.startswith(SLICE)
            }
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise UserError(f"{path}: no readable predictions; run `crossguard evaluate` again") from error
        shape = (len(ids), len(policies))
        return cls(
            policies,
            ids,
            languages,
            np.array(scores, dtype=np.float64).T.reshape(shape),
            np.array(labels, dtype=np.float32).T.reshape(shape),
            fields,
            severity,
        )


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64[posts]; NaN where there is nothing."""
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


def _severities(parts: list[Predictions]) -> list[str]:
    return list(parts[0].severity) if parts else []
