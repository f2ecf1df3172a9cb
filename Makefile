# make demo: generate camouflage, train on it, score it, write a report.  make test: every check.
# Each sets itself up on a fresh machine with Python 3.10 to 3.13; nothing is installed outside VENV.

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= runs/demo
BIN     = $(VENV)/bin
# A changed dependency list or a moved checkout makes a new stamp, and with it a new install.
SPEC   := $(shell (cat setup.cfg pyproject.toml; pwd) | cksum | cut -d ' ' -f 1)
STAMP   = $(VENV)/installed-$(SPEC)

.PHONY: demo test lint types unit format clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py --output $(DEMO)

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	rm -f $(VENV)/installed-*
	touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
