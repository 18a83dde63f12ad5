# `make help` lists the targets. Each makes the environment first where there is none.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_VENV := .venv-docs
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help env demo test lint bench gpu docs docs-serve wheel release-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Options: PYTHON=python3.11 (makes the environment with it), ARGS="..." (passed on to the command).'

env: $(READY) ## make the environment and do nothing else

demo: $(READY) ## attack a trained classifier with JIIO and with PGD, and compare
	$(BIN)/jiio demo --overwrite $(ARGS)

test: $(READY) ## run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## ruff, mypy, import-linter and codespell
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/codespell

bench: $(READY) ## measure the attacks side by side
	$(BIN)/python benchmarks/attack.py $(ARGS)

gpu: $(READY) ## on a CUDA device: its tests, and what a search costs there
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu.py $(ARGS)

docs: $(DOCS_VENV)/.ready ## build the pages into site/: open site/index.html
	$(MKDOCS) build

docs-serve: $(DOCS_VENV)/.ready ## show the pages at http://127.0.0.1:8000 while they are edited
	$(MKDOCS) serve

wheel: $(READY) ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

release-check: $(READY) ## build, check, install elsewhere and try; ARGS="extra ..." tries those too
	PYTHON=$(PYTHON) .ci/release_check $(ARGS)

clean: ## remove the environment, the builds and the caches
	rm -rf $(VENV) $(DOCS_VENV) build dist site .coverage htmlcov .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything is pinned, so pip has nothing to resolve (--no-deps), and `pip check` finds what is missing.
$(READY): requirements/dev.txt pyproject.toml
	@echo 'Installing the pinned requirements into $(VENV): about 6 GB and a few minutes, once.'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
			"The requirements need Python 3.11, 3.12 or 3.13; this is %d.%d. Try: make PYTHON=python3.11" % v)' && \
		$(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --no-deps -r requirements/dev.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	@touch $@

$(DOCS_VENV)/.ready: requirements/docs.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --no-deps -r requirements/docs.txt
	$(DOCS_VENV)/bin/python -m pip check
	@touch $@
