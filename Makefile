# Every target makes its own environment first. `make check` is the whole gate.
.DEFAULT_GOAL := help
.PHONY: help env demo serve test torture lint check format bench bench-full learn clean

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Two test processes, each with whole files: tests of one file share servers, and runs that took long to make.
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile

# uv does not read pip's setting of a directory with wheels.
UV_ENV := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)")

help:  ## What there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

env: $(VENV)/installed  ## The environment, in .venv

$(VENV)/installed: pyproject.toml constraints.txt examples/randomwalks/pyproject.toml examples/stories/pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || \
		{ echo 'Proxima needs Python 3.11 or newer with its venv module (Debian: apt install python3-venv).'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	DS_BUILD_OPS=0 $(UV_ENV) $(BIN)/uv pip install --quiet --python $(BIN)/python \
		--constraint constraints.txt --editable '.[dev]' \
		--editable examples/randomwalks --editable examples/stories
	@touch $@

demo: env  ## PPO as a customer sees it, over HTTP only, in three minutes
	$(BIN)/python -m randomwalks

serve: env  ## API, worker, and broker on this machine, until Ctrl-C
	$(BIN)/python -m service.embedded

test: env  ## The suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# One seed once more: make torture TORTURE_RUNS=1 TORTURE_SEED=57
TORTURE_RUNS ?= 200
TORTURE_SEED ?= 1

torture: env  ## Kill hundreds of runs anywhere; each must end with the same bytes
	$(BIN)/python -m tests.engine.torture --runs $(TORTURE_RUNS) --seed $(TORTURE_SEED)

lint: env  ## Format, lint, import contracts, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

check: lint test  ## All of it

format: env  ## Put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env  ## Side by side with TRL 1.12, and the service under load
	$(BIN)/python -m benchmarks

bench-full: env  ## The whole grid beside TRL 1.12, batches of 128 too; hours
	$(BIN)/python -m benchmarks grid

learn: env  ## Reward curves over seeds: the figures and pictures of docs/learning.md; about an hour
	$(BIN)/python -m benchmarks.learning $(LEARN_ARGS)

clean:  ## Remove the environment
	rm -rf $(VENV)
