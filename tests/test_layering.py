"""The floors of the house: who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "configs": set(),
    "launchers": {"configs"},
    "data": {"configs"},
    "train": {"data", "configs"},
    "recipes": {"train", "data", "launchers", "configs"},
}
FILES = [file for floor in MAY_IMPORT for file in sorted((ROOT / floor).rglob("*.py"))]
# What `configs` must never need, so that a wrong configuration is answered at once.
HEAVY = {"torch", "transformers", "deepspeed", "datasets", "numpy", "pyarrow", "webdataset", "sklearn", "matplotlib"}


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "crossguard" else {module}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_floor_imports_only_the_floors_below(file: Path) -> None:
    floor = file.relative_to(ROOT).parts[0]
    imported = {name.split(".")[1] for name in _imports(file) if name.startswith("crossguard.")}
    assert imported - MAY_IMPORT[floor] - {floor} == set()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.py")), ids=lambda file: file.name)
def test_configs_imports_nothing_heavy(file: Path) -> None:
    assert {name.split(".")[0] for name in _imports(file)} & HEAVY == set()


def test_files_stay_short_enough_to_read() -> None:
    files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    long = {str(file.relative_to(ROOT)): count for file in files if (count := len(file.read_text().splitlines())) > 400}
    assert long == {}


def test_functions_stay_short_enough_to_read() -> None:
    long = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 50:
                    long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert long == []


def test_every_module_says_what_it_is() -> None:
    silent = [file for file in FILES if file.stat().st_size and not ast.get_docstring(ast.parse(file.read_text()))]
    assert silent == []
