# `make help` lists what there is.
PYTHON ?= python3
MODEL ?= default
PRECISION ?= int8
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo serve export test lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.serving ## Make .venv with what serving needs

demo: $(VENV)/.serving | published ## Rank a sample with the embedded server
	$(BIN)/tritonrank demo

serve: $(VENV)/.serving | published ## Serve the model repository until Ctrl-C
	$(BIN)/tritonrank serve

export: $(if $(filter default-int8,$(MODEL)-$(PRECISION)),$(VENV)/.serving,$(VENV)/.all) ## Export a checkpoint: MODEL=… PRECISION=fp32|fp16|int8
	$(BIN)/tritonrank export $(MODEL) --precision $(PRECISION)

test: $(VENV)/.all ## Run all tests
	$(BIN)/pytest

lint: $(VENV)/.all ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove .venv and what was exported
	rm -rf $(VENV) build model_repository/cross_encoder/current model_repository/cross_encoder/export-*

# The default model, unless a model is published already.
.PHONY: published
published: $(VENV)/.serving
	@test -e model_repository/cross_encoder/1/model.onnx || $(BIN)/tritonrank export default

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serving: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) …"
	@$(PIP) install --constraint constraints.txt --editable '.[serving]'
	@touch $@

$(VENV)/.all: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) …"
	@$(PIP) install --constraint constraints.txt --editable '.[export,dev]'
	@touch $@ $(VENV)/.serving
