"""From the columns of a table (or the fields of a foreign sample) to a post's fields, by name or by `data.columns`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean
from crossguard.data.records import FIELDS, FLAG_FIELDS, LIST_FIELDS, OBJECT_FIELDS, TEXT_FIELDS
from crossguard.data.taxonomy import Taxonomy

# Fields whose cells hold JSON when the table can only carry text.
_STRUCTURED = frozenset((*OBJECT_FIELDS, *LIST_FIELDS, "images"))


class Columns:
    """Which column each field of a post is read from.

    A field takes the column that `data.columns` names, else the column of its own name; `labels.hate`, `severity.hate`
    and `meta.anything` name one entry. Without `data.columns` a column that is no field is an error, since it may be
    a typo; with it, the columns that nothing names are not read.
    """

    def __init__(self, mapping: Mapping[str, str], taxonomy: Taxonomy):
        """
        Raises:
            UserError: a key of `data.columns` is no field of a post.
        """
        self._mapping = dict(mapping)
        policies = taxonomy.names
        self._fields = FIELDS | {f"{name}.{policy}" for name in ("labels", "severity") for policy in policies}
        for field in self._mapping:
            if not self._is_field(field):
                raise UserError(f"data.columns.{field}: no field of a post; {did_you_mean(field, self._fields)}")

    def targets(self, available: Iterable[str], place: str) -> dict[str, str]:
        """Field -> column for a table that has the columns `available`.

        Raises:
            UserError: a column is named that the table lacks, or the table has one that nothing names.
        """
        columns = list(available)
        for field, column in self._mapping.items():
            if column not in columns:
                hint = did_you_mean(column, columns)
                raise UserError(f"data.columns.{field}={column}: {place} has no such column; {hint}")
        unread = [column for column in columns if not self._is_field(column)]
        if unread and not self._mapping:
            raise UserError(
                f"{place}: column '{unread[0]}' is no field of a post; {did_you_mean(unread[0], self._fields)} "
                "(or name the columns to read in data.columns, as field: column)"
            )
        taken = set(self._mapping.values())
        by_name = {name: name for name in columns if self._is_field(name) and name not in taken}
        return {**by_name, **self._mapping}

    def read(self, row: Mapping[str, Any], targets: Mapping[str, str]) -> dict[str, Any]:
        """The raw record of a row; an empty cell is absent, an empty label unknown."""
        raw: dict[str, Any] = {}
        for field, column in targets.items():
            name, _, entry = field.partition(".")
            value = _convert(name, entry, row.get(column))
            if entry:
                entries = raw.setdefault(name, {})
                if value is not None and isinstance(entries, dict):
                    entries[entry] = value
            elif value is not None:
                raw[name] = {**value, **raw.get(name, {})} if isinstance(value, dict) else value
        return raw

    def _is_field(self, name: str) -> bool:
        return name in self._fields or (name.startswith("meta.") and len(name) > len("meta."))


def _convert(name: str, entry: str, value: Any) -> Any:
    """A cell as the field `name` (or its `entry`) takes it; what makes no sense is left for the record's own check."""
    value = _plain(value)
    if value is None:
        return None
    if name in TEXT_FIELDS and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and (name in ("labels", "severity", *FLAG_FIELDS) or (name in _STRUCTURED and not entry)):
        value = _from_text(value)
    if name in FLAG_FIELDS and value in (0, 1):
        return bool(value)
    return value


def _plain(value: Any) -> Any:
    """A cell without the types that only tables have."""
    if isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, float) and value != value:  # NaN is how tables write an empty number
        return None
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # an image of Hugging Face datasets
        return _file_bytes(value["path"]) if value["bytes"] is None else value["bytes"]
    return value


def _file_bytes(path: str | None) -> bytes | None:
    """A media file that the `datasets` library found itself; empty when it is gone, which the build refuses."""
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _from_text(value: str) -> Any:
    lowered = value.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    try:
        return json.loads(value)
    except ValueError:
        return value
