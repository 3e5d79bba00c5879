"""Parts of the user's own: a source, an encoder, a loss or a metric named `module:name` in the recipe."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from crossguard.configs.errors import UserError
from crossguard.configs.suggest import did_you_mean


def find_own(spec: str, key: str) -> None:
    """Check, without importing it, that the module of `module:name` can be found.

    Raises:
        UserError: the module is on no import path.
    """
    module_name, _, name = spec.partition(":")
    _see_working_directory()
    try:
        found = bool(module_name and name) and importlib.util.find_spec(module_name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UserError(f"{key}={spec}: no module '{module_name}' is importable from here; write module:name")


def load_own(spec: str, key: str) -> Any:
    """Import what `module:name` names; `key` is the configuration key for the error message.

    Raises:
        UserError: the module or the name in it does not exist.
    """
    find_own(spec, key)
    module_name, _, name = spec.partition(":")
    module = importlib.import_module(module_name)
    if not hasattr(module, name):
        public = [attribute for attribute in vars(module) if not attribute.startswith("_")]
        raise UserError(f"{key}={spec}: module '{module_name}' has no '{name}'; {did_you_mean(name, public)}")
    return getattr(module, name)


def _see_working_directory() -> None:
    """A module beside the recipe is importable, as with `python -m`, also from the installed command."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
