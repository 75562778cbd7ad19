# `make demo` and `make test` set up everything they need in .venv; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= What is the capital of France?
SOAK ?= 10

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

bench: $(VENV)/.installed-test ## the demo against transformers, and llama.cpp where installed; the server for SOAK minutes
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/soak.py --minutes $(SOAK)

SRC := glmlocal/kernels/cpu/src
HAS = $(shell grep -qsw $(1) /proc/cpuinfo && echo yes)
ISA := $(if $(call HAS,amx_int8),amx,$(if $(call HAS,avx512_vnni),avx512,$(if $(call HAS,avx2),avx2,generic)))
ISA_FLAGS_avx2 := -mavx2 -mfma -mf16c
ISA_FLAGS_avx512 := $(ISA_FLAGS_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512
# Without "null" and "object-size", which test every access through a pointer that an inlined lambda captured: those alone
# make GCC take more than an hour for the kernels.
ISA_FLAGS_amx := $(ISA_FLAGS_avx512) -mamx-tile -mamx-int8
SANITIZE := -std=c++20 -O1 -g1 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-uninitialized -I$(SRC) \
  -fsanitize=address,undefined -fno-sanitize=alignment,null,object-size,vptr -fno-sanitize-recover=undefined \
  --param asan-instrumentation-with-call-threshold=0 -fno-var-tracking -DGLM_ISA=$(ISA) -DGLM_ONLY_ISA=$(ISA) $(ISA_FLAGS_$(ISA))
SANITIZED := $(filter-out bindings bindings_offload,$(basename $(notdir $(wildcard $(SRC)/*.cpp)))) $(addprefix isa/,$(basename $(notdir $(wildcard $(SRC)/isa/*.cpp))))

build/sanitize/%.o: $(SRC)/%.cpp $(NATIVE)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

build/sanitize/run: $(wildcard tests/kernels/sanitize*.cpp) $(addprefix build/sanitize/,$(addsuffix .o,$(SANITIZED)))
	$(CXX) $(SANITIZE) $^ -pthread -o $@

sanitize: build/sanitize/run ## the whole of the kernels under ASan and UBSan, with the best ISA this CPU has
	$<

clean: ## remove the virtual environment and build products
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
