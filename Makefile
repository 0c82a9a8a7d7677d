# Everything a newcomer needs: `make demo`. Everything a developer needs: `make test`. Both do their own set-up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TOOLS  := $(VENV)/.installed-dev
OUT    ?= out/demo
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help setup gl browser demo play test lint mini mini-worlds mini-base mini-control mini-episodes mini-tabletop figures clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Virtual environment in .venv with the pinned packages
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Orrery needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sim,control,play]'
	@touch $@

$(TOOLS): $(STAMP)  # what the tests need beyond that
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

gl: $(STAMP)  # a software OpenGL for the simulator's cameras, where the machine has none
	@$(BIN)/python scripts/headless_gl.py

browser: $(TOOLS)  # a Chromium for the tests of the page of `orrery play`, where the machine has none
	@$(BIN)/python scripts/headless_browser.py

demo: $(STAMP) gl  ## Three generated worlds (text, image, video start); the last beside what MuJoCo did
	$(BIN)/orrery demo -o $(OUT)

play: $(STAMP) gl  ## Drive a robot in a page of your browser: the world model beside MuJoCo
	$(BIN)/orrery play

test: $(TOOLS) lint gl browser  ## Everything CI checks: style, types, floors, tests (a process a core, one thread each)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

lint: $(TOOLS)  ## Style, types, and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

DROP_CLIPS ?= 9000
PUSH_CLIPS ?= 15000
TABLE_CLIPS ?= 1600
EPISODES   ?= 2301
SIM        := $(BIN)/orrery sim
SIM_INTO   := --workers $(WORKERS) -o data/mini
CONTROL    := $(BIN)/orrery train recipes/mini-control.toml

mini: mini-base mini-control mini-tabletop  ## Train the models that ship again from nothing (hours without a GPU; resumable)
	$(BIN)/python benchmarks/model_card.py --stages

mini-worlds: $(STAMP) gl
	$(SIM) drop --clips $(DROP_CLIPS) $(SIM_INTO)
	$(SIM) push --clips $(PUSH_CLIPS) $(SIM_INTO)
	$(SIM) drop --seed 1000000 --clips 240 $(SIM_INTO)
	$(SIM) push --seed 1000000 --clips 160 $(SIM_INTO)
	$(SIM) tabletop --clips $(TABLE_CLIPS) --frames 33 --without depth $(SIM_INTO)
	$(SIM) tabletop --seed 1000000 --clips 64 --frames 33 --without depth $(SIM_INTO)

mini-base: mini-worlds  ## Its VAE, transformer and preview decoder
	$(BIN)/orrery train recipes/mini-vae.toml
	$(BIN)/orrery train recipes/mini-dit.toml
	$(BIN)/orrery train recipes/mini-dit.toml --export src/orrery/weights/mini
	cp runs/mini-vae/log.jsonl benchmarks/results/mini_vae_log.jsonl
	cp runs/mini-dit/log.jsonl benchmarks/results/mini_dit_log.jsonl
	$(BIN)/orrery train recipes/mini-preview.toml
	$(BIN)/orrery train recipes/mini-preview.toml --export src/orrery/weights/mini

mini-control: mini-worlds  ## Its control branches, beside the transformer in the package
	for kind in edge blur depth seg; do \
	  set -- --set control.kind=$$kind --set out=runs/mini-$$kind; \
	  $(CONTROL) "$$@" && $(CONTROL) "$$@" --export src/orrery/weights/mini || exit 1; \
	done

mini-episodes: $(STAMP) gl
	$(SIM) tabletop --clips $(EPISODES) --frames 65 --without depth,segmentation --workers $(WORKERS) -o data/tabletop
	$(SIM) tabletop --seed 1000000 --clips 96 --frames 65 --without depth,segmentation --workers $(WORKERS) -o data/tabletop

mini-tabletop: mini-episodes  ## Its transformer post-trained on a robot's actions
	$(BIN)/orrery train recipes/mini-tabletop.toml
	$(BIN)/orrery train recipes/mini-tabletop.toml --export src/orrery/weights/tabletop

# What was drawn or judged for one set of weights is kept under runs/, so that a killed run goes on.
FIGURES := mini_quality acting control_fidelity judge sim2real imagine drift knee environment ladder mini_curve
figures: $(TOOLS) gl  ## Every figure of the shipped models again, and their cards (two hours of a core)
	for each in $(FIGURES); do OMP_NUM_THREADS=2 $(BIN)/python benchmarks/$$each.py || exit 1; done
	$(BIN)/python benchmarks/model_card.py

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
