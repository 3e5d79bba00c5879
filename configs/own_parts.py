"""Parts of the user's own: a source, an encoder, a loss or a metric named `module:name` in the recipe."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from crossguard.configs.errors import CrossguardError, UserError, is_out_of_memory
from crossguard.configs.suggest import did_you_mean

T = TypeVar("T")
# Of torch, which is not imported here.
DEVICE_ERROR = "AcceleratorError"


def find_own(spec: str, key: str) -> None:
    """Check, without importing it, that the module of `module:name` can be found and has the name.

    Raises:
        UserError: the module is on no import path, or its source shows that it has no such name.
    """
    module_name, _, name = spec.partition(":")
    _see_working_directory()
    try:
        found = importlib.util.find_spec(module_name) if module_name and name else None
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(f"{key}={spec}: no module '{module_name}' is importable from here; write module:name")
    names = _names_in(Path(found.origin)) if found.origin and found.origin.endswith(".py") else None
    if names is not None and name not in names:
        raise _no_such_name(spec, key, names)


def load_own(spec: str, key: str) -> Any:
    """Import what `module:name` names; `key` is the configuration key for the error message.

    Raises:
        UserError: the module or the name in it does not exist.
    """
    find_own(spec, key)
    module_name, _, name = spec.partition(":")
    module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise _no_such_name(spec, key, vars(module))
    return getattr(module, name)


def naming(part: Callable[..., T], setting: str) -> Callable[..., T]:
    """A part of the user's own, whose errors name the setting that brought it in.

    What the machine lacks is no error of the part: memory, a disk, a device stay what they are.
    """

    def call(*arguments: Any) -> T:
        try:
            return part(*arguments)
        except (CrossguardError, OSError):
            raise
        except Exception as error:
            if type(error).__name__ == DEVICE_ERROR or is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            # Below this frame lies the user's; there is none where the arguments do not fit.
            frames = traceback.extract_tb(error.__traceback__)[1:2]
            place = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            raise UserError(f"{setting}: raised {type(error).__name__}{place} ({reason})") from error

    return call


def _names_in(source: Path) -> set[str] | None:
    """Every name that a module's source gives to anything; None where only running it shows."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError) as error:
        raise UserError(f"{source}: cannot be imported ({error})") from None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return None if names & {"*", "__getattr__", "globals"} else names


def _no_such_name(spec: str, key: str, names: Iterable[str]) -> UserError:
    module_name, _, name = spec.partition(":")
    public = [known for known in names if not known.startswith("_")]
    return UserError(f"{key}={spec}: module '{module_name}' has no '{name}'; {did_you_mean(name, public)}")


def _see_working_directory() -> None:
    """A module beside the recipe is importable, as with `python -m`, also from the installed command."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
