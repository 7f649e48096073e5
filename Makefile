# Two commands: `make demo` and `make test`. Both first make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[test]'
	touch $@

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests

clean:
	rm -rf .venv output_dir *.egg-info
