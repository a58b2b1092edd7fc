# Every target sets up what is missing, then runs. Python 3.11 or newer; no GPU, no Docker needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all check

install: $(STAMP)

# torch first and alone: with an open range pip takes a build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'torch~=2.13.0'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/align3gr demo

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# One thread each: the models of the tests are small, and workers that share cores only get in each other's way.
test test-all: export OMP_NUM_THREADS ?= 1

test: check
	$(BIN)/pytest -m "not slow" --numprocesses 3 --dist loadfile

test-all: check
	$(BIN)/pytest
