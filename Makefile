# `make demo` and `make test` set up everything they need in .venv; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= What is the capital of France?

.DEFAULT_GOAL := help
.PHONY: help demo test check fmt bench sanitize clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "glmlocal needs Python 3.11 to 3.13; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

NATIVE := CMakeLists.txt $(shell find glmlocal/kernels/cpu/src -type f 2>/dev/null)

$(VENV)/.installed: $(BIN)/python pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@touch $@

demo: $(VENV)/.installed ## set up, fetch the demo model, ask it PROMPT; on a terminal go on chatting
	$(BIN)/glmlocal chat demo -p "$(PROMPT)" --temp 0 --max-tokens 128
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/glmlocal chat demo; else echo "Chat with it: $(BIN)/glmlocal chat demo" >&2; fi

test: $(VENV)/.installed-test ## set up, then run the tests
	-$(BIN)/glmlocal show demo  # fetches it; the tests that need it are skipped, with the reason, where that fails
	$(BIN)/python -m pytest -q $(ARGS)

check: $(VENV)/.installed-dev ## lint, types and tests; edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(ARGS)

fmt: $(VENV)/.installed-dev ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test ## the demo against transformers, and llama.cpp where installed
	$(BIN)/python benchmarks/peers.py

SRC := glmlocal/kernels/cpu/src
SANITIZE := -std=c++20 -O1 -g1 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -I$(SRC) \
  -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=undefined --param asan-instrumentation-with-call-threshold=0
ISA_FLAGS := -DGLM_ISA=avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512

build/sanitize/%.o: $(SRC)/%.cpp $(NATIVE)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) $(ISA_FLAGS) -c $< -o $@

build/sanitize/run: tests/kernels/sanitize.cpp $(addprefix build/sanitize/,isa/int8.o isa/matmul.o memory.o packed_matrix.o)
	$(CXX) $(SANITIZE) $(ISA_FLAGS) $^ -o $@

sanitize: build/sanitize/run ## the product kernels under ASan and UBSan, two minutes; needs a CPU with AVX-512 VNNI
	$<

clean: ## remove the virtual environment and build products
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
