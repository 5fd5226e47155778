PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bars bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(STAMP)  ## create .venv with pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## start a small mesh on the embedded model, stream a completion, stop
	$(BIN)/moemesh demo

test: setup  ## every test that this machine can run; containers beside those that only compute
	@mkdir -p build; $(BIN)/pytest tests/compose > build/compose.log 2>&1 & compose=$$!; \
	status=0; $(BIN)/pytest tests/parity || status=$$?; \
	wait $$compose || status=$$?; cat build/compose.log; rm -f build/compose.log; \
	$(BIN)/pytest tests --ignore tests/parity --ignore tests/compose || status=$$?; exit $$status

lint: setup  ## what CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bars: setup  ## run every bench and print one table of bars
	$(BIN)/python bench/bars.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
