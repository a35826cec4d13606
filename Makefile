# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up
NATIVE := CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test lint format bench clean

demo: $(SETUP)
	$(BIN)/spnet demo

test: lint
	$(BIN)/python -m pytest

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(NATIVE))

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu,$(NATIVE))

bench: $(SETUP)
	$(BIN)/python -m pytest bench/ --benchmark-only

$(SETUP): pyproject.toml constraints.txt setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info spnet/_core*.so
