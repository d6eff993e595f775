# Two commands matter: `make serve` and `make test`. Both set up everything they need first.
.DEFAULT_GOAL := help
.PHONY: help setup serve test lint format bench proto lock docs clean

BIN := .venv/bin
CONFIG ?= serve_config.yaml

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv from the lock (CPU, or CUDA where an NVIDIA GPU is); TEMPO_DEVICE=cpu|cuda overrides
	@scripts/setup.sh

serve: setup ## serve on http://127.0.0.1:8000; MODEL=<path or hub id> PORT=<n> CONFIG=<file>
	@exec $(BIN)/tempo serve $(CONFIG) $(if $(MODEL),--model '$(MODEL)') $(if $(PORT),--port '$(PORT)') $(ARGS)

test: lint ## lint and run all tests; TESTS=<paths and pytest options> chooses some
	@$(BIN)/python -m pytest $(TESTS)

lint: setup ## check format, style, types and import directions
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff . ; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

format: setup ## format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

bench: setup ## measure, short, results under bench-results/; ARGS=<names> chooses some
	@$(BIN)/python -m benchmarks $(ARGS)

proto: setup ## write the stubs of cluster/wire.proto anew
	@scripts/generate_stubs.sh

docs: setup ## write docs/configuration.md anew
	@$(BIN)/python -m deployments.config_docs

lock: setup ## resolve the dependencies anew
	@scripts/lock.sh

clean: ## remove what was set up, built or cached (and .tempo with the embedded Redis' data)
	@rm -rf .venv .venv.lock .tempo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info bench-results
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
