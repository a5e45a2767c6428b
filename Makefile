# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Two processes; a file stays in one of them.
SHARE = -n 2 --dist loadfile

.PHONY: demo test launch slow trained long oldest older lint site

demo: $(VENV)/installed
	$(BIN)/phigrow demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

launch: $(VENV)/installed
	$(BIN)/python -m pytest -m "launch and not slow and not long" $(SHARE)

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not launch and not long" $(SHARE)

# Both in one call: while one process waits for two ranks, the other goes on.
trained: $(VENV)/installed
	$(BIN)/python -m pytest -m "(launch or slow) and not long" $(SHARE)

long: $(VENV)/installed
	$(BIN)/python -m pytest -m long

# With the versions of constraints-oldest.txt, in an environment of their own.
oldest: $(VENV)/installed
	$(BIN)/python .ci/oldest.py check

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
