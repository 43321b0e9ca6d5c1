PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: quickstart test test-oldest docs clean

quickstart: $(VENV)/recipes.stamp
	$(BIN)/python -m recipes.quickstart

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/python -m pytest -n 2

# The library's tests with the oldest releases that pyproject.toml allows, in an environment of their own; those of
# recipes and pages are not among them.
test-oldest: $(OLDEST)/dev.stamp
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(OLDEST)/bin/python -m pytest -n 2 tests --ignore tests/recipes --ignore tests/docs

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/recipes.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[recipes]"
	touch $@

$(VENV)/docs.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

$(OLDEST)/dev.stamp: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c .ci/oldest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST)
