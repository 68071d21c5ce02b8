# `make train` and `make test` work as the first command on a fresh clone: they make .venv, install, and do the job.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
WORKERS ?= 2

.PHONY: help train test test-gpu lint format clean

help:  ## Show the commands.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

train: $(STAMP)  ## Distil the default student (ARGS="mixer=clear window=16" overrides the configuration).
	$(BIN)/python train.py $(ARGS)

test: $(STAMP)  ## Run the tests, in two processes (ARGS="tests/export -x" narrows them, WORKERS=0 runs them in one).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --durations=15 $(ARGS)

test-gpu: $(STAMP)  ## Run the tests that need a GPU.
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(STAMP)  ## Check style (ruff) and types (mypy).
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches; runs and data stay.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# The stamp is written last, so an interrupted installation is taken up again by the next command.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
			if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$${python:-}" ]; then \
			echo "linearize needs Python 3.11 or newer with its venv module, and none of python3, python3.11 ... python3.14 is that: install one (Debian: apt install python3 python3-venv) and run make again." >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$($$python --version)"; \
		$$python -m venv $(VENV); \
	fi
	@echo "Installing linearize and what it needs into $(VENV) (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	@touch $@
