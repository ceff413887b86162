# `make quickstart` and `make test` need nothing but Python 3.11+; both build .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The PyTorch to install, before anything else can ask for a looser one. Override for another build.
TORCH ?= torch==2.13.0

.PHONY: quickstart test lint types imports pytest install kernels-mojo clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train a small language model on this machine, from raw text to a sample"
	@echo "make test         lint, types, import rules and tests"
	@echo "make kernels-mojo compile the kernels in Mojo for Hopper GPUs, which come with the package (needs no GPU)"
	@echo "make clean        remove .venv and caches (runs/ stays)"

$(VENV)/.base: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.base

quickstart: $(VENV)/.base
	$(BIN)/treadle train recipes/quickstart.yaml

test: lint types imports pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

pytest: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# Mojo with what it needs for GPUs, in an environment of its own; Triton, for its ptxas, is in the other one.
MOJO := mojo-compiler==1.2.0 mojo-compiler-mojo-libs==1.2.0 max-mojo-libs==26.7.0 max-core==26.7.0

.venv-mojo/bin/mojo:
	$(PYTHON) -m venv .venv-mojo
	.venv-mojo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(MOJO)

kernels-mojo: $(VENV)/.dev .venv-mojo/bin/mojo
	$(BIN)/python treadle/kernels/mojo/build.py .venv-mojo/bin/mojo

clean:
	rm -rf $(VENV) .venv-mojo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
