# Each target first brings .venv up to date (instantly if it is); see scripts/bootstrap.py.
#   make PYTHON=python3.12 demo          another Python than `python3`
#   make demo ARGS="--n 4 --json"        arguments for the command behind a target

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# So many processes share the tests; those that share engines stay together.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder
TRAINERS := verl skyrl verifiers megatron
CPP_FILES := find aseer tests/native -name '*.cc' -o -name '*.h'

.DEFAULT_GOAL := help
.PHONY: help setup demo grpo test test-wheel test-quick test-slow test-v2 test-oldest test-trainers compat coverage lint format bench bench-smoke clean

help:
	@echo "make demo        roll out 64 requests on two vLLM engines on this CPU"
	@echo "make grpo        train a small model by GRPO on this CPU, from nothing"
	@echo "make test        all tests that need no GPU, real engines included (minutes)"
	@echo "make test-quick  unit and property tests (under a minute)"
	@echo "make test-slow   the tests that make test leaves out since they take long (hours)"
	@echo "make test-wheel  those and a type check, on the wheel instead of the checkout"
	@echo "make test-v2     the GPUs' model runner, interpreted on this CPU (minutes)"
	@echo "make test-oldest  real engines of the oldest vLLM that is supported (sets up 5 GB)"
	@echo "make compat      names and facts of vLLM and LMCache, of releases that pip fetches (2.4 GB)"
	@echo "make test-trainers  real trainers of others on this CPU (sets up 6 GB, half an hour)"
	@echo "make coverage    those, and what of aseer/ they do not run (minutes)"
	@echo "make lint        ruff, mypy, clang-format, codespell; changes nothing"
	@echo "make format      let ruff and clang-format change what they can"
	@echo "make bench       a recorded rollout replayed by every arm (within 20 minutes)"
	@echo "make bench-smoke every benchmark's smoke run"
	@echo "make setup       only make or update .venv"
	@echo "make clean       remove build outputs and caches, but not .venv"

setup:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) is not found; install Python 3.11 to 3.13, or name one:" \
	         "make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) scripts/bootstrap.py

demo: setup
	@$(BIN)/aseer demo $(ARGS)

grpo: setup
	@$(BIN)/python examples/grpo/train.py $(ARGS)

test: setup
	$(PYTEST) -m "not gpu and not slow and not v2" $(ARGS)

test-wheel: setup
	$(BIN)/python scripts/check_wheel.py $(ARGS)

test-quick: setup
	$(PYTEST) tests/unit tests/property $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu and not v2" $(ARGS)

test-v2: setup
	@$(PYTHON) scripts/bootstrap.py --v2
	$(BIN)/python -m pytest -m v2 tests/e2e/test_v2.py tests/e2e/test_v2_drafts.py $(ARGS)

test-oldest: setup
	@$(BIN)/python scripts/other_env.py oldest
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --no-loadscope-reorder \
	    -m "not gpu and not slow and not v2" tests/e2e $(ARGS)

compat: setup
	$(BIN)/python scripts/compat_page.py $(ARGS)

test-trainers: setup
	@for name in $(TRAINERS); do \
	    $(BIN)/python scripts/other_env.py $$name || exit 1; \
	done
	ASEER_VERL_PYTHON=$(CURDIR)/.venv-verl/bin/python \
	ASEER_SKYRL_PYTHON=$(CURDIR)/.venv-skyrl/bin/python \
	ASEER_VERIFIERS_PYTHON=$(CURDIR)/.venv-verifiers/bin/python \
	ASEER_MEGATRON_PYTHON=$(CURDIR)/.venv-megatron/bin/python \
	    $(BIN)/python -m pytest -m slow \
	    $(TRAINERS:%=tests/e2e/test_%.py) tests/integration/test_ray.py $(ARGS)

coverage: setup
	$(BIN)/python -m pytest tests/unit tests/property --cov --cov-report=term $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$($(CPP_FILES))
	$(BIN)/codespell

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$($(CPP_FILES))

bench: setup
	$(BIN)/python bench/bench_rollout_vllm.py --quick

bench-smoke: setup
	@for file in bench/bench_*.py; do \
	    echo "$$file --smoke"; \
	    $(BIN)/python $$file --smoke || [ $$? -eq 77 ] || exit 1; \
	done

clean:
	rm -rf build dist .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find aseer bench scripts tests -name __pycache__ -prune -exec rm -rf {} +
