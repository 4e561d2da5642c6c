PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train test lint format

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Generate rows with a known best AUC, train full tables and ROBE on them, compare.
train: setup
	$(BIN)/python -m benchmarks.demo --output runs/demo

# Each worker computes on one thread: as many workers as cores already.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
