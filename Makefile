# Two commands are all it takes on a fresh machine with Python 3.11+, git and make:
#   make demo    the whole loop on real pictures; ends in out/demo/report.html
#   make test    the tests
# Both install what they need into .venv; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo

.PHONY: demo smallest test stock check evidence format clean

demo: $(VENV)/.demo
	$(BIN)/atoll demo --out $(OUT)

smallest: $(VENV)/.demo
	$(BIN)/atoll demo --smallest --out out/smallest

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# diffusers imports transformers, where it is, into every process: half a second to a second for
# each that the tests start. So it lies apart, where these tests alone see it.
stock: $(VENV)/.stock
	PYTHONPATH=$(VENV)/stock $(BIN)/python -m pytest tests/router/test_stock.py tests/merge/test_stock.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

evidence: $(VENV)/.dev
	$(BIN)/python -m benchmarks.train --json
	$(BIN)/python -m benchmarks.kills --json
	rm -rf out/heads
	$(BIN)/python -m benchmarks.heads out/heads

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Atoll needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.stock: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/stock 'transformers>=5.23' tokenizers 'peft>=0.21'
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
