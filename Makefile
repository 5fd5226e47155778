PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bars clean

BESIDE := test-compose test-unit

help:  ## list the targets
	@grep -E '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(STAMP)  ## create .venv with pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## start a small mesh on the embedded model, stream a completion, stop
	$(BIN)/moemesh demo

test: setup  ## every test that this machine can run: BESIDE each other where load does no harm, then the others
	@$(MAKE) --no-print-directory --jobs=3 --keep-going --output-sync=target $(BESIDE); beside=$$?; \
	$(BIN)/pytest tests $(patsubst test-%,--ignore=tests/%,$(filter test-%,$(BESIDE))) && exit $$beside

test-%: setup  ## the tests of one directory, as in test-unit
	$(BIN)/pytest tests/$*

lint: setup  ## ruff and pyright
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
