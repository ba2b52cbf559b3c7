# Every target sets up what it needs in .venv; a bare machine needs Python 3.11 or later and make.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed-

.DEFAULT_GOAL := help
.PHONY: help run test check format train faults bench bench-full bench-latency peers clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(SETUP)run ## Local Ray, the deployment and the gateway on http://127.0.0.1:8000 (PORT=… moves it)
	@exec $(BIN)/sluice serve --local --port $(PORT)

# These start real processes and time them, so each has the machine to itself; the others share it.
ALONE := tests/docker tests/faults tests/integration

test: $(SETUP)test ## Every test that is not marked slow (ARGS="tests/app -x" names some and how)
ifdef ARGS
	$(BIN)/pytest -m "not slow" $(ARGS)
else
	@set -x; status=0; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile $(ALONE:%=--ignore=%) || status=$$?; \
	$(BIN)/pytest -m "not slow" $(ALONE) || status=$$?; \
	exit $$status
endif

check: $(SETUP)check ## Format, lint, types, layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(SETUP)check ## Put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train: $(SETUP)train ## Walk-forward training on the shipped bars, the model card, a new version in models/
	$(BIN)/sluice train

faults: $(SETUP)test ## Every fault of docs/faults.md tried on real processes, 25 minutes; table in .bench/faults/ (ARGS="-k redis")
	$(BIN)/python -m tests.faults $(ARGS)

bench: $(SETUP)bench peers ## Sluice beside its peers, 15 minutes; report in .bench/ (ARGS="--rounds 1 --seconds 1")
	$(BIN)/python -m benchmarks run $(ARGS)

bench-full: $(SETUP)bench peers ## The same with every peer, lane and number of connections; hours
	$(BIN)/python -m benchmarks run --full $(ARGS)

bench-latency: $(SETUP)bench ## What gateway and Ray add to the bare engine at one connection
	$(BIN)/python -m benchmarks latency $(ARGS)

peers: ## Environments of the servers that `make bench` measures against, 2.4 GB
	@PYTHON=$(PYTHON) benchmarks/peers/setup

clean: ## Remove what the other targets made
	rm -rf $(VENV) .run .bench .pytest_cache .mypy_cache .ruff_cache

# One stamp for each set of extras; pins of everything below our direct dependencies are in constraints.txt.
$(SETUP)run: EXTRAS :=
$(SETUP)train: EXTRAS := [train]
$(SETUP)test: EXTRAS := [test]
$(SETUP)check: EXTRAS := [check]
$(SETUP)bench: EXTRAS := [bench]
$(SETUP)%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	    { echo "Sluice needs Python 3.11 to 3.13; this is $$($(PYTHON) --version 2>&1). Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	    { echo "The virtual environment could not be made; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV): some 600 MB, once"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.$(EXTRAS)'
	@touch $@
