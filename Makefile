# Two commands do it all: `make book` builds the book, `make test` checks it. `make help` lists the rest.

# The Python that makes .venv, and the extra package index for PyTorch's CPU or CUDA build (see README.md).
PYTHON ?= python3
TORCH_INDEX ?=

# Relative paths only, and always `python -m`: both work from a folder whose name has spaces.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.rlbook-stamp
BENCH := .venv-bench
# Peers of the sum tree: single files of them are read, so nothing that they depend on is needed.
TREES := agilerl==2.58.0 dopamine-rl==4.1.2
EXTRAS := atari,book,test
# The notebooks run in a copy, so that what they write stays out of chapters/.
COPY := _build/check

# The kernel of .venv wins over kernels of the user; nothing but our own output on the screen.
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONUTF8 := 1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0

.DEFAULT_GOAL := help
.PHONY: book test check setup lab chapters bench wheel constraints proto clean help

book: $(STAMP) ## build the book (executes only chapters whose stored outputs are stale)
	@$(PY) -m tools.book build

test: $(STAMP) ## everything that CI runs: style, types, tests, notebooks, site, links, offline
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m tools.book stale
	@$(PY) -m tools.browser
	@rm -rf $(COPY) && mkdir -p $(COPY) && cp -R chapters $(wildcard results) $(COPY)
	@$(PY) -m pytest -q --nbval-lax --nbval-current-env tests $(COPY)/chapters

check: $(STAMP) ## the quick part of `make test`: style, types and tests without notebooks and site
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m pytest -q -m "not slow and not site" tests

setup: $(STAMP) ## make .venv from pyproject.toml and constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rlbook needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Install a newer one and name it: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "setting up .venv (the first time downloads PyTorch and Ray; README.md says how much)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

lab: $(STAMP) ## open JupyterLab on the chapters
	@$(PY) -m jupyterlab chapters

chapters: $(STAMP) ## execute every chapter and store its outputs (NAMES="03_dqn 02_td" for some)
	@$(PY) -m tools.book chapters $(NAMES)

bench: $(STAMP) $(BENCH)/.rlbook-stamp ## measure against stable-baselines3, RLlib and the physical limit
	@$(PY) -m benchmarks

$(BENCH)/.rlbook-stamp: pyproject.toml constraints.txt | $(STAMP)
	@echo "setting up $(BENCH) for the peers"
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	@grep -v '^gymnasium==' constraints.txt > $(BENCH)/constraints.txt
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -c $(BENCH)/constraints.txt \
	  -e ".[bench]"
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(TREES)
	@touch $@

wheel: $(STAMP) ## build the package's wheel into dist/
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

constraints: $(STAMP) ## write constraints.txt from what .venv holds now
	@$(PY) -m tools.pins

proto: $(STAMP) ## write the code of SEED's messages from rlbook/plumbing/seed.proto
	@$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. rlbook/plumbing/seed.proto

clean: ## remove what was built (.venv stays)
	@rm -rf _build build dist

help: ## list the targets
	@echo "make book   builds the book;  make test   checks everything;  in full:"
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
