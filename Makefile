# Everything a contributor runs. PYTHON=python3.12 picks the interpreter that makes .venv
# (`make clean` first when one is there already).

PYTHON ?= python3
VENV := .venv
export PYTHON VENV
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
IN_VLLM := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-vllm/bin/python
# healing.py trains for hours, buy.py reads what others measured, refit_time.py wants a model: by hand
BENCHMARKS := $(filter-out benchmarks/healing.py benchmarks/buy.py benchmarks/refit_time.py benchmarks/_% benchmarks/vllm_%,$(sort $(wildcard benchmarks/*.py)))

# Without bytecode on disk every process that imports torch would compile it anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-engines test-gguf test-vllm test-stock test-sglang test-real lint fuzz load kill mutants versions lock dist bench docs clean compiler vllm-parts

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# PASSIVE: on a busy machine threads that spin take the cores from those they wait for, for minutes
demo: $(VENV)/.core ## convert and measure the bundled model (core dependencies only)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/abreast demo

test: compiler $(VENV)/.browser ## run all tests, those against real engines included
	$(PYTEST)
	@$(MAKE) --no-print-directory test-engines

test-fast: $(VENV)/.dev ## run the tests that are not marked slow
	$(PYTEST) -m "not slow"

test-engines: test-gguf test-vllm test-stock test-sglang ## run the tests against real engines

test-gguf: .venv-gguf/.ready ## run the tests that need llama.cpp, in an environment of their own
	OMP_NUM_THREADS=1 .venv-gguf/bin/python -m pytest -n 2 tests/real_engines/test_llamacpp*.py

test-vllm: .venv-vllm/.ready ## run the tests that need vLLM, in an environment of their own
	$(IN_VLLM) -m pytest tests/real_engines/test_vllm*.py tests/real_engines/test_transformers_serve.py

test-stock: $(VENV)/.dev .venv-vllm/.ready .venv-mlx/.ready ## run the tests in vLLM and mlx-lm without abreast
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real_engines/test_stock.py tests/real_engines/test_mlx.py

test-sglang: $(VENV)/.dev .venv-sglang/.ready ## compare what our models use with SGLang's own source
	$(BIN)/python -m pytest tests/real_engines/test_sglang_source.py

test-real: $(VENV)/.dev .venv-gguf/.ready .venv-vllm/.ready .venv-mlx/.ready ## run the tests on two real models, which it downloads once (330 MB)
	$(PYTEST) --dist loadgroup tests/real_models --ignore-glob='*_llamacpp.py'
	OMP_NUM_THREADS=1 .venv-gguf/bin/python -m pytest -n 2 tests/real_models/*_llamacpp.py tests/real_models/*_tokens.py

lint: $(VENV)/.dev ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

MINUTES ?= 10
fuzz: $(VENV)/.dev ## hand damaged files to the command for MINUTES (10)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --minutes $(MINUTES) --record

load: .venv-vllm/.ready ## send mixed traffic to vLLM's server for MINUTES (10)
	$(IN_VLLM) tests/real_engines/load.py --minutes $(MINUTES) --record

N ?= 200
kill: $(VENV)/.dev ## kill and starve the verbs N (200) times, and run them again
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/kill.py -n $(N) --record

mutants: $(VENV)/.dev ## change one place of the code at a time, 400 times, and see whether tests notice
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/mutants.py -n 400 --seed 1 --record

# The tests that touch most of torch and transformers: every family converted, run and healed.
CORE_TESTS := tests/convert/test_parity.py tests/model/test_grouped.py tests/heal tests/engines/test_torch_tp.py
versions: ## run the core of the tests with the oldest and the newest torch and transformers (10 GB of disk)
	@scripts/need.sh python
	@set -e; for versions in "torch==2.11.* transformers==5.17.*" "torch transformers"; do \
	  rm -rf .venv-versions; "$(PYTHON)" -m venv .venv-versions; \
	  .venv-versions/bin/python $(INSTALL) -e '.[heal,report]' $$versions pytest hypothesis; \
	  echo "== $$versions"; \
	  OMP_NUM_THREADS=1 .venv-versions/bin/python -m pytest -m "not slow" $(CORE_TESTS); \
	done; rm -rf .venv-versions

lock: ## write locks/ anew, after a change of constraints.txt or pyproject.toml
	scripts/lock.sh

dist: $(VENV)/.dev ## build sdist and wheel into dist/, twice, and compare
	$(BIN)/python $(INSTALL) hatchling -c constraints.txt
	rm -rf dist build/dist
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/python -m hatchling build -d build/dist
	diff -r dist build/dist

bench: $(VENV)/.dev .venv-vllm/.ready .venv-mlx/.ready ## run the scripts in benchmarks/ but healing.py
	@test -n "$(BENCHMARKS)" || { echo "benchmarks/ holds no scripts" >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done
	@set -e; for script in $(wildcard benchmarks/vllm_*.py); do \
	  echo "== $$script"; $(IN_VLLM) $$script; done

docs: $(VENV)/.dev ## build the site into site/; read it at site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the virtual environments, build outputs and caches
	rm -rf $(VENV) .venv-gguf .venv-vllm .venv-mlx .venv-versions .venv-sglang build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts examples -type d -name __pycache__ -prune -exec rm -rf {} +

# .core and .dev are stamps: the environment is brought up to date when what it should hold changes.
# The modules that a run imports are compiled then; compiling all of them here would take a minute.
INSTALL := -m pip --disable-pip-version-check install --no-compile

$(VENV)/.core: pyproject.toml constraints.txt
	@scripts/need.sh python
	@echo "installing PyTorch, transformers and their like into $(VENV): 1 to 5 minutes the first time and"
	@echo "1 GB of disk, or several with PyTorch's build for CUDA (constraints.txt says how to avoid it)"
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python $(INSTALL) "pip>=22.3"
	$(BIN)/python $(INSTALL) -e . -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python $(INSTALL) -e ".[dev]" -c constraints.txt
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	@scripts/need.sh browser
	@touch $@

compiler:
	@scripts/need.sh compiler

vllm-parts:
	@scripts/need.sh vllm

.venv-gguf/.ready: pyproject.toml constraints.txt tests/real_engines/llamacpp.txt | compiler
	@scripts/need.sh python
	"$(PYTHON)" -m venv .venv-gguf
	.venv-gguf/bin/python $(INSTALL) "pip>=23.1"
	.venv-gguf/bin/python $(INSTALL) -e . -r tests/real_engines/llamacpp.txt -c constraints.txt
	@touch $@

.venv-mlx/.ready: tests/real_engines/mlx.txt
	@scripts/need.sh python
	"$(PYTHON)" -m venv .venv-mlx
	.venv-mlx/bin/python $(INSTALL) -r tests/real_engines/mlx.txt
	@touch $@

# Without what it depends on, which needs CUDA: its source is read, not run.
.venv-sglang/.ready: tests/real_engines/sglang.txt | $(VENV)/.core
	rm -rf .venv-sglang
	$(BIN)/python $(INSTALL) --no-deps --target .venv-sglang -r tests/real_engines/sglang.txt
	@touch $@

# The packages taken out are builds for CUDA and break `import transformers` on a CPU.
.venv-vllm/.ready: pyproject.toml tests/real_engines/vllm.txt | compiler vllm-parts
	@scripts/need.sh python
	"$(PYTHON)" -m venv .venv-vllm
	.venv-vllm/bin/python $(INSTALL) "pip>=22.3"
	.venv-vllm/bin/python $(INSTALL) -r tests/real_engines/vllm.txt
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec triton
	.venv-vllm/bin/python $(INSTALL) --no-deps -e .
	@touch $@
