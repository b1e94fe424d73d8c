# Every target works on a fresh machine: the first one that runs makes .venv.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ASSETS := $(wildcard ../shared/assets)
export LLAMA2_TEST_ASSETS ?= $(if $(ASSETS),$(abspath $(ASSETS)))
MODEL ?=

.PHONY: setup test test-slow evidence check format demo serve constraints clean
setup: .venv/ready

# uv reads UV_FIND_LINKS where pip reads PIP_FIND_LINKS: a machine that offers its own PyTorch wheel is heard.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

test: setup  ## what CI runs: five minutes at most
	$(BIN)/python -m pytest -q -n 2

test-slow: setup  ## the default tests and the slow ones
	$(BIN)/python -m pytest -q -n 2 -m "not evidence"

evidence: setup  ## everything the claims rest on; writes benchmarks/RESULTS.md
	$(BIN)/python -m pytest -q -m ""
	$(BIN)/python -m benchmarks.evidence

check: setup  ## format, lint, types, spelling, floors of the house, docs in sync
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell llama2 tests docs benchmarks *.md
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -m "not evidence" tests/test_house.py tests/test_docs.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: setup  ## make demo, or make demo MODEL=path-or-hub-name
	$(BIN)/python -m llama2 demo $(if $(MODEL),"$(MODEL)")

serve: setup  ## make serve MODEL=path-or-hub-name
	$(BIN)/python -m llama2 serve "$(or $(MODEL),llama2-demo/aligned/model)"

constraints: .venv/ready  ## after a change of dependencies
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip compile -q --universal --all-extras --no-annotate --no-header pyproject.toml -o constraints.txt

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis dist build
