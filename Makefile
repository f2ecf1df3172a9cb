# make demo: generate camouflage, train on it, score it, write a report.
# make test: every check.  make test-fast: the checks of daily work, in about two minutes.
# make docs: the documentation as a site, in site/.
# Each sets itself up on a fresh machine with Python 3.10 to 3.13; nothing is installed outside VENV.

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= runs/demo
BIN     = $(VENV)/bin
# A changed dependency list or a moved checkout makes a new stamp, and with it a new install.
SPEC   := $(shell (cat pyproject.toml; pwd) | cksum | cut -d ' ' -f 1)
PRODUCT = $(VENV)/product-$(SPEC)
TESTS   = $(VENV)/tests-$(SPEC)
DOCS    = $(VENV)/docs-$(SPEC)
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope \
	--no-loadscope-reorder

.PHONY: demo docs environment test test-fast lint types unit format clean

demo: $(PRODUCT)
	$(BIN)/python tools/demo.py --output $(DEMO)

# The variable silences a notice of the theme's authors about their next product.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "Open site/index.html."

environment: $(TESTS)

test: lint types unit

test-fast: lint types
	$(PYTEST) -m "not slow and not exhaustive" --ignore tests/faults --ignore tests/tools \
		--ignore tests/frozen/test_digests.py

lint: $(TESTS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

types: $(TESTS)
	$(BIN)/mypy

unit: $(TESTS)
	$(PYTEST)

format: $(TESTS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(PRODUCT): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	rm -f $(VENV)/product-* && touch $@

$(TESTS): $(PRODUCT)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	rm -f $(VENV)/tests-* && touch $@

$(DOCS): $(PRODUCT)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	rm -f $(VENV)/docs-* && touch $@

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache build site *.egg-info
