# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test launch slow long older lint site

demo: $(VENV)/installed
	$(BIN)/phigrow demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

launch: $(VENV)/installed
	$(BIN)/python -m pytest -m "launch and not slow and not long"

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not long"

long: $(VENV)/installed
	$(BIN)/python -m pytest -m long

older: $(VENV)/installed
	$(BIN)/python .ci/old_transformers.py check

site: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
