# Every target makes .venv and installs first, where that is missing or pyproject.toml is newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is imported first is compiled and kept. Where that is forbidden, as in many containers, every process that starts
# compiles all of torch anew: 14 s of CPU time each.
export PYTHONDONTWRITEBYTECODE :=
INSTALLED := $(VENV)/.installed

.PHONY: install train test test-unit test-gpu lint format reference docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -e '.[dev]'
	touch $@

train: $(INSTALLED)            ## train the handwritten digits
	$(BIN)/accelerate launch train.py --config configs/digits.yaml

test: $(INSTALLED)             ## every tier that this machine allows; the rest is skipped with a reason
	$(BIN)/python -m pytest -m unit --numprocesses logical --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest tests/cluster --numprocesses logical --maxprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/dist -m "not alone" --numprocesses logical --maxprocesses 2 --dist loadfile
	$(BIN)/python -m pytest tests/dist tests/gpu -m "alone or gpu"

test-unit: $(INSTALLED)        ## the quick tier
	$(BIN)/python -m pytest -m unit

test-gpu: $(INSTALLED)         ## the tier that needs a GPU
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)             ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: $(INSTALLED)        ## write configs/schema.json and docs/config.md anew
	$(BIN)/python -m trainer schema > configs/schema.json
	$(BIN)/python -m trainer reference > docs/config.md

docs: $(INSTALLED)             ## the site of these pages, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml

clean:
	rm -rf $(VENV) build runs .mypy_cache .pytest_cache .ruff_cache *.egg-info
