# Everything a checkout needs: `make help` lists it. Only python3 (3.11 or newer) and make must be present.
#
#   make test PYTHON=/path/to/python VENV=.venv311     another interpreter, another folder

SHELL := /bin/sh
VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all lint format bench bench-quick baselines setup clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-12s %s\n' "$$name" "$$what"; done

setup: $(STAMP) ## make the virtual environment and install into it

# Made again only when what is installed changes.
$(STAMP): pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then python="$$(sh .ci/find-python)" || exit 1; fi; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$python is not a Python 3.11 or newer: name another with PYTHON=/path/to/python" >&2; exit 1; }; \
	minor='import sys; print(sys.version_info[:2])'; \
	if [ -f $(VENV)/pyvenv.cfg ] && [ "$$($(BIN)/python -c "$$minor" 2>&1)" != "$$("$$python" -c "$$minor")" ]; then \
		rm -rf $(VENV); fi; \
	echo "setting up $(VENV) with $$("$$python" --version): installing takes a few minutes, once"; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV) || \
		{ [ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV); echo "no virtual environment could be made (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train one small model on five tasks, add a sixth, ask it things (under 5 minutes)
	@$(BIN)/python examples/quickstart.py

test: $(STAMP) ## run the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP) ## run only the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-all: $(STAMP) ## run all tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## every benchmark of speed, into runs/bench (most of an hour)
	$(BIN)/python -m benchmarks.run --out runs/bench $(BENCH_ARGS)

bench-quick: $(STAMP) ## a small size of each, into runs/bench-quick (under three minutes)
	$(BIN)/python -m benchmarks.run --out runs/bench-quick --quick $(BENCH_ARGS)

baselines: $(STAMP) ## the plain baselines on the shared data (valid split), a few minutes
	$(BIN)/python -m benchmarks.baselines --split valid

clean: ## remove the virtual environment, caches and what the demo wrote
	[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	rm -rf build dist quickstart .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
