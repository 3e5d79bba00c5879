# The two commands: `make demo` (from nothing to a trained model and a report) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-launchers test-browser test-nvme unit unit-waiting soak lint bench constraints clean

setup: $(VENV)/.ready

# torch first: another package's looser range would pull a build of several GB. What pip would compile file by file is
# compiled on all cores; packages hold files for other Pythons, which cannot be.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossguard needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "setting up $(VENV): about a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: setup
	$(BIN)/crossguard run recipe=quickstart

# Tests that mostly wait, for processes that start, hang or are killed.
WAITING := $(addprefix tests/test_,build_kills.py finetuning.py guards.py kubernetes.py launchers.py launching.py \
	nodes.py preemption.py restarts.py resume.py slurm.py soak.py)

# Side by side: types are checked, and some tests run, while others wait.
test: setup
	$(MAKE) --no-print-directory --jobs 3 lint unit unit-waiting

unit: setup
	$(BIN)/pytest $(WAITING:%=--ignore=%)

unit-waiting: setup
	$(BIN)/pytest $(WAITING)

# Training that is killed and stopped at random moments, and resumed a thousand times; twenty minutes or more.
soak: setup
	PYTHONPATH=tests $(BIN)/python -m soak

# What `make test` tries of the launchers briefly, in full; as root, since it starts SLURM and network namespaces.
test-launchers: setup
	$(BIN)/pytest -m 'launchers or slurm' tests/test_launchers.py tests/test_slurm.py

# The report in a real browser, which is installed where it is missing (Debian, as root).
test-browser: setup
	PYTHONPATH=tests $(BIN)/python -c 'from packages import installed; installed({"chromium": "chromium"})'
	$(BIN)/pytest tests/test_report_in_browser.py

# Optimizer states on NVMe, for which DeepSpeed builds an operator at first (needs g++ and Debian's libaio-dev).
test-nvme: setup
	$(BIN)/pytest -m nvme tests/test_nvme.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p crossguard.configs -p crossguard.data -p crossguard.train -p crossguard.launchers -p crossguard.recipes

# Ratios to other loaders and loops; their packages go into a folder of their own, where nothing else sees them.
bench: $(VENV)/bench/.ready
	PYTHONPATH=$(VENV)/bench OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks

$(VENV)/bench/.ready: $(VENV)/.ready tests/benchmarks/requirements.txt
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) --requirement tests/benchmarks/requirements.txt
	touch $@

# Exact versions of everything, from the ranges in pyproject.toml; run it to move to newer ones.
constraints:
	$(PYTHON) -m venv $(VENV).new
	$(VENV).new/bin/pip install --quiet 'torch==2.13.0'
	$(VENV).new/bin/pip install --quiet --editable '.[dev,ray]'
	$(VENV).new/bin/pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt
	rm -rf $(VENV).new

clean:
	rm -rf $(VENV) .benchmarks runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
