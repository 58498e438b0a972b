# A fresh clone needs python3 (>= 3.10) with venv and pip; `make help` lists the targets.
# Variables to set on the command line: PYTHON, VENV, TORCH (which torch to install) and ARGS.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=

PY := $(VENV)/bin/python
NATIVE_SOURCES := setup.py $(wildcard csrc/*.h csrc/*/*)
CODE := portllm kernels tests benchmarks examples setup.py

.PHONY: help demo test sanitize bench portability lint format types build clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*##/  \1\t/p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/installed  ## patch a small model and check the result
	$(PY) examples/demo.py $(ARGS)

test: $(VENV)/installed  ## run all tests
	$(PY) -m pytest $(ARGS)

sanitize: $(VENV)/installed  ## run the op's tests under AddressSanitizer and UBSan
	PYTHON=$(PY) .ci/sanitize

bench: $(VENV)/installed  ## run the benchmarks
	@set -e; for file in $(wildcard benchmarks/bench_*.py); do echo $$file; $(PY) $$file $(ARGS); done

portability: $(VENV)/installed  ## measure how long patches last on evolving models (a quarter of an hour)
	$(PY) -m benchmarks.portability $(ARGS)

lint: $(VENV)/installed  ## check style and format
	$(PY) -m ruff check $(wildcard $(CODE))
	$(PY) -m ruff format --check $(wildcard $(CODE))

format: $(VENV)/installed  ## fix style and format
	$(PY) -m ruff check --fix $(wildcard $(CODE))
	$(PY) -m ruff format $(wildcard $(CODE))

types: $(VENV)/installed  ## check types
	$(PY) -m mypy

build: $(VENV)/installed  ## build a wheel, with the native library where there is a compiler
	$(PY) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist portllm.egg-info portllm/libportllm*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage
	find portllm kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes in first and without build isolation: the native library is built against it, and an
# isolated build would fetch another one.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "setuptools>=77" wheel numpy "$(TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml $(NATIVE_SOURCES)
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[hf,test,dev]"
	@$(PY) -c "from portllm import _native; print('native library:', _native.load() or _native.isa())"
	@touch $@
