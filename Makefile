# Two commands set everything up: `make demo` and `make test`. `make test-vision` takes several GB more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up
VISION := .venv-vision
NATIVE := CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test test-vision lint format bench clean

demo: $(SETUP)
	$(BIN)/spnet demo

test: lint
	$(BIN)/python -m pytest

test-vision: $(VISION)/.set-up
	$(VISION)/bin/python -m pytest tests/vision tests/models tests/execution tests/test_api.py tests/test_routing.py

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

# Networks of others, on the newest torch that spnet is known to work with.
$(VISION)/.set-up: pyproject.toml constraints.txt constraints-vision.txt setup.py $(NATIVE)
	$(PYTHON) -m venv $(VISION)
	grep -v '^torch==' constraints.txt > $(VISION)/constraints.txt
	$(VISION)/bin/pip install --quiet --disable-pip-version-check --constraint $(VISION)/constraints.txt \
	    --constraint constraints-vision.txt --editable '.[test,vision,hub]' timm
	touch $@

clean:
	rm -rf $(VENV) $(VISION) build *.egg-info spnet/_core*.so
