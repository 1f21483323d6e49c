# The commands that people and CI share. Everything is installed into .venv; a stamp file there says from which
# requirements, so that a second run installs nothing.

PYTHON ?= python3
BIN := .venv/bin
# pip compiles one module after the other, for longer than it installs: all processors do that afterwards. Some packages
# have files for other versions of Python, which cannot be compiled.
INSTALL := $(BIN)/pip install --disable-pip-version-check --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
PROTO := splitlearn/wire/trunk.proto splitlearn/wire/directory.proto

.DELETE_ON_ERROR:
.PHONY: help install run test test-compose test-clients test-engines test-ray check proto docs screenshots bench clean weights chromium-headless-shell iptables

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

install: weights ## make .venv with the pinned requirements, fetch and convert the default weights

run: weights ## install, then open the page on http://127.0.0.1:7860
	$(BIN)/python app.py --config config.yaml

# Bytecode is kept whatever the environment says: tests start many interpreters, and each would compile the project anew.
test: .venv/installed-test weights chromium-headless-shell ## install what the tests need, and run them
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

test-compose: .venv/installed-test chromium-headless-shell iptables ## build the images and bring the compose file up for real (minutes)
	$(BIN)/python -m pytest tests/e2e/test_compose.py -m compose -rs

test-clients: .venv/installed-test weights ## run other people's OpenAI clients against splitlearn serve (minutes)
	$(BIN)/python -m pytest tests/openai_api/clients -m clients -n 0 -rs

test-engines: .venv/installed-test ## run all families on the engines beside torch (minutes)
	$(BIN)/python -m pytest tests/engines -m engines -n 2

test-ray: .venv-ray/installed weights ## run trunk servers on a Ray of the tests' own (minutes)
	.venv-ray/bin/python -m pytest tests/ray -m ray -n 0 -rs

check: .venv/installed-test ## lint, types, import direction, container files, generated files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_setup.py tests/e2e/test_compose.py

proto: .venv/installed-test ## generate the wire protocol's Python code from the proto files
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(PROTO)

docs: .venv/installed ## generate docs/flags.md (docs/families.md: python -m splitlearn.stages.equivalence, minutes)
	$(BIN)/python -m splitlearn flags --markdown >docs/flags.md

screenshots: .venv/installed-test weights chromium-headless-shell ## take the pictures of docs/tour.md from the running page (minutes)
	$(BIN)/python -m tests.support.screenshots

bench: .venv/installed-bench weights ## the side-by-side measurements of bench/
	$(BIN)/python -m bench

clean: ## remove .venv and what the tools left; the weights in the cache folder stay
	rm -rf .venv .venv-ray .mypy_cache .ruff_cache .pytest_cache .hypothesis .gradio test-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

weights: .venv/installed
	@$(BIN)/python -m splitlearn fetch

.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on the PATH; set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V); Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian, install the package python3-venv" >&2; exit 1; }

.venv/installed: requirements.txt | .venv/bin/pip
	$(INSTALL) -r requirements.txt
	@$(COMPILE)
	@touch $@

.venv/installed-test: requirements-test.txt requirements-onnx.txt requirements-jax.txt .venv/installed
	$(INSTALL) -r requirements.txt -r requirements-test.txt
	@$(COMPILE)
	@touch $@

# Ray in an environment beside the other, which sees what is installed there.
.venv-ray/installed: requirements-ray.txt .venv/installed-test
	$(PYTHON) -m venv .venv-ray
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(.venv-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	.venv-ray/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@

.venv/installed-bench: bench/requirements.txt .venv/installed-test
	$(INSTALL) -r $<
	@$(COMPILE)
	@touch $@

# Debian's packages. What needs them skips, saying so, where they cannot be had.
chromium-headless-shell iptables:
	@command -v $@ >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $@; } || \
	  echo "no $@ here, and it cannot be installed by this user: the tests that need it will be skipped" >&2
