# make train   sets up .venv, builds, trains:  make train ARGS="--depth 56 --recipe paper2015"
# make test    sets up .venv, builds, runs the tests
# make mutation  breaks the engine in many places, one at a time, and counts what the tests notice (half an hour)
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: train test sanitize soak mutation lint build clean

train: .venv/plot.stamp
	$(BIN)/python examples/cifar_resnet.py $(ARGS)

test: .venv/test.stamp
	$(BIN)/python -m pytest -q $(ARGS)

sanitize: .venv/test.stamp .venv/dev.stamp
	tests/sanitize/run $(BIN)/python

soak: .venv/test.stamp  # long runs, about ten minutes
	$(BIN)/python tests/soak.py --json benchmarks/results/soak.json

mutation: .venv/test.stamp .venv/dev.stamp
	$(BIN)/python tests/mutation/run.py --json benchmarks/results/mutation.json $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

build: .venv/dev.stamp  # a wheel and a source distribution in dist/
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info tinyres/*.so

# Installs the package in place with the extra plot, test or dev; again only if the extension may have changed.
.venv/%.stamp: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
