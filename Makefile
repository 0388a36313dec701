# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
BUILT := $(VENV)/built.stamp
PEERS := $(VENV)/peers.stamp
PIP_BUILD := $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps
# Where there is a compiler, an extension that does not build is an error, not a reason to go without.
ifneq ($(shell command -v $(CXX) c++ clang++),)
  PIP_BUILD += --config-settings=wheel.cmake=true
endif

# Here CUDA is compiled for one GPU, the one of this machine or Hopper: eight minutes less than for all that a wheel has.
ifndef CUDAARCHS
  CUDAARCHS := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -1 | tr -d .),90)
endif
export CUDAARCHS

CXX_FILES := $(filter-out csrc/math/power_coefficients.h,$(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu'))
MODULES := build/modules.txt
# Python modules are read where they are, but an editable install knows only those that were there when it was made.
BUILT_FROM := pyproject.toml CMakeLists.txt $(shell find csrc -type f) $(MODULES)

.PHONY: always help venv build demo test slow fuzz fuzz-numba fuzz-others lint format bench bench-gpu bars results paper deep sanitize gpu-check gpu-memcheck clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

venv: $(INSTALLED) ## .venv with the pinned requirements

$(INSTALLED): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pysteep needs Python 3.11 or newer: make PYTHON=...")'
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing constraints.txt"
	@$(BIN)/python -m pip install -qq -r constraints.txt
	@touch $@

build: $(BUILT) ## the package, editable, in .venv

$(MODULES): always
	@mkdir -p $(@D)
	@find pysteep kernels -name '*.py' | sort | cmp -s - $@ || find pysteep kernels -name '*.py' | sort > $@

$(BUILT): $(INSTALLED) $(BUILT_FROM)
	@echo "Building pysteep (minutes where there is nvcc)"
	@$(PIP_BUILD) --editable .
	@touch $@

demo: $(BUILT) ## python -m pysteep demo $(ARGS)
	@$(BIN)/python -m pysteep demo $(ARGS)

# Two files at a time: most tests keep one core busy. Not more, as some start processes and threads of their own.
# Threads that wait do not spin: they would take the cores of the other file.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -q -n 2 --dist loadfile

test: $(BUILT) ## the tests, without the slow ones
	@$(PYTEST) -m "not slow and not fuzz" $(ARGS)

slow: $(BUILT) ## the slow tests
	@$(PYTEST) --dist loadgroup -m slow $(ARGS)

fuzz: $(BUILT) ## SteepestDescent against the definition on thousands of drawn cases
	@$(MAKE) -j2 --output-sync fuzz-numba fuzz-others

fuzz-numba fuzz-others: fuzz-%:
	@$(BIN)/pytest -q -m fuzz tests/robustness/test_fuzz.py -k $(if $(filter numba,$*),numba,"not numba") $(ARGS)

# mypy reads the package as it is installed: with kernels/ inside.
TYPED := build/typed
lint: $(INSTALLED) ## ruff, mypy, clang-format, generated files
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@mkdir -p $(TYPED)/pysteep && find $(TYPED)/pysteep -type l -delete
	@ln -s $(addprefix $(CURDIR)/,kernels $(filter-out %/__pycache__,$(wildcard pysteep/*))) $(TYPED)/pysteep/
	@cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml pysteep $(CURDIR)/tests/typing
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@$(BIN)/python tools/power_coefficients.py --check

format: $(INSTALLED) ## what lint would ask for, as far as a tool can do it
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(CXX_FILES)

$(PEERS): bench/peers.txt $(INSTALLED)
	@echo "Installing bench/peers.txt"
	@$(BIN)/python -m pip install -qq -c constraints.txt -r bench/peers.txt
	@touch $@

BENCH := $(BIN)/pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds -q
bench: $(BUILT) $(PEERS) ## throughput beside peers, with a report in build/bench: make bench ARGS="-k steepest"
	@mkdir -p build/bench
	@$(BENCH) --benchmark-json=build/bench/benchmarks.json $(ARGS)
	@$(BIN)/python -m bench report build/bench/benchmarks.json

bench-gpu: ## the same on a GPU, as gpu-check: with what its machine has
	@$(PYTHON) bench/gpu/gpu_check.py --pieces build,bench,report --output build/gpu-bench $(ARGS)

bars: $(BUILT) $(PEERS) ## what pysteep must reach, measured in turn with memory's limit and with peers: make bars ARGS=depth
	@$(BIN)/python -m bench bars $(ARGS)

results: $(BUILT) $(PEERS) ## all of it, for bench/results and README: an hour on a quiet machine
	@folder="$$($(BIN)/python -m bench device)"; mkdir -p "$$folder"; \
	  $(BENCH) --benchmark-json="$$folder/benchmarks.json"; \
	  $(BIN)/python -m bench bars --output "$$folder/bars.json" || echo "not all bars are met"; \
	  $(BIN)/python -m bench report "$$folder"/*.json
	@$(BIN)/python -m bench readme

paper: $(BUILT) ## the paper's figures and tables, into results/ (ARGS=--quick: in a minute)
	@for example in examples/figure_*.py examples/table_*.py; do $(BIN)/python $$example $(ARGS); done

deep: $(BUILT) ## the paper's deep networks on data that is here, into results/ (ARGS=--quick: in minutes)
	@for example in sparse_resnet finetune_spectrum finetune_bert qk_balance; do $(BIN)/python examples/$$example.py $(ARGS); done

# The sanitized package is not the one in .venv: -S keeps the editable install out of the way, -P the source tree. Of the CUDA
# ops the host runs are sanitized, so one architecture will do.
SANITIZED := build/sanitize
SANITIZED_TESTS := steepest_step factor_product factor_step mirror_step diagonal_flow rounding sign_vote
sanitize: $(INSTALLED) ## the C++ under the address and undefined-behaviour sanitizers
	@$(PIP_BUILD) --upgrade --target $(SANITIZED)/site --config-settings=build-dir=$(SANITIZED)/cmake --config-settings=install.strip=false \
	  --config-settings=cmake.define.PYSTEEP_SANITIZE=ON --config-settings=cmake.define.CMAKE_CXX_COMPILER=$(CXX) \
	  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=90-virtual .
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH="$(SANITIZED)/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(BIN)/python -P -S -m pytest -q --capture=sys -k "(cpp or cuda-on-host) and not unbiased and not thousandth" \
	  $(SANITIZED_TESTS:%=tests/ops/test_%.py) $(ARGS)

# Not in .venv: with the torch, triton and nvcc of the machine that has the GPU, wherever it has them, and without network.
gpu-check gpu-memcheck bench-gpu: export PYTHONPATH := $(PYTHONPATH)
gpu-check: ## what only a GPU can show
	@$(PYTHON) bench/gpu/gpu_check.py $(ARGS)

gpu-memcheck: ## the same under compute-sanitizer
	@$(PYTHON) bench/gpu/gpu_check.py --pieces build,memcheck,racecheck --output build/gpu-memcheck $(ARGS)

clean: ## remove what was built; .venv stays
	@rm -rf build dist $(BUILT)
