"""Sources: one file for each kind of input that posts come from."""

from __future__ import annotations

import importlib

from crossguard.configs.errors import UserError
from crossguard.configs.own_parts import load_own, naming
from crossguard.configs.schema.data import DataConfig
from crossguard.data.sources.base import Record, Source
from crossguard.data.taxonomy import Taxonomy

_BUILT_IN = {
    "jsonl": "JsonLinesSource",
    "table": "TableSource",
    "hf": "HuggingFaceSource",
    "webdataset": "WebDatasetSource",
    "synthetic": "SyntheticSource",
}


def open_source(config: DataConfig, taxonomy: Taxonomy, seed: int) -> Source:
    """The source that `data.source` names: a built-in one, or the user's own as `module:Class`.

    Raises:
        UserError: it does not exist, or its settings are wrong.
    """
    if config.source in _BUILT_IN:
        module = importlib.import_module(f"crossguard.data.sources.{config.source}")
        source = getattr(module, _BUILT_IN[config.source])
    else:
        source = naming(load_own(config.source, "data.source"), f"data.source={config.source}")
    opened: Source = source(config, taxonomy, seed)
    return opened


def fingerprint_of(source: Source, config: DataConfig) -> str:
    """Changes with the posts.

    Raises:
        UserError: a file of them cannot be read.
    """
    try:
        return source.fingerprint()
    except OSError as error:
        raise UserError(f"data.path: {error.filename or config.path} cannot be read ({error.strerror})") from error


__all__ = ["Record", "Source", "fingerprint_of", "open_source"]
