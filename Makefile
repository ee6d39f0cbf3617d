# Needs git, make and python3 (3.10 to 3.13). Every target first installs what it needs into .venv; nothing to activate.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/deepcluster_digits.yaml
BENCHMARKS ?= modes kmeans kmeans_memory kmeans_pool sinkhorn guarantees scale
# The name of the stamp holds a checksum of pyproject.toml, so that other dependencies are installed again.
STAMP := $(VENV)/installed-$(word 1,$(shell cksum < pyproject.toml))

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## install everything into .venv (the other targets do so first)

$(STAMP):
	@python3 -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or \
	    sys.exit("raycluster needs Python 3.10 to 3.13, but python3 is " + sys.version.split()[0])'
	@$(BIN)/python -c 'import pip' 2> /dev/null || { echo "making $(VENV)"; python3 -m venv $(VENV); }
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet uv
	UV_COMPILE_BYTECODE=1 UV_COMPILE_BYTECODE_TIMEOUT=600 $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	@rm -f $(VENV)/installed-* && touch $@

.PHONY: pretrain
pretrain: $(STAMP) ## pre-train on CONFIG (default: handwritten digits, minutes on a laptop); ARGS="training.epochs=5"
	$(BIN)/python jobs/pretrain.py $(CONFIG) $(ARGS)

.PHONY: test
test: $(STAMP) ## run the tests, without the slow ones; ARGS="-k kmeans" selects some
	$(BIN)/python -m pytest -m "not slow" --durations=25 $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## run the slow tests: large networks, gigabytes of memory
	$(BIN)/python -m pytest -m slow --durations=15 $(ARGS)

.PHONY: test-fast
test-fast: $(STAMP) ## run the tests that need no Ray cluster
	$(BIN)/python -m pytest -m "not ray and not slow" $(ARGS)

.PHONY: test-ray
test-ray: $(STAMP) ## run the tests on a Ray cluster: failures, growth, elasticity
	$(BIN)/python -m pytest -m "ray and not slow" --durations=15 $(ARGS)

.PHONY: lint
lint: $(STAMP) ## check style and types
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

.PHONY: format
format: $(STAMP) ## format the code and fix what ruff can fix
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

.PHONY: benchmark
benchmark: $(STAMP) ## measure against other libraries; others: BENCHMARKS=ingest ARGS="photos=URI"
	for name in $(BENCHMARKS); do $(BIN)/python jobs/benchmark.py $$name $(ARGS); done

.PHONY: clean
clean: ## remove the environment and caches, never runs or data
	rm -rf $(VENV) build raycluster.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find raycluster jobs tests -name __pycache__ -prune -exec rm -rf {} +
