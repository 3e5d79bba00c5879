"""Posts in a Hugging Face dataset: an id on the hub, a folder written by `save_to_disk`, or a folder of data files.

`data.options`: `name` (configuration of the dataset), `revision`, and `split`: one of the dataset's splits, or which of
its splits to read and what to call them, e.g. {train: train, validation: test}. By default all keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.schema.data import DataConfig
from crossguard.configs.suggest import did_you_mean
from crossguard.data.sources.base import Record, check_settings, fingerprint_records
from crossguard.data.sources.columns import Columns
from crossguard.data.taxonomy import Taxonomy


class HuggingFaceSource:
    """Reads a dataset through the `datasets` library; media are taken as they are stored, undecoded."""

    def __init__(self, config: DataConfig, taxonomy: Taxonomy, seed: int):
        """
        Raises:
            UserError: the dataset cannot be loaded, or lacks a split or column that is named.
        """
        check_settings(config, options=("name", "revision", "split"), keys=("columns", "media_dir"))
        if not config.path:
            raise UserError("data.path: not set; write data.path=DATASET_ID or the folder of a dataset")
        self.columns = Columns(config.columns, taxonomy)
        self.splits = _chosen(_load(config), config.options.get("split"))
        # A dataset of one part has no splits of its own: its posts are assigned by hash, like any others.
        self.has_splits = len(self.splits) > 1 or "split" in config.options
        folder = Path(config.path)
        self.media_root = Path(config.media_dir) if config.media_dir else folder if folder.is_dir() else None

    def records(self) -> Iterator[Record]:
        """Every row; one without an id is called `<split>-<row>`, since a dataset's rows keep their numbers."""
        for name, (split, dataset) in self.splits.items():
            targets = self.columns.targets(dataset.column_names, f"split '{name}'")
            for number, row in enumerate(dataset):
                raw = self.columns.read(row, targets)
                if "id" not in targets:
                    raw["id"] = f"{name}-{number}"
                if self.has_splits:
                    raw.setdefault("split", split)
                yield Record(f"{name}:{number}", raw, None, self.media_root)

    def fingerprint(self) -> str:
        """Hash of the mapped rows."""
        return fingerprint_records(self.records())


def _load(config: DataConfig) -> dict[str, Any]:
    """The dataset's splits by name, with images and audio as the bytes that are stored."""
    import datasets

    path = Path(str(config.path))
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            options = {key: config.options[key] for key in ("name", "revision") if key in config.options}
            loaded = datasets.load_dataset(str(path), **options)
    except Exception as error:  # the library raises errors of many types
        first_line = str(error).strip().splitlines()[:1]
        raise UserError(f"data.path={config.path}: cannot be loaded ({''.join(first_line)})") from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    return {str(name): _undecoded(dataset) for name, dataset in splits.items()}


def _undecoded(dataset: Any) -> Any:
    import datasets

    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image | datasets.Audio | datasets.Video):
            stored = type(inner)(decode=False)
            dataset = dataset.cast_column(column, stored if inner is feature else datasets.List(stored))
    return dataset


def _chosen(splits: dict[str, Any], wanted: Any) -> dict[str, tuple[str, Any]]:
    """Dataset split -> (the posts' split, rows)."""
    if wanted is None:
        names = {name: name for name in splits}
    elif isinstance(wanted, str):
        names = {wanted: wanted}
    elif isinstance(wanted, Mapping):
        names = {str(name): str(split) for name, split in wanted.items()}
    else:
        raise UserError("data.options.split: must be a split of the dataset, or a mapping of its splits to the posts'")
    for name in names:
        if name not in splits:
            raise UserError(f"data.options.split: the dataset has no split '{name}'; {did_you_mean(name, splits)}")
    return {name: (split, splits[name]) for name, split in names.items()}
