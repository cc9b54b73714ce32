PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: help setup web cpp demo test slow check format bench budget gpu clean

help:
	@echo "make demo    sample a grid of handwritten digits: digits.png"
	@echo "make test    run the tests (ARGS='-k name' to choose)"
	@echo "make check   ruff and mypy"
	@echo "make bench   the benchmarks, ours against diffusers in one run"
	@echo "make budget  the kernels compiled for every supported GPU, held to their budget"
	@echo "make gpu     the kernels' and the graphs' tests on this machine's GPU, and under compute-sanitizer's checkers"
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
	$(BIN)/python -m pytest $(ARGS)

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

budget: setup
	$(BIN)/python benchmarks/kernel_budget.py $(ARGS)

# Of a GPU's own environment: PYTHON has its torch and triton.
gpu:
	TRITON_INTERPRET=0 PYTHONPATH=. $(PYTHON) -m pytest tests/test_kernels.py tests/test_cuda_graph.py tests/test_loop.py $(ARGS)
	TRITON_INTERPRET=0 PYTHONPATH=. $(PYTHON) -m pytest tests/test_export_aoti.py -m gpu
	TRITON_INTERPRET=0 PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 1 \
	    $(PYTHON) -m pytest tests/test_kernels.py -k 'shape_and_option or rescale or advances' -p no:cacheprovider
	TRITON_INTERPRET=0 PYTHONPATH=. compute-sanitizer --tool racecheck --error-exitcode 1 \
	    $(PYTHON) -m pytest tests/test_kernels.py -k 'rescale or advances' -p no:cacheprovider

clean:
	rm -rf $(VENV) build dist *.egg-info examples/web/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
