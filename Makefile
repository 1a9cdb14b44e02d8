# robustscale: `make demo` and `make test` are all that is needed; both set up what they need (see setup.sh).
# Make's own arguments reach them: make test TORCH=2.11.0 PYTHON=python3.12

export PYTHON TORCH

PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test check slow gpu clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv, once; again only when the pins change
	@./setup.sh

demo: setup ## train a small robust model on this machine
	$(PY) -m robustscale.pretrain

test: setup ## everything that CI runs: format, lint, types, tests (not those marked slow or gpu)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -n 2

check: test ## the same as make test

slow: setup ## the tests marked slow
	$(PY) -m pytest -m "slow and not gpu" --timeout 3600

gpu: setup ## the tests marked gpu; each is skipped where there is no CUDA device
	$(PY) -m pytest -m gpu --timeout 3600

clean: ## remove .venv and every cache; runs and data sets stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
