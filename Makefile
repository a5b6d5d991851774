# `make` lists what can be made. Results are stamps in .build, never tracked files: a fresh clone makes everything.

PROFILE ?= paper
SET ?=
PARAMETERS ?=

# --- Environment: PYTHON as it is, else conda's kind into .conda, else .venv ---
ifeq ($(origin PYTHON),undefined)
CONDA := $(firstword $(foreach tool,micromamba mamba conda,$(if $(shell command -v $(tool) 2>/dev/null),$(tool))))
PREFIX := $(if $(CONDA),.conda,.venv)
PYTHON := $(PREFIX)/bin/python
# The compiled engine comes with the environment where there is a compiler; results do not depend on it.
ENGINE := $(if $(shell command -v $${CXX:-c++} 2>/dev/null),.build/engine/up-to-date)
ENVIRONMENT := $(PREFIX)/.up-to-date
else ifneq ($(filter-out help clean distclean,$(MAKECMDGOALS)),)
LACKS := $(shell $(PYTHON) -c 'import importlib.util as u, sys; print(*[name for name in sys.argv[1:] if not u.find_spec(name)])' \
  torch torchvision jupyterlab ipywidgets matplotlib papermill nbval safetensors scipy tqdm yaml 2>/dev/null || echo everything: it does not run)
ifneq ($(LACKS),)
$(error PYTHON is $(PYTHON), which lacks $(LACKS). Give it the packages of environment.yml, or leave PYTHON out and an environment is made)
endif
endif
READY := $(ENVIRONMENT) $(ENGINE)

NOTEBOOKS := $(basename $(notdir $(wildcard notebooks/*.ipynb)))
FIGURES := $(filter-out explore_% train_%,$(NOTEBOOKS))
HAVING := $(if $(filter quick,$(PROFILE)),$(FIGURES),$(basename $(notdir $(wildcard notebooks/profiles/$(PROFILE)/*.yaml))))
BUILD := .build/$(PROFILE)
CHECKED := $(BUILD)/checked
RUN = $(PYTHON) -m lib.notebooks
# Runs side by side (make -j2) share the cores: two threads each on two cores would wait for one another.
JOBS = $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS)))
SHARE = $(if $(filter -j%,$(MAKEFLAGS)),OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(n=$$(getconf _NPROCESSORS_ONLN); \
  j=$(or $(JOBS),$$n); echo $$(( n > j ? n / j : 1 )))})

# This tree's lib and this interpreter's kernel; a backend from outside would keep notebooks from drawing inline.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export JUPYTER_PREFER_ENV_PATH := 1
# GNU OpenMP's threads spin for milliseconds where they wait, which makes all ten times slower on a busy machine;
# on an idle one, small operations of stock PyTorch are a quarter slower without that, which is why `bench` goes without.
export GOMP_SPINCOUNT ?= 5000
export SET
unexport MPLBACKEND

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help figures $(FIGURES) train train-depths checkpoints sweep stack test lab report env engine bench notebooks clean distclean

help: ## This list
	@echo 'make TARGET [PROFILE=paper|released|quick] [PYTHON=interpreter to use as it is]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-22s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'One figure, for one run with other values: make NAME [SET="row=3 learning_rate=0.02"] [PARAMETERS=my.yaml]'
	@for name in $(FIGURES); do printf '  %-22s %s\n' $$name \
	  "$$(sed -n 's/^ *"# *\([^"\\]*\).*/\1/p' notebooks/$$name.ipynb | head -n 1)"; done

# --- Figures ---
figures: $(CHECKED) $(patsubst %,$(BUILD)/%.ipynb,$(filter $(HAVING),$(FIGURES))) ## Every figure of the profile, into figures/

ifneq ($(strip $(SET)$(PARAMETERS)),)
ifneq ($(filter figures test notebooks,$(MAKECMDGOALS)),)
$(error SET and PARAMETERS change one run of one figure: name it, as in make $(firstword $(FIGURES)) SET="$(SET)")
endif
$(FIGURES): | $(READY)
	@$(RUN) run $@ --profile $(PROFILE) --set "$$SET" --parameters "$(PARAMETERS)"
else
$(FIGURES): %: $(BUILD)/%.ipynb
endif

# All parameters of a profile are checked in one go before the first notebook of it runs.
$(CHECKED): $(wildcard notebooks/*.ipynb notebooks/profiles/$(PROFILE)/*.yaml lib/*.py lib/figures/*.py) | $(READY)
	@$(RUN) check --profile $(PROFILE)
	@$(PYTHON) -m lib.engine report
	@mkdir -p $(BUILD) && touch $@

# The runner writes what else a result depends on (profile, modules of lib) into the .d file beside it.
$(FIGURES:%=$(BUILD)/%.ipynb): $(BUILD)/%.ipynb: notebooks/%.ipynb | $(READY) $(CHECKED)
	@$(SHARE) $(RUN) run $* --profile $(PROFILE)
-include $(wildcard $(BUILD)/*.d)
# The claims are judged from what the other figures wrote: they come last.
ifneq ($(filter figures,$(MAKECMDGOALS)),)
$(BUILD)/claims.ipynb: $(patsubst %,$(BUILD)/%.ipynb,$(filter-out claims,$(filter $(HAVING),$(FIGURES))))
endif

# --- Training on CIFAR-10: never part of `make figures`. CIFAR10_ROOT=folder says where the images are ---
# LAUNCH goes before each run's command: make -j30 checkpoints LAUNCH="srun -n1 --gres=gpu:1"
LAUNCH ?=
PLACE = $(if $(DEVICE),device=$(DEVICE)) $(if $(THREADS),threads=$(THREADS))
NETWORK = $(if $(ACTIVATION),activation=$(ACTIVATION)) $(if $(SMOOTH_INIT),smooth_init=$(SMOOTH_INIT)) \
  $(if $(BATCH_NORM),batch_norm=$(BATCH_NORM)) $(if $(DEPTH),depth=$(DEPTH)) $(if $(SEED),seed=$(SEED)) \
  $(if $(LR),learning_rate=$(LR)) $(if $(ADAPTIVE),adaptive=$(ADAPTIVE)) $(if $(HOLD_STEM),hold_stem=$(HOLD_STEM)) \
  $(if $(DEPTH_SCALING),depth_scaling=$(DEPTH_SCALING)) $(if $(NORM_GROUPS),norm_groups=$(NORM_GROUPS)) \
  $(if $(EPOCHS),epochs=$(EPOCHS)) $(if $(BATCH_SIZE),batch_size=$(BATCH_SIZE))

train: | $(READY) ## One network: ACTIVATION=gelu SMOOTH_INIT=True SEED=1 DEPTH=256 LR=0.04 EPOCHS=180 (more: checkpoints/README.md)
	@$(LAUNCH) $(PYTHON) -m lib.runs --profile $(PROFILE) --set "$(strip $(NETWORK) $(PLACE) $(SET))"

train-depths: | $(READY) ## Networks of growing depth, for conv_limit, that are not finished (FAMILIES="gelu_none_epochs15_seed0 ...", THREADS)
	@$(LAUNCH) $(PYTHON) -m lib.cifar_limit $(FAMILIES) $(if $(THREADS),--threads $(THREADS))

# The images are fetched before runs start side by side; a run that fails leaves the others alone. Values other than of
# the place are handed on to be refused: those of a listed run are the list's.
checkpoints: | $(READY) ## The networks of checkpoints/sweep.csv that are not finished (-j, LAUNCH, EPOCHS, DEVICE, THREADS)
	@$(PYTHON) -m lib.cifar
	@status=0; $(MAKE) -k --no-print-directory sweep || status=$$?; $(PYTHON) -m lib.records gather; exit $$status

ifneq ($(filter sweep,$(MAKECMDGOALS)),)
SCHEDULE := $(if $(EPOCHS),--epochs $(EPOCHS))
PENDING := $(shell $(PYTHON) -m lib.records pending $(SCHEDULE) || echo FAILED)
ifneq ($(filter FAILED,$(PENDING)),)
$(error There is no list of runs: see the sentence above)
endif
.PHONY: $(PENDING)
sweep: $(PENDING)
$(PENDING):
	@$(LAUNCH) $(PYTHON) -m lib.runs $@ $(SCHEDULE) --set "$(strip $(filter-out epochs=%,$(NETWORK)) $(PLACE) $(SET))"
endif

stack: | $(READY) ## Those with batch norm side by side on one GPU of compute capability 9.0 (EPOCHS, STACK="--help")
	@$(PYTHON) -m lib.cifar
	@$(PYTHON) -m lib.stacked_training $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(DEVICE),--device $(DEVICE)) $(STACK)

# --- Tests ---
# Two at a time, one thread each: that is what fills two cores. Each part's output comes in one piece.
test: | $(READY) ## Style, unit tests, every figure at its quick size, stored notebooks
	@OMP_NUM_THREADS=1 $(MAKE) -k -j2 --no-print-directory $(if $(filter output-sync,$(.FEATURES)),--output-sync) \
	  test-style test-units test-figures test-notebooks

.PHONY: test-style test-units test-figures test-notebooks test-lab
test-style: | $(READY)
	$(PYTHON) -m ruff check .

test-units: | $(READY)
	$(PYTHON) -m pytest -rs lib/tests

test-figures: | $(READY)
	@$(MAKE) --no-print-directory figures PROFILE=quick

test-notebooks: | $(READY)
	$(PYTHON) -m pytest -rs $(wildcard notebooks/*.ipynb) --nbval-lax --nbval-current-env

test-lab: | $(READY) ## The explorers in a real browser (LAB_PICTURE=figures/explorer.png takes the picture of the README)
	$(PYTHON) -m pytest -s lib/tests/lab.py

# --- Work ---
lab: | $(READY) ## JupyterLab on the notebooks (options: LAB="--no-browser --port 9000")
	$(PYTHON) -m jupyterlab --ServerApp.root_dir=notebooks $(LAB)

report: | $(READY) ## The executed notebooks of the profile as one HTML document (after `make figures`)
	@$(PYTHON) -m lib.report --profile $(PROFILE)

env: $(READY) ## The environment alone: by micromamba, mamba or conda into .conda, else .venv

engine: | $(ENVIRONMENT) ## The compiled engine (`make env` builds it where it finds a compiler)
	$(PYTHON) -m lib.engine build

bench: | $(READY) ## What a training step costs, by engine, into .build (BENCH="--save" into figures, "--only CIFAR", "--figures")
	env -u GOMP_SPINCOUNT $(PYTHON) -m lib.bench $(BENCH)

notebooks: | $(READY) ## Run the notebooks with their own values and store the outputs in them
	$(RUN) execute

# --- Environments ---
.conda/.up-to-date: environment.yml pyproject.toml
	rm -rf .conda
	MAMBA_ALWAYS_YES=true CONDA_ALWAYS_YES=true $(CONDA) $(if $(filter micromamba,$(CONDA)),,env) create -p "$(CURDIR)/.conda" -f environment.yml
	.conda/bin/python -m pip install --no-deps -e .
	@touch $@

.venv/.up-to-date: environment.yml pyproject.toml
	@for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Environment .venv with $$($$python --version): some minutes."; exec $$python -m venv .venv; fi; done; \
	  echo "No Python >= 3.11 is on the PATH (python3 is: $$(python3 --version 2>&1)). Install one, or name one with" \
	    "the packages of environment.yml: make PYTHON=/path/to/python." >&2; exit 2
	.venv/bin/python -m pip install -e .
	@touch $@

.build/engine/up-to-date: lib/engine.py $(wildcard lib/csrc/*) | $(ENVIRONMENT)
	$(PYTHON) -m lib.engine build
	@mkdir -p $(@D) && touch $@

# What a person made stays: training states, runs by hand, the tracked figures, CIFAR-10.
clean: ## Remove what make made: stamps, executed notebooks, untracked figures (not figures/custom, not training states)
	rm -rf $(filter-out .build/training,$(wildcard .build/*)) .pytest_cache .ruff_cache
	rm -rf $(filter-out figures/custom/,$(filter %/,$(wildcard figures/*/)))

distclean: clean ## As clean, and the environments too
	rm -rf .venv .conda
