# `make demo`, `make app`, `make test` and `make test-slow`. All first create .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo app test test-slow clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/python main_mar.py --preset digits --output_dir output_dir/digits
	$(BIN)/python -m demo.digits --ckpt output_dir/digits/checkpoint-last.pth

.venv/app: .venv/installed
	$(BIN)/pip install -e '.[app]'
	touch $@

# a page of the demo's model, in the browser
app: .venv/app
	$(BIN)/python -m demo.app

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests

# what takes more than about ten seconds, most of it in several processes
test-slow: .venv/installed
	$(BIN)/python -m pytest tests -m slow

clean:
	rm -rf .venv output_dir *.egg-info
