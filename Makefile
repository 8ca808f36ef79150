# Everything a clone needs, on a machine that has Python 3.11+, pip and make:
#   make app     set up, start the app, print its address      make app HOST=0.0.0.0 PORT=8000
#   make test    set up, run the tests (minutes)               make test ARGS="-k qformer"
# The set-up is done once, in .venv; pip's own settings (index, proxy, certificates) are left as they are.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

# HOST is read from the command line alone: some shells export it as the machine's name,
# and that must not turn a private app into a public one.
ifneq ($(origin HOST),command line)
HOST :=
endif
APP_ARGS = $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

.PHONY: app test lint format check-long clean help
.DEFAULT_GOAL := help

app: $(READY)  ## start the app on the embedded checkpoints
	@exec $(BIN)/python app.py $(APP_ARGS)

test: $(READY)  ## the tests: no network, no GPU, no browser
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check-long: $(READY)  ## the long checks: browser, kills, bulk; prints their figures (within the hour)
	@$(BIN)/python -m pytest -s -m "browser or long" $(ARGS)

clean:  ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1	\2/p' Makefile

# Without ensurepip (Debian's python3 alone) the environment is made bare and pip installs a pip into it.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "make: there is no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $$($(PYTHON) --version 2>&1) is too old; Python 3.11 or newer is needed, e.g.: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the virtual environment $(VENV) ($$($(PYTHON) --version 2>&1))"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  rm -rf $(VENV); \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } || { \
	  rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(READY): requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing what requirements.txt pins (once; some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # pip has one core for it; for other Pythons is what fails
	@touch $(READY)
