# make serve    install into .venv and serve the bundled demo model on http://localhost:8000;
# make serve MODEL=path/to/checkpoint PORT=9000 HOST=0.0.0.0    another model, port, address
# make serve ARGS='--kv f16 --max-num-seqs 8'    any options of nibble serve
# make test     install into .venv and run the whole gate
# make check    the gate alone: format, lint, types, imports, tests
# make demo-monitoring    the demo model under load, watched by a Prometheus of this machine: do all panels show data?

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL ?=
PORT ?=
ARGS ?=
NATIVE := $(wildcard kernels/native/*.cpp kernels/native/*.hpp kernels/native/simd/*.hpp kernels/native/CMakeLists.txt)

.DEFAULT_GOAL := help
.PHONY: help install serve test check demo-monitoring format clean again

# Nothing is taken and ignored: what is set behind make is one of these.
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out PYTHON VENV MODEL PORT HOST ARGS,$(GIVEN))
$(if $(UNKNOWN),$(error make knows no $(UNKNOWN): MODEL, PORT, HOST, or ARGS='any options of nibble serve'))

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(firstword $(MAKEFILE_LIST))

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# What pip would install with Nibble; on its own, so that each of the two long phases can be announced.
NEEDS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; x = p["optional-dependencies"]; \
	print(*p["dependencies"], *x["dev"], *x["demo"], sep="\n")

# An install that found no compiler left the C++ kernels out: it is done again once there is one.
BUILT := $(wildcard $(VENV)/lib/*/site-packages/kernels/native/_native*)
AGAIN := $(if $(BUILT),,$(if $(shell command -v c++),again))
again:

$(INSTALLED): pyproject.toml constraints.txt $(NATIVE) $(AGAIN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Nibble needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "1 of 2: downloading and installing PyTorch and the other packages into $(VENV); this can take minutes"
	@$(BIN)/python -c '$(NEEDS)' > $(VENV)/needs.txt
	$(PIP) --requirement $(VENV)/needs.txt
	@echo "2 of 2: compiling the C++ kernels and installing Nibble; this takes about a minute on two cores"
	$(PIP) --editable '.[dev,demo]'
	@$(BIN)/python -c 'from kernels import native; print(native.MISSING or "C++ kernels: " + str(native.isa()))'
	touch $@

install: $(INSTALLED)

# HOST counts behind make alone: shells and compilers put another meaning into the environment.
serve: install
	$(BIN)/nibble serve $(if $(MODEL),'$(MODEL)') $(if $(PORT),--port $(PORT)) $(if $(filter command,$(origin HOST)),--host $(HOST)) $(ARGS)

test: install check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml
	$(BIN)/pytest

demo-monitoring: install
	$(BIN)/python -m benchmarks.monitoring

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
