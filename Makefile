# The two commands are `make demo` and `make test`; `make help` lists the rest.

SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PINNED := -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test venv lab site bench export format lint synced wheel chapters pages unit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## run the quickstart study and write its report
	$(BIN)/vlm-reward study configs/quickstart.yaml

venv: $(VENV)/.developer ## make .venv with the development tools

lab: venv ## open JupyterLab on the book
	$(BIN)/jupyter lab nbs/index.ipynb

site: venv ## build the site into _docs
	$(BIN)/python tools/build_site.py

bench: venv ## run every benchmark and gather the figures
	$(BIN)/python tools/bench.py

export: venv ## write modules, README.md and clean notebooks from the chapters
	$(BIN)/python tools/nb.py export
	$(BIN)/python tools/readme.py

format: venv ## format notebooks, tests and tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ---- proofs: every target below stands alone; `test` runs all of them, the quick ones first

lint: venv ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

synced: venv ## modules and README.md are what the chapters export
	$(BIN)/python tools/synced.py
	$(BIN)/python tools/readme.py --check

wheel: venv ## sdist and wheel work without the development tools
	$(BIN)/python tools/check_wheel.py

chapters: venv ## run every chapter and compare the stored outputs
	$(BIN)/python tools/nb.py check --jobs 2

pages: site ## open every page in a browser
	$(BIN)/python tools/check_site.py

unit: venv ## the tests
	$(BIN)/python -m pytest -n 2

test: export HF_HUB_OFFLINE = 1
test: export TOKENIZERS_PARALLELISM = false
test: export OMP_NUM_THREADS = 1
test: venv ## prove the whole book
	@for step in "-j 2 --output-sync lint synced wheel" chapters pages unit; do \
		start=$$SECONDS; echo "---- $${step##*sync }"; $(MAKE) --no-print-directory $$step || exit 1; \
		[ "$$step" = unit ] || echo "---- $${step##*sync }: $$((SECONDS - start)) s"; \
	done

clean: ## remove what was built, the environment and the runs stay
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# ---- the environment

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and alone: on its own the constraint picks the build that fits the machine
$(VENV)/.installed: $(VENV)/.made settings.ini setup.py constraints.txt
	$(BIN)/pip install --quiet torch $(PINNED)
	$(BIN)/pip install --quiet --editable . $(PINNED)
	touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]' $(PINNED)
	touch $@
