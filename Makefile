# The two commands: `make demo` (from nothing to a trained model and a report) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test lint constraints clean

setup: $(VENV)/.ready

# DeepSpeed builds the operator that its ranks talk through on CPU when it is first used: that minute belongs here.
PREBUILD := from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()

# torch first: another package's looser range would pull a build of several GB.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossguard needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -c '$(PREBUILD)' >/dev/null
	touch $@

demo: setup
	$(BIN)/crossguard run recipe=quickstart

test: setup lint
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p crossguard.configs -p crossguard.data -p crossguard.train -p crossguard.launchers -p crossguard.recipes

# Exact versions of everything, from the ranges in pyproject.toml; run it to move to newer ones.
constraints:
	$(PYTHON) -m venv $(VENV).new
	$(VENV).new/bin/pip install --quiet 'torch==2.13.0'
	$(VENV).new/bin/pip install --quiet --editable '.[dev,ray]'
	$(VENV).new/bin/pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt
	rm -rf $(VENV).new

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
