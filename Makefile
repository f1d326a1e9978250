# The front door. Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORES := $(shell nproc 2>/dev/null || echo 1)
export OMP_NUM_THREADS ?= $(CORES)
# A process per core with one thread each; the tests of a file stay together and in their order, which
# begins with the slow ones of whole servers. A process that dies ends the run with the name of its
# test: its successor would be given finished files again, and both would wait for ever. One that heeds
# no signal for longer than any test may take is made to die.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder \
	--max-worker-restart=0 -o faulthandler_timeout=1000 -o faulthandler_exit_on_timeout=true

.PHONY: serve test test-ops check fix bench gpu clean

serve: $(VENV)/.installed  ## serve the built-in model on 127.0.0.1:8000
	$(BIN)/sparseserve serve $(ARGS)

test: $(VENV)/.installed-dev  ## run the suite, as far as it needs nothing but Python
	$(PYTEST) --ignore=tests/ops $(ARGS)

test-ops: $(VENV)/.installed-ops  ## run the rest: Prometheus, Kubernetes' schemas, the image's steps, Ray
	$(PYTEST) tests/ops $(ARGS)

check: $(VENV)/.installed-dev  ## what CI runs, with test-ops after it
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) --ignore=tests/ops $(ARGS)

fix: $(VENV)/.installed-dev  ## format, and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev  ## engine benchmarks on this machine, one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.engine $(ARGS)

gpu: export PYTHONPATH := .:$(PYTHONPATH)
gpu: FOUR_METHODS := dense+flash_skip_softmax+quest+streaming
gpu:  ## tests and short benchmarks on a CUDA device, with the packages that PYTHON finds
	$(PYTHON) -m pytest -q -m gpu tests
	OMP_NUM_THREADS=2 $(PYTHON) -m pytest -q -n 8 -p no:benchmark tests/sparse_methods/kernels tests/service/models/kernels
	$(PYTHON) -m benchmarks.kernels --quick
	$(PYTHON) -m benchmarks.decode --quick
	$(PYTHON) -m benchmarks.selection --quick
	$(PYTHON) -m benchmarks.llama --longest 32768 --method dense --method $(FOUR_METHODS) $(ARGS)

clean:  ## remove the environment and every cache
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.installed-ops: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ops,ray]'
	touch $@
