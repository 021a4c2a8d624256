# `make demo` and `make test` need nothing but a supported Python: they make their own environment first.
VENV ?= .venv
PYTHON ?=
ARGS ?=
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check format verify docs clean install

# One thread per process, and none that spins: Ray's workers share the cores.
test verify: export OMP_NUM_THREADS = 1
test verify demo: export OMP_WAIT_POLICY = PASSIVE
test verify demo: export KMP_BLOCKTIME = 0

help:  ## list what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: install  ## distil three specialists into one student on this machine, and write a report
	$(BIN)/opd-ray demo $(ARGS)

test: check  ## check, then every test but the long ones (ARGS="-k name" narrows)
	$(BIN)/python -m pytest $(ARGS)

check: install  ## lint, formatting, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q --durations=0 tests/test_layout.py

format: install  ## format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

verify: install  ## the long evidence, which CI does not run
	$(BIN)/python -m pytest -m verify --timeout=3600 $(ARGS)

docs: install  ## write the page of configuration keys anew, and the documentation's site into site/
	$(BIN)/python scripts/config_page.py
	$(BIN)/mkdocs build --strict

clean:  ## remove caches and build outputs (not the environment, not runs/)
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path '*/.venv*' -prune -exec rm -rf {} +

install:
	@PYTHON='$(PYTHON)' scripts/install.sh '$(VENV)'
