# Everything a contributor runs. PYTHON=python3.12 picks the interpreter that makes .venv
# (`make clean` first when one is there already).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
IN_VLLM := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-vllm/bin/python
# healing.py trains for hours: run it by hand
BENCHMARKS := $(filter-out benchmarks/healing.py benchmarks/_% benchmarks/vllm_%,$(sort $(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-engines test-gguf test-vllm lint bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.core ## convert and measure the bundled model (core dependencies only)
	$(BIN)/abreast demo

test: $(VENV)/.browser ## run all tests, those against real engines included
	$(PYTEST)
	@$(MAKE) --no-print-directory test-engines

test-fast: $(VENV)/.dev ## run the tests that are not marked slow
	$(PYTEST) -m "not slow"

test-engines: test-gguf test-vllm ## run the tests against real engines

test-gguf: .venv-gguf/.ready ## run the tests that need llama.cpp, in an environment of their own
	OMP_NUM_THREADS=1 .venv-gguf/bin/python -m pytest tests/real_engines/test_llamacpp.py

test-vllm: .venv-vllm/.ready ## run the tests that need vLLM, in an environment of their own
	$(IN_VLLM) -m pytest tests/real_engines/test_vllm*.py tests/real_engines/test_transformers_serve.py

lint: $(VENV)/.dev ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.dev .venv-vllm/.ready ## run the scripts in benchmarks/ but healing.py
	@test -n "$(BENCHMARKS)" || { echo "benchmarks/ holds no scripts" >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done
	@set -e; for script in $(wildcard benchmarks/vllm_*.py); do \
	  echo "== $$script"; $(IN_VLLM) $$script; done

docs: $(VENV)/.dev ## build the site into site/; read it at site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the virtual environments, build outputs and caches
	rm -rf $(VENV) .venv-gguf .venv-vllm build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts examples -type d -name __pycache__ -prune -exec rm -rf {} +

# .core and .dev are stamps: the environment is brought up to date when what it should hold changes.
# torch comes first and alone: whatever a later package would accept, the pinned build is in place.
$(VENV)/.core: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.10 or newer, or run: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is older than Python 3.10; run: make PYTHON=/path/to/a/newer/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: its ensurepip module is missing." >&2; \
	  echo "On Debian or Ubuntu: apt install python3-venv; elsewhere: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) install "pip>=22.3"
	$(PIP) install torch -c constraints.txt
	$(PIP) install -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -e ".[dev]" -c constraints.txt
	@touch $@

# The pages are tested in a real browser: the machine's own, else one that playwright fetches.
$(VENV)/.browser: $(VENV)/.dev
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  command -v google-chrome >/dev/null || $(BIN)/python -m playwright install --only-shell chromium || { \
	  echo "the tests of the HTML pages need a browser (on Debian: apt install chromium);" >&2; \
	  echo "make test-fast runs without one" >&2; exit 1; }
	@touch $@

# llama.cpp's quantiser comes as source only (see the file), and vLLM compiles its graphs.
define need_compiler
@command -v c++ >/dev/null || { \
  echo "the tests against real engines need a C++ compiler (on Debian or Ubuntu: apt install g++);" >&2; \
  echo "make test-fast runs without one" >&2; exit 1; }
endef

.venv-gguf/.ready: pyproject.toml constraints.txt tests/real_engines/llamacpp.txt
	$(need_compiler)
	"$(PYTHON)" -m venv .venv-gguf
	.venv-gguf/bin/python -m pip --disable-pip-version-check install "pip>=23.1"
	.venv-gguf/bin/python -m pip --disable-pip-version-check install torch -c constraints.txt
	.venv-gguf/bin/python -m pip --disable-pip-version-check install -e . -r tests/real_engines/llamacpp.txt -c constraints.txt
	@touch $@

# The packages taken out are builds for CUDA and break `import transformers` on a CPU.
.venv-vllm/.ready: pyproject.toml tests/real_engines/vllm.txt | $(VENV)/.core
	$(need_compiler)
	"$(PYTHON)" -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install "pip>=22.3"
	.venv-vllm/bin/python -m pip --disable-pip-version-check install -r tests/real_engines/vllm.txt
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec triton
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --no-deps -e .
	@touch $@
