# Everything made here stays in this folder: .venv, .cache (downloads), .weft (the data of `make run`), build.
# `make run` and `make test` set up what they need. PYTHON=… chooses the interpreter, ARGS=… adds arguments.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the console is built from: installing builds it.
CONSOLE := hatch_build.py edge/console/build.py $(shell find edge/console/web -type f)

export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export UV_CACHE_DIR ?= $(CURDIR)/.cache/uv
export PYRIGHT_PYTHON_CACHE_DIR ?= $(CURDIR)/.cache/pyright
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export UV_PYTHON_DOWNLOADS := never
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

# How many processes share the quick tests, file by file, and the long ones that only reckon, test by test. Those with
# servers and clients of their own have the machine to themselves, and so have the schedules, which bring their processes.
TESTERS ?= 2
SCHEDULES := tests/simulation/test_simulation.py
RECKONING := tests/simulation tests/contract tests/origin tests/edge tests/browser

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test test-full test-aws lint bench simulate lock clean

help:
	@echo 'make run        three regions and their edges on loopback'
	@echo 'make test       the test suite, at most 8 minutes'
	@echo 'make test-full  the tests that take longer'
	@echo 'make test-aws   those of them that need AWS, emulated here'
	@echo 'make lint       ruff, pyright, import-linter'
	@echo 'make simulate   schedules of faults on virtual time; N=how many, SEED=the first (N=1 replays one)'
	@echo 'make bench      benchmarks beside their peers; ONLY=case for one'
	@echo 'make install    only set up .venv'
	@echo 'make lock       pin the dependencies again; UPGRADE=1 to newer ones'
	@echo 'make clean      remove what was made, but not the data in .weft'

install: $(STAMP)

run: install
	$(BIN)/weft up $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not full" -q --numprocesses=$(TESTERS) --dist=loadfile --no-loadscope-reorder --durations=10 $(ARGS)

test-aws: install
	$(BIN)/python -m pytest -m aws -q --durations=10 $(ARGS)

test-full: install
	$(BIN)/python -m pytest -m full -q --durations=5 $(SCHEDULES) $(ARGS)
	$(BIN)/python -m pytest -m "full and not emulated" -q --numprocesses=$(TESTERS) --dist=worksteal --durations=15 $(RECKONING) --ignore=$(SCHEDULES) $(ARGS)
	$(BIN)/python -m pytest -m "full and not emulated" -q --durations=15 $(RECKONING:%=--ignore=%) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m tests.bench $(ONLY) $(ARGS)

simulate: install
	@$(BIN)/python -m tests.simulation --n $(or $(N),1000) --seed $(or $(SEED),1) $(if $(BUG),--bug $(BUG)) $(ARGS)

# The lock names no host, index or path: it installs from anybody's index.
lock: install
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet \
		$(if $(UPGRADE),--upgrade) --output-file requirements.lock
	@! grep -nE '://|^ *--(index|extra-index|find-links|trusted)| @ ' requirements.lock

clean:
	rm -rf $(VENV) .cache build dist edge/console/built .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Setting up: an interpreter, uv as the lock pins it, what the lock names, and this project (built offline, its
# build backend is in the lock). Where uv cannot be had or cannot reach its index, pip does the same, slower.
$(STAMP): $(BIN)/python requirements.lock pyproject.toml $(CONSOLE)
	@awk '/^[A-Za-z]/ { keep = /^uv==/ } keep' requirements.lock > $(VENV)/uv.lock
	@$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(VENV)/uv.lock \
		&& $(BIN)/uv pip sync --quiet --require-hashes requirements.lock \
		&& $(BIN)/uv pip install --quiet --offline --no-deps --no-build-isolation --editable . \
	|| { echo 'uv did not manage, installing with pip' >&2; \
		$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock \
		&& $(BIN)/python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .; }
	@touch $@

$(BIN)/python:
	@set -e; found=; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo 'error: Weft needs Python 3.11 or newer, found none of: $(or $(PYTHON),python3 python3.11 … python3.14); name one with PYTHON=/path/to/python' >&2; exit 1; \
	fi; \
	"$$found" -m venv --clear $(VENV) || { \
		echo "error: $$found cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		rm -rf $(VENV); exit 1; }
