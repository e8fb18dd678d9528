# Both commands set everything up in .venv by themselves:
#   make demo   render clips, train a small CM-Pose, evaluate it, write pictures and pages (runs/demo/)
#   make test   every test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
# Hugging Face's loader of what tools/hub.py writes, for its test. It stands apart: beside the rest it
# would take part in every build of setuptools, which finds this repository's kernels/ in its place. From
# 0.16 on it brings twenty packages for signatures.
KERNELS := kernels==0.15.2 kernels-data==0.16.2 tomlkit==0.13.3
# Processes that run tests; a file's tests stay together.
WORKERS ?= 2

# The CUDA core is built where it can be used, which needs NVIDIA's driver and nvcc.
ifeq ($(strip $(CMPOSE_BUILD_CUDA)),)
BUILD_CUDA := $(if $(shell command -v nvidia-smi),$(if $(shell $(PYTHON) -m csrc.build --nvcc),1,0),0)
else
BUILD_CUDA := $(strip $(CMPOSE_BUILD_CUDA))
endif
CSRC := $(if $(filter 0,$(BUILD_CUDA)),,$(wildcard csrc/*.*))
STAMP := $(VENV)/.installed$(if $(CSRC),-cuda)
TOOLS := $(VENV)/.tools

.PHONY: help venv tools demo test fuzz lint format clean gpu performance-docs

help:
	@sed -n '1,3p' Makefile; echo "#   make venv | lint | format | fuzz | clean | gpu | performance-docs"

venv: $(STAMP)

tools: $(TOOLS)

# What builds, in seconds: enough to compile the CUDA sources while the rest is installed (.ci/run).
# pip leaves byte code out: of thousands of modules most are never imported.
$(TOOLS):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cmpose needs Python >= 3.10; run make PYTHON=/path/to/python3")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile 'setuptools>=77' ninja 'pybind11>=2.13' 'pytest>=8'
	touch $@

# The set-up is redone when what it installs changes. The imports at its end write the byte code of
# what a command loads.
$(STAMP): $(TOOLS) pyproject.toml setup.py constraints.txt $(CSRC)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch triton
	CMPOSE_BUILD_CUDA=$(BUILD_CUDA) $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation \
		-c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target $(VENV)/kernels $(KERNELS)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c 'import cmpose.demo, cmpose.study.ablate'
	rm -f $(VENV)/.installed*
	touch $@

demo: $(STAMP)
	$(BIN)/python -m cmpose demo --output $(DEMO_DIR)

test: $(STAMP)
ifeq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest -p no:benchmark -n $(WORKERS) --dist loadfile --no-loadscope-reorder
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

# Damaged and unusual inputs: at least FUZZ times as many as the tests try, and others each time.
# The whole demo too.
FUZZ ?= 100
fuzz: $(STAMP)
	CMPOSE_FUZZ=$(FUZZ) $(BIN)/python -m pytest -p no:benchmark -n $(WORKERS) --timeout 3600 tests/fuzz \
		tests/test_demo.py tests/kernels/test_compile_check.py tests/test_outputs.py::test_a_kill_at_a_random_moment_is_recovered_from

# Everything that needs a GPU, with $(PYTHON) as it is: nothing is installed, cmpose is imported from
# here. A run that was cut goes on when it is called again.
STAGES ?= build tests sanitize bench train
gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m bench.gpu --stages $(STAGES) $(GPU_ARGS)

# Tables and charts of docs/performance.md, from bench/results/.
performance-docs: $(STAMP)
	$(BIN)/python -m bench.report

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@files=$$(git ls-files '*.cu' '*.cuh' '*.cpp' '*.h'); \
	if [ -n "$$files" ]; then $(BIN)/clang-format --dry-run --Werror $$files; fi

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@files=$$(git ls-files '*.cu' '*.cuh' '*.cpp' '*.h'); \
	if [ -n "$$files" ]; then $(BIN)/clang-format -i $$files; fi

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
