# Each target works on a fresh clone: it makes the virtual environment and builds what it needs.
#   make demo        train the example on stock and on batchops, print the table, write the plot
#   make test        build and run the whole test-suite
#   make lint        formatting and static checks
#   make bench       benchmarks in both allocator modes, report under bench/results/
#   make kernels     what nvcc makes of the CUDA kernels, and their passes over memory
#   make wheel       a wheel in dist/; CUDA_ARCHS="90" TORCH_VERSIONS="2.11 2.13" choose what for
#   make check-wheel the wheels in dist/, each in an environment without compiler or toolkit
#   make docs        the documentation in out/docs/
#   make gpu-check   on a machine with an NVIDIA GPU: the CUDA tests and the benches
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env build test lint docs demo bench kernels wheel check-wheel gpu-check clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Development builds name one target, with the PTX that tests run; wheels name them all
# (cmake/cuda.cmake).
CUDA_ARCHS ?=
DEV_ARCHS := $(or $(CUDA_ARCHS),$(if $(shell command -v nvidia-smi 2>/dev/null),native,90))
# Bytecode is made of what is imported, once, and not of all that torch brings: where it may not be
# kept, each of the many processes that the tests start would compile torch again.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --no-compile --progress-bar off -q
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
say = @printf '\n\033[1m==> %s\033[0m\n'

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/.ready: requirements-dev.txt
	$(say) "virtual environment in $(VENV) ($(shell $(PYTHON) --version))"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(say) "$(TORCH)"
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	$(say) "build and test tools"
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps timm==1.0.31
	touch $@

env: $(BIN)/.ready

# pip keeps the build folder, so this compiles only what changed; ccache serves where present.
build: env
	$(say) "batchops (CUDA: $${BATCHOPS_CUDA:-AUTO}, targets $(DEV_ARCHS))"
	PATH="$(abspath $(BIN)):$$PATH" CUDAARCHS="$(DEV_ARCHS)" \
	  $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e . -C build-dir=build/dev
	$(BIN)/python -c 'import batchops; print(batchops.show_config())'

# Most tests keep one core busy: they go to all cores at once.
test: build
	$(say) "tests"
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
endif

lint: env
	$(say) "formatting and static checks"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

docs: build
	$(say) "documentation"
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs

demo: build
	$(say) "the digits job: stock and batchops, same seed"
	$(BIN)/python examples/digits.py $(DEMO_ARGS)

BENCH_OUT ?= out/bench
bench: build
	$(say) "benchmarks, default allocator"
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest bench -q --benchmark-json=$(BENCH_OUT)/default.json $(BENCH_ARGS)
	$(say) "benchmarks, recycled pages"
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 \
	  $(BIN)/python -m pytest bench -q --benchmark-json=$(BENCH_OUT)/recycled.json $(BENCH_ARGS)
	$(BIN)/python bench/report.py $(BENCH_OUT)/default.json $(BENCH_OUT)/recycled.json --readme README.md

# No GPU needed; docs/checking_cuda.md tells what the figures mean.
KERNEL_ARGS ?= --summary
TARGETS ?= sm_75 sm_80 sm_90 sm_100
kernels: build
	$(say) "machine code of the CUDA kernels"
	$(BIN)/python -m tests.machine_code $(TARGETS) $(KERNEL_ARGS)
	BATCHOPS_MACHINE_CODE_TARGETS="$(TARGETS)" $(BIN)/python -m pytest -q \
	  tests/test_machine_code.py tests/test_register_budget.py
	$(say) "passes over memory"
	$(BIN)/python -m tests.emulator.traffic

TORCH_VERSIONS ?=
CUDA_TOOLKIT ?= system
wheel: env
	$(say) "wheel (targets: $(or $(CUDA_ARCHS),all); torch: $(or $(TORCH_VERSIONS),$(TORCH)))"
	$(BIN)/python tools/wheels.py build --cuda-archs "$(CUDA_ARCHS)" --torch "$(TORCH_VERSIONS)" \
	  --cuda-toolkit $(CUDA_TOOLKIT)

CHECK_ARGS ?=
check-wheel: env
	$(say) "wheels where nothing else is installed"
	for wheel in dist/*.whl; do $(BIN)/python tools/wheels.py check $$wheel $(CHECK_ARGS); done

# Uses the environment that is active (torch with CUDA, pybind11, scikit-build-core), no network.
# GPU_PARTS="tests memcheck" chooses some parts.
GPU_PARTS ?=
gpu-check:
	$(say) "batchops on this machine's GPU"
	CUDA_ARCHS="$(CUDA_ARCHS)" BENCH_ARGS="$(BENCH_ARGS)" \
	  $(PYTHON) tools/gpu_check.py $(GPU_PARTS) --out out/gpu

clean:
	rm -rf build dist out .pytest_cache .ruff_cache
