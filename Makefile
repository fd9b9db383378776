# The one list of commands. CI, pre-commit and the README call these and nothing else.

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_QUIET := 1
SOURCES := helixflow tests perf engines .ci
# Python packages come from the locks, by their hashes, and from nowhere else: see `make lock`.
INSTALL := $(BIN)/python -m pip install --require-hashes --no-deps
DEVELOP := PIP_NO_INDEX=1 $(BIN)/maturin develop --quiet
LOCK = .build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  $(LOCKFLAGS) --extra build pyproject.toml
POSTGRES := /usr/lib/postgresql/15/bin
APT := $(if $(filter 0,$(shell id -u)),apt-get,)

.DEFAULT_GOAL := help
.PHONY: help build build-dev serve test test-rust test-python test-long test-clients lint fmt bench certs proto demo-model lock sbom deny \
  clean system

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.base: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.lock
	touch $@

$(VENV)/.dev: $(VENV)/.base requirements-dev.lock
	$(INSTALL) -r requirements-dev.lock
	touch $@

build: $(VENV)/.base ## the extension (release profile) and the package, into .venv
	$(DEVELOP) --release

build-dev: $(VENV)/.dev
	$(DEVELOP)

serve: build ## certificates, demo model, all services; Ctrl-C stops them
	$(BIN)/helixflow serve --profile development

test: test-rust test-python ## cargo's and pytest's tests, as CI runs them

test-rust:
	cargo test --workspace --exclude core_rs

test-python: build-dev system
	$(BIN)/python -m pytest

test-long: build-dev system ## what CI leaves out: killed and stalled services, whole TensorRT builds (10 minutes)
	$(BIN)/python -m pytest -m long

test-clients: build-dev ## unmodified foreign clients against a served gateway; needs registries, Go and Node
	$(BIN)/python -m tests.clients

# What the tests drive and Debian ships; without root they must be there already.
system:
	@missing=""; for tool in curl openssl; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ] && [ -n "$(APT)" ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing ca-certificates; \
	elif [ -n "$$missing" ]; then echo "tests that need them are skipped; install:$$missing"; fi
	@test -x $(POSTGRES)/postgres || { test -n "$(APT)" && mkdir -p /etc/postgresql-common/createcluster.d && \
	echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.d/helixflow.conf && \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql-15; } || \
	echo "tests on PostgreSQL 15 are skipped; install: postgresql-15"
	@test -x /usr/bin/redis-server || { test -n "$(APT)" && apt-get update -qq && \
	RUNLEVEL=1 apt-get install -y -qq --no-install-recommends redis-server; } || \
	echo "tests on Redis are skipped; install: redis-server"

lint: build-dev ## ruff, mypy --strict, the stub against the built module, clippy, formats
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest helixflow.core_rs --allowlist tests/stubtest-allowlist.txt
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt: $(VENV)/.base ## formats everything
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	cargo fmt --all

bench: $(VENV)/.dev ## measures; writes perf/results/
	$(DEVELOP) --release
	cargo build --release --package helix-loadgen
	$(BIN)/python -m perf.bench

certs: build ## the certificates of all services, into certs/
	$(BIN)/helixflow pki init

proto: ## compiles the protos (the build does it too) and lists their services
	cargo build --package helix-wire

demo-model: $(VENV)/.base ## trains engines/demo anew (about an hour)
	$(BIN)/python -m pip install --quiet jax optax safetensors tokenizers
	$(BIN)/python -m engines.train_demo

lock: ## the locks anew: what pyproject.toml asks for, with hashes; LOCKFLAGS=--upgrade takes the newest versions
	$(PYTHON) -m venv .build/lock && .build/lock/bin/python -m pip install uv
	$(LOCK) --output-file requirements.lock
	$(LOCK) --constraint requirements.lock --extra test --extra lint --extra rtx --extra bench --extra sbom \
	  --output-file requirements-dev.lock

sbom: build-dev ## the software bill of materials (CycloneDX) into .build/helixflow.cdx.json
	$(BIN)/python .ci/sbom.py .build/helixflow.cdx.json

deny: ## licences, sources and banned crates, by deny.toml
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check bans licenses sources

clean: ## build outputs; keeps certificates and engines
	cargo clean
	rm -rf $(VENV) .build .mypy_cache .ruff_cache .pytest_cache .hypothesis helixflow/core_rs*.so
