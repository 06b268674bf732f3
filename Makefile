# What people do with this repository. Each target sets up what it needs, as an ordinary user.
# VENV=DIR uses another virtual environment; ARGS="…" is handed on to demo, test*, sim* and bench*.
VENV ?= .venv
ARGS ?=
SEEDS ?= 300
SEED ?=
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ckptd-installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-long test-root sim sim-mutants lint types format bench bench-shards lock clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

$(READY): requirements.lock pyproject.toml scripts/setup-venv
	@scripts/setup-venv $(VENV)

demo: $(READY) ## the whole story in under a minute: store, kill, restore, compare
	@$(VENV)/bin/ckptd demo $(ARGS)

test: $(READY) ## every test that an ordinary user can run within ten minutes
	@$(PYTHON) -m pytest tests -m "not long and not root" -n 3 --dist loadfile $(ARGS)

test-long: $(READY) ## kill rounds, gigabytes, every fault point
	@$(PYTHON) -m pytest tests -m long $(ARGS)

test-root: $(READY) ## what needs root; fails without it
	@[ "$$(id -u)" -eq 0 ] || { echo "make test-root needs root: sudo make test-root" >&2; exit 1; }
	@$(PYTHON) -m pytest tests -m root $(ARGS)

sim: $(READY) ## clusters on virtual time under faults: SEEDS=300 of them, or SEED=n with its trace
	@$(PYTHON) -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS)) $(ARGS)

sim-mutants: $(READY) ## whether the simulation finds faults that are planted on purpose
	@$(PYTHON) -m tests.simulation --mutants --seeds $(SEEDS) $(ARGS)

lint: $(READY) ## ruff: rules and formatting
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: $(READY) ## mypy --strict
	@$(PYTHON) -m mypy

format: $(READY) ## let ruff correct what it can
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

bench: $(READY) ## store and restore 1 GiB against rsync (at most ten minutes)
	@$(PYTHON) -m bench.store_restore $(ARGS)

bench-shards: $(READY) ## speed by shard size, 256 KiB to 128 MiB
	@$(PYTHON) -m bench.shard_sizes $(ARGS)

lock: $(READY) ## write requirements.lock anew (ARGS=--upgrade for newer versions)
	@PYTHON=$(PYTHON) scripts/lock $(ARGS)

clean: ## remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
