# The commands that people and CI both use; `make` alone lists them. Each installs what it needs first.
# Pass arguments on with ARGS: make test ARGS="tests/unit -k decide"
# A change is ready when `make check test` passes and CHANGELOG.md says what users will notice.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
BIN := .venv/bin
SCRIPTS := config/setup config/install-service config/install-apptainer config/check-words .ci/run
LOCK := $(BIN)/uv pip compile --quiet --system-certs --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.PHONY: help
help:  ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo
	@echo '  ARGS="..." is passed on by demo, test and bench: make test ARGS="tests/unit -k decide"'
	@echo '  A change is ready when `make check test` passes and CHANGELOG.md says what users will notice.'

.PHONY: setup
setup:  ## Install what is missing to run: .venv from requirements.lock, Apptainer
	@config/setup

.PHONY: setup-dev
setup-dev:  ## The same, and what check and test need
	@config/setup --dev

.PHONY: demo
demo: setup  ## Do the main job here, with a stand-in for Ovation: no configuration, no account
	@$(BIN)/ovation-agent demo $(ARGS)

# All of them in a process a core, whole files each: modules share agents and clusters. CI (CI=true) takes twice the time
# and one process, where no test has another's load beside it.
.PHONY: test
test: setup-dev  ## Run all tests, on the real parts
	@$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),$(if $(CI),,--numprocesses=auto --maxprocesses=4 --dist=loadfile))

.PHONY: chaos
chaos: setup-dev  ## Kill agents at every moment, and more than 500 times; check after each round what is promised
	@CHAOS=long $(BIN)/python -m pytest tests/chaos tests/simulation $(ARGS)

.PHONY: bench
bench: setup-dev  ## Measure webhooks coming in, walks, transfers beside s5cmd and others, jobs; an hour. QUICK=1: some minutes
	@$(BIN)/python -m tests.bench.ingress $(if $(QUICK),--rounds 2 --seconds 1 --steady-seconds 10) $(ARGS)
	@$(BIN)/python -m tests.bench.storm $(if $(QUICK),--activities 100 --deliveries 5000)
	@$(BIN)/python -m tests.bench.reconcile $(if $(QUICK),--activities 1000)
	@$(BIN)/python -m tests.bench.transfers $(if $(QUICK),--quick --rounds 1)
	@$(BIN)/python -m tests.bench.warm_cache
	@$(BIN)/python -m tests.bench.job_table $(if $(QUICK),--quick)
	@$(BIN)/python -m tests.bench.overhead $(if $(QUICK),--quick)
	@$(BIN)/python -m tests.bench.idle $(if $(QUICK),--seconds 10 --rounds 3)
	@$(BIN)/python -m tests.bench.slurm $(if $(QUICK),--runs 5 --tracked 100)
	@$(BIN)/python -m tests.bench.scaling $(if $(QUICK),--runs 20 --deliveries 500)

.PHONY: check
check: setup-dev  ## Check style, types, dependencies between packages, scripts, documents and locks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/hadolint Dockerfile
	config/check-words
	$(BIN)/python -m pytest -q tests/unit/test_docs.py tests/unit/test_architecture.py tests/unit/test_locks.py

.PHONY: fmt
fmt: setup-dev  ## Format the code and repair what ruff can repair
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: lock
lock: setup-dev  ## Bring the locks up to date with pyproject.toml; UPGRADE=1 takes the newest releases
	$(LOCK) $(if $(UPGRADE),--upgrade) --extra demo -o requirements.lock pyproject.toml config/setup.in
	$(LOCK) $(if $(UPGRADE),--upgrade) --extra dev -c requirements.lock -o requirements-dev.lock \
		pyproject.toml config/setup.in config/check.in
	$(LOCK) $(if $(UPGRADE),--upgrade) -o config/crate.lock config/crate.in

.PHONY: clean
clean:  ## Remove what the other commands made in this directory, except ./data
	rm -rf .venv build dist ./*.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './data/*' -prune -exec rm -rf {} +
