# `make help` lists what there is.
PYTHON ?= python3
MODEL ?= default
PRECISION ?= int8
VENV := .venv
BIN := $(VENV)/bin
PEERS := loadtest/environments
CLIENTS := tests/clients/environments
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo serve gateway export bench passages loadtest locust replicas clients test lint clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.serving ## Make .venv with what serving needs

demo: $(VENV)/.serving | published ## Rank a sample with the embedded server
	$(BIN)/tritonrank demo

serve: $(VENV)/.serving | published ## Serve the model repository until Ctrl-C
	$(BIN)/tritonrank serve

gateway: $(VENV)/.serving ## Serve the rerank APIs over HTTP, in front of URL=…; ARGS="--port 8081 …"
	$(BIN)/tritonrank gateway $(if $(URL),--url $(URL)) $(ARGS)

export: $(if $(filter default-int8-,$(MODEL)-$(PRECISION)-$(ARGS)),$(VENV)/.serving,$(VENV)/.all) ## Export a checkpoint: MODEL=… PRECISION=fp32|fp16|int8 ARGS="--max-length …"
	$(BIN)/tritonrank export $(MODEL) --precision $(PRECISION) $(ARGS)

bench: $(VENV)/.all $(PEERS)/.made ## Measure each optimisation and the peers; into loadtest/RESULTS.md and README.md
	$(BIN)/python -m loadtest.bench $(if $(URL),--url $(URL))
	$(BIN)/python -m loadtest.own_cost
	$(BIN)/python -m loadtest.gateway
	$(BIN)/python -m loadtest.report

passages: $(VENV)/.all | published ## How well long documents are ranked, and what they cost; into loadtest/RESULTS.md
	$(BIN)/python -m loadtest.passages
	$(BIN)/python -m loadtest.report

loadtest: $(VENV)/.all | $(if $(URL),,published) ## Find the knee of a server, its own or URL=…: build/load/load.html
	$(BIN)/python -m loadtest.sweep $(if $(URL),--url $(URL)) $(ARGS)

locust: $(VENV)/.all ## Locust's page, for load tests of the server that runs
	$(BIN)/locust -f loadtest/locustfile.py

replicas: $(VENV)/.all ## Three servers under load: killed, frozen, updated; into docker/README.md
	$(BIN)/python -m loadtest.replicas
	$(BIN)/python -m loadtest.report

# Two files at a time: exports have one thread each.
test: $(VENV)/.all $(CLIENTS)/few/.made ## Run all tests
	$(BIN)/pytest --numprocesses 2 --dist loadfile

clients: $(VENV)/.all $(CLIENTS)/few/.made $(CLIENTS)/cohere-5/.made $(CLIENTS)/cohere-7/.made ## Real clients of other servers against the gateway
	$(BIN)/pytest tests/test_clients.py

lint: $(VENV)/.all ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove the environments and what was exported
	rm -rf $(VENV) $(PEERS) $(CLIENTS) loadtest/models build model_repository/cross_encoder/current model_repository/cross_encoder/export-*

# The default model, unless a model is published already.
.PHONY: published
published: $(VENV)/.serving
	@test -L model_repository/cross_encoder/current || $(BIN)/tritonrank export default

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

# In environments of their own, so that their pins do not touch ours. One that cannot be installed
# is left out of the benchmark, which says so.
$(PEERS)/.made: $(wildcard loadtest/peers/*.txt) constraints.txt
	@echo "Installing the peers into $(PEERS) …"
	@mkdir -p $(PEERS)
	-@for peer in $(basename $(notdir $(wildcard loadtest/peers/*.txt))); do \
		$(PYTHON) -m venv $(PEERS)/$$peer; \
		$(PEERS)/$$peer/bin/pip --disable-pip-version-check --quiet install \
			--constraint constraints.txt --requirement loadtest/peers/$$peer.txt; \
	done
	@touch $@

# The same for clients of other servers.
$(CLIENTS)/%/.made: tests/clients/%.txt constraints.txt
	@echo "Installing clients into $(@D) …"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip --disable-pip-version-check --quiet install --constraint constraints.txt --requirement $<
	@touch $@
