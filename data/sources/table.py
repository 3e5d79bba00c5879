"""Posts as rows of CSV, TSV or Parquet files; media paths start from `data.media_dir`, else from the table's folder."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import DataConfig
from crossguard.data.sources.base import Record, check_settings, files_of, fingerprint_records
from crossguard.data.sources.columns import Columns
from crossguard.data.taxonomy import Taxonomy

_SUFFIXES = (".csv", ".tsv", ".parquet")
_ROWS_IN_MEMORY = 1024


class TableSource:
    """Reads tables; columns are named like fields (`labels.hate`) or mapped by `data.columns`."""

    def __init__(self, config: DataConfig, taxonomy: Taxonomy, seed: int):
        """
        Raises:
            UserError: no such file or folder, or a mapping of what is no field.
        """
        check_settings(config, keys=("columns", "media_dir"))
        self.columns = Columns(config.columns, taxonomy)
        self.files = files_of(config, _SUFFIXES)
        self.media_dir = Path(config.media_dir) if config.media_dir else None
        if self.media_dir and not self.media_dir.is_dir():
            raise UserError(f"data.media_dir={config.media_dir}: no such folder")

    def records(self) -> Iterator[Record]:
        """Every row. The place of a row is its line in a CSV file and its number, from 1, in a Parquet file."""
        for path in self.files:
            root = self.media_dir or path.parent
            rows = self._parquet(path) if path.suffix.lower() == ".parquet" else self._csv(path)
            for number, raw, error in rows:
                yield Record(f"{path.name}:{number}", raw, error, root)

    def fingerprint(self) -> str:
        """Hash of the mapped rows, and a stamp of each media file that they name."""
        return fingerprint_records(self.records())

    def _csv(self, path: Path) -> Iterator[tuple[int, dict[str, Any] | None, str | None]]:
        csv.field_size_limit(sys.maxsize)  # a post may be longer than the 128 KiB that the module allows
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        # What is not UTF-8 arrives as surrogates, which the check of a field refuses with its line.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(rows, [])
            if len(set(header)) != len(header):
                raise UserError(f"{path.name}: two columns have the same name")
            targets = self.columns.targets(header, path.name)
            while True:
                number = rows.line_num + 1
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    yield number, None, f"line: not valid CSV ({error})"
                    return
                if row is None:
                    return
                if row and len(row) != len(header):
                    yield number, None, f"line: {len(row)} cells, the header has {len(header)}"
                elif row:
                    yield number, self.columns.read(dict(zip(header, row, strict=True)), targets), None

    def _parquet(self, path: Path) -> Iterator[tuple[int, dict[str, Any], None]]:
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{path.name}: not a readable Parquet file ({type(error).__name__})") from error
        with file:
            targets = self.columns.targets(file.schema_arrow.names, path.name)
            number = 0
            for batch in file.iter_batches(_ROWS_IN_MEMORY, columns=list(set(targets.values()))):
                for row in batch.to_pylist():
                    number += 1
                    yield number, self.columns.read(row, targets), None
