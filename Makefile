# Every target does its own set-up in .venv and starts at once when that is done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes or test workers share the cores: more threads each would only slow them down.
TEST_WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup quickstart teacher study test test-all unit lint format docs faults attacks bench clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.installed ## install everything into .venv

$(VENV)/.installed: pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $@

data/scenes/dataset.json: $(VENV)/.installed
	$(BIN)/mmkd data build scenes --out data/scenes --seed 0

quickstart: data/scenes/dataset.json ## distil a student from the shipped teacher, score it, report
	$(BIN)/mmkd run configs/quickstart.yaml

teacher: $(VENV)/.installed ## train the shipped teacher again (an hour or two on 2 cores)
	$(BIN)/mmkd data build scenes --out data/scenes_teacher --seed 1000 --train 24000
	$(BIN)/mmkd run configs/scenes/teacher.yaml
	$(BIN)/python -m scripts.ship_teacher runs/scenes-teacher assets/scenes_teacher

study: data/scenes/dataset.json ## KD against CE over three seeds
	$(BIN)/mmkd run configs/scenes/study.yaml

lint: $(VENV)/.installed ## style, types, import walls
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

test: $(VENV)/.tested ## lint, types, unit tests and one run from start to end
	$(MAKE) --no-print-directory -j 2 lint unit

test-all: $(VENV)/.tested ## the same with further engines, launchers and numbers of processes
	$(MAKE) --no-print-directory -j 2 lint unit CASES="slow or not slow"

CASES ?= not slow
unit: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "$(CASES)"

docs: $(VENV)/.documents ## build the documentation into site/
	$(BIN)/python -m scripts.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.documents: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

faults: $(VENV)/.installed ## kill runs a hundred times at random moments (twenty minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m "slow or not slow"
	$(BIN)/python tests/faults/kills.py --kills 110 --json runs/faults.json

MINUTES ?= 10
SEED ?= 0
attacks: $(VENV)/.tested ## spoil recipes, data and folders by chance, for MINUTES=10 from SEED=0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/attacks
	$(BIN)/python -m scripts.attacks --minutes $(MINUTES) --seed $(SEED)

bench: data/scenes/dataset.json ## time and memory of all parts (an hour); peers where installed
	$(BIN)/python -m benchmarks.divergence --json runs/bench/divergence.json
	$(BIN)/python -m benchmarks.scan --json runs/bench/scan.json
	$(BIN)/python -m benchmarks.decode --json runs/bench/decode.json
	$(BIN)/python -m benchmarks.moe --json runs/bench/moe.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.engine --json runs/bench/engine.json
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 \
		-m benchmarks.engine --json runs/bench/engine-2.json
	$(BIN)/python -m benchmarks.engine_losses --json runs/bench/engine_losses.json
	$(BIN)/python -m benchmarks.scaling --json runs/bench/scaling.json
	$(BIN)/python -m benchmarks.step --json runs/bench/step.json
	$(BIN)/python -m benchmarks.cache --json runs/bench/cache.json
	$(BIN)/python -m benchmarks.packing --json runs/bench/packing.json
	$(BIN)/python -m benchmarks.cache_formats --json runs/bench/cache_formats.json
	$(BIN)/python -m benchmarks.images --json runs/bench/images.json
	$(BIN)/python -m benchmarks.twins --json runs/bench/twins.json

clean: ## remove runs and built data
	rm -rf runs data/scenes data/scenes_teacher
