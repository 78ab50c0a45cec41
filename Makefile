# make bench | make test | make check: each sets up the project's own environment (.venv) first, and quickly when it is there.
# make setup PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The environment is rebuilt when one of these changes.
INPUTS := pyproject.toml setup.py constraints.txt
NATIVE_STAMP := $(VENV)/.native
NATIVE_INPUTS := CMakeLists.txt $(wildcard kernels/csrc/*) kernels/cast_kernels/dali_plugin.py
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup bench test lint check native clean

setup: $(STAMP) $(NATIVE_STAMP)

$(STAMP): $(INPUTS)
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: $(PYTHON) not found: install Python 3.10 to 3.13, or name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "make: $$($(PYTHON) --version) found, expected Python 3.10 to 3.13: name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make: installing into $(VENV) (about 3 GB of downloads the first time)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda13,dev]'
	@touch $(STAMP)

# Without a compiler this says why, and the loader takes the NumPy rule. CAST_FAST_CUDA=on|off|auto chooses the backends.
$(NATIVE_STAMP): $(STAMP) $(NATIVE_INPUTS)
	@$(BIN)/python kernels/cast_kernels/dali_plugin.py build --optional
	@touch $(NATIVE_STAMP)

bench: setup
	$(BIN)/python benchmarks/throughput.py

test: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --quiet --durations 15

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

clean:
	rm -rf build dist bench_out *.egg-info .pytest_cache .ruff_cache
