# Each target does all its set-up; nothing but make is asked of the machine beforehand.
#   make env    .venv with everything pinned, and the C++ extension
#   make demo   post-train a policy inside a learned world, and say where the report is
#   make libero LIBERO beside it: packages, assets, one frame of each suite as proof (docs/libero.md)
#   make test   lint, types, C++ tests, Python tests: 15 to 30 minutes on two cores, by how fast these are
#   make check  what takes longer: sanitizers, slow tests, plans for GPUs by TensorRT for RTX (which it installs into build/);
#               LIBERO's tests where WORLDENV_LIBERO_ASSETS is set
#   make gpu    on a machine with an NVIDIA GPU and its own torch: build, test, measure. It stops after 9 minutes, with exit code 1
#               where parts are left: then again with ARGS=--resume (or ARGS="--only vae")

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: env libero demo test check gpu lint test-cpp test-python

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(shell find csrc -name '*.hpp' -o -name '*.cpp')
RUN := runs/tiny
RTX := build/tensorrt-rtx
# a process for each core, up to four; files in the order of tests/conftest.py, the longest first. Each has one thread, as has what it starts: on two
# cores, two processes of two threads took more than twice as long
APART := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# where there is no .venv, the machine's own: a GPU machine brings its torch
GPU_PYTHON := $(firstword $(wildcard $(BIN)/python) python3)
# an editable install knows the packages that there were when it was made
PACKAGES := $(wildcard worldenv/*/__init__.py worldenv/*/*/__init__.py)

env: $(VENV)/extension.stamp

$(VENV)/packages.stamp: constraints.txt pyproject.toml .ci/system-packages
	@python=$$(.ci/system-packages); [ -x $(BIN)/pip ] || "$$python" -m venv --clear $(VENV)
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print("pip", *p["build-system"]["requires"], *p["project"]["dependencies"], *p["project"]["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(PIP) install -q -c constraints.txt pip
	$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt
	touch $@

$(VENV)/extension.stamp: $(VENV)/packages.stamp CMakeLists.txt $(filter-out csrc/tests/%,$(CPP)) $(PACKAGES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

# LIBERO and robosuite declare packages that would replace torch and OpenCV, and that they do not import: they come without, and the extra has the rest
$(VENV)/libero.stamp: $(VENV)/packages.stamp
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["libero"], sep="\n")' > $(VENV)/libero.txt
	$(PIP) install -q -c constraints.txt -r $(VENV)/libero.txt
	$(PIP) install -q -c constraints.txt --no-deps robosuite bddl hf-libero
	touch $@

libero: env $(VENV)/libero.stamp
	$(BIN)/worldenv-doctor --install-assets libero

demo: env
	$(BIN)/worldenv-train --preset tiny --device cpu --out $(RUN)
	@echo "report: $(CURDIR)/$(RUN)/report.html"

test: lint test-cpp test-python

lint: env
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

test-cpp: env
	$(BIN)/cmake -S . -B build/tests -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DWORLDENV_EXTENSION=OFF -DWORLDENV_TESTS=ON -DWORLDENV_WERROR=ON > /dev/null
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --output-on-failure

test-python check: export OMP_NUM_THREADS ?= 1

test-python: env
	$(BIN)/python -m pytest -q $(APART) -m "not slow and not gpu"

$(RTX)/stamp: .ci/tensorrt-rtx.txt $(VENV)/packages.stamp
	$(PIP) install -q --no-deps --upgrade --target $(RTX) -r .ci/tensorrt-rtx.txt
	touch $@

check: env $(RTX)/stamp
	.ci/sanitize address
	.ci/sanitize thread
	.ci/sanitize undefined
	[ -z "$${WORLDENV_LIBERO_ASSETS:-}" ] || $(MAKE) libero
	PYTHONPATH=$(RTX) $(BIN)/python -m pytest -q $(APART) -m "slow and not gpu"

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)
