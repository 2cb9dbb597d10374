# `make demo` and `make test` need Python >= 3.10 and make; they install the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-faults lint clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/installed
	bash recipes/shapes.sh

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal \
		-m "not slow and (not faults or smoke)"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

test-faults: .venv/installed
	$(BIN)/python -m pytest -m faults tests/test_faults.py tests/test_two_nodes.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info
