# Everything runs in .venv, made from constraints.txt with pip on the first call.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test check format bench clean
.DELETE_ON_ERROR:

demo: .venv/.ready            ## the main job, end to end, on simulated studies
	$(BIN)/scviaduct demo --out demo

test: .venv/.ready-test       ## all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: .venv/.ready-dev       ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: .venv/.ready-test      ## training speed beside scvi-tools, interleaved in one process
	$(BIN)/python benchmarks/train_speed.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.ready: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.ready-test: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[test]
	touch $@

.venv/.ready-dev: .venv/.ready-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev]
	touch $@

clean:
	rm -rf .venv demo
