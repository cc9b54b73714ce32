PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# As many tests at a time; a file's share what they export and compile.
WORKERS ?= $(shell nproc)
GPU_STACK := .venv-gpu-stack
GPU_STACK_PYTHON ?= python3.12
GPU_STACK_STAMP := $(GPU_STACK)/.installed

.PHONY: help setup web cpp demo test test-gpu-stack slow check format bench quality performance budget gpu clean

help:
	@echo "make demo    sample a grid of handwritten digits: digits.png"
	@echo "make test    run the tests (ARGS='-k name' to choose)"
	@echo "make test-gpu-stack  the tests with a GPU machine's Python 3.12, torch for CUDA and triton, on the CPU; installs 6 GB"
	@echo "make check   ruff and mypy"
	@echo "make bench   the benchmarks: ours and what else there is, in one run (ARGS='--quick --json FILE')"
	@echo "make quality quality against time on the digits, into benchmarks/results"
	@echo "make performance  docs/performance.md and its plots, from benchmarks/results"
	@echo "make budget  the kernels compiled for every supported GPU, held to their budget"
	@echo "make gpu     tests, checkers, a profile and benchmarks on this machine's GPU (ARGS='--minutes 9'; --rehearse: without one)"
	@echo "make slow    the long sweeps"
	@echo "make format  let ruff format the code"

setup: $(STAMP)

# The stamp comes last, so that an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt Makefile scripts/make_venv.sh scripts/apt_install.sh
	@echo "Installing into $(VENV); this takes a few minutes once."
	sh scripts/make_venv.sh $(PYTHON) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/fastddim sample --out digits.png

# The page's tests run in node and in a browser; no stamp, as a kept folder may meet a machine without them.
web:
	@sh scripts/make_web.sh

# What cpp/ is built with; no stamp either.
cpp: setup
	@sh scripts/make_cpp.sh $(BIN)/python

test: setup web cpp
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

$(GPU_STACK_STAMP): pyproject.toml constraints-gpu-stack.txt Makefile scripts/make_venv.sh scripts/apt_install.sh
	@echo "Installing 6 GB into $(GPU_STACK), once."
	sh scripts/make_venv.sh $(GPU_STACK_PYTHON) $(GPU_STACK)
	$(GPU_STACK)/bin/pip install --quiet --disable-pip-version-check -c constraints-gpu-stack.txt -e '.[dev]'
	@touch $@

# Not in CI, for its size. No C++: libtorch for CUDA asks for CUDA's toolkit, and build/ has one Python's packages. No web
# page, which runs neither torch nor triton.
test-gpu-stack: $(GPU_STACK_STAMP)
	$(GPU_STACK)/bin/python -m pytest -n 2 --dist loadfile -m 'not slow and not cpp' --ignore tests/test_web.py $(ARGS)

slow: setup cpp
	$(BIN)/python -m pytest -m slow $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m fastddim.bench $(ARGS)
	$(BIN)/python -m pytest benchmarks --benchmark-only

quality: setup
	$(BIN)/python examples/quality_time.py --json benchmarks/results/quality-digits.json $(ARGS)

performance: setup
	$(BIN)/python benchmarks/performance.py

budget: setup
	$(BIN)/python benchmarks/kernel_budget.py $(ARGS)

# In a GPU machine's own environment: PYTHON has its torch and triton; cmake, g++ and nlohmann/json build the C++ launcher.
gpu:
	PYTHON=$(PYTHON) sh scripts/gpu_check.sh $(ARGS)

clean:
	rm -rf $(VENV) $(GPU_STACK) build dist *.egg-info examples/web/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
