# `make` lists what can be made. Results are stamps in .build, never tracked files: a fresh clone makes everything.

ifeq ($(wildcard lib/project/variables.py),)
$(error The project is not in this folder: run make there, or make -C FOLDER)
endif

# --- Variables: what is given on the command line is data, taken to the letter, and goes on as an argument ---
# The values of a run: of `make train`, and some of them of `make checkpoints` and `make stack`.
TRAINING := ACTIVATION INITIALISATION SMOOTH_INIT BATCH_NORM DEPTH SEED LR ADAPTIVE HOLD_STEM DEPTH_SCALING NORM_GROUPS STEM_ACTIVATION EPOCHS BATCH_SIZE DEVICE THREADS
# LAUNCH goes before each training's command: make -j30 checkpoints LAUNCH="srun -n1 --gres=gpu:1"
VARIABLES := PROFILE SET PARAMETERS LAUNCH STACK LAB BENCH MEASURE VERIFY LOCKED FAMILIES $(TRAINING)
# What programs read from the environment may be given to make too.
ENVIRONMENTAL := CIFAR10_ROOT CIFAR10_URLS CUDA_VISIBLE_DEVICES CXX GOMP_SPINCOUNT LAB_PICTURE LIB_ENGINE OMP_NUM_THREADS TRAINING_PROGRESS
override GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))

comma := ,
define newline


endef
# A value as one word of a recipe: the shell reads nothing in it, and a line ends no recipe's line.
quoted = '$(subst ','\'',$(subst $(newline), ,$(1)))'
# The words of a variable before or after a command, quotes heeded; no shell reads them.
before = $(if $($(1)),$(PYTHON) lib/project/variables.py run $(1) $(call quoted,$($(1))) '')
after = $(if $($(1)),$(PYTHON) lib/project/variables.py run $(1) '' $(call quoted,$($(1))))
# The files in a folder whose names make, a shell and a link take as they are; lib.parameters has the same rule.
fitting = $(shell ls $(1) 2>/dev/null | LC_ALL=C grep -x '[A-Za-z0-9_][A-Za-z0-9_.-]*')

override UNKNOWN := $(firstword $(filter-out $(VARIABLES) $(ENVIRONMENTAL) PYTHON SHELL,$(GIVEN)))
ifneq ($(UNKNOWN),)
$(error $(shell $(or $(PYTHON),python3) lib/project/variables.py unknown $(call quoted,$(UNKNOWN)) $(VARIABLES) $(ENVIRONMENTAL) PYTHON 2>/dev/null || \
  printf 'There is no variable %s, but: %s' $(call quoted,$(UNKNOWN)) '$(VARIABLES) $(ENVIRONMENTAL) PYTHON'))
endif
$(foreach name,$(filter-out PYTHON SHELL,$(GIVEN)),$(eval override $(name) := $$(value $(name))))
EMPTY := $(firstword $(foreach name,$(filter $(VARIABLES),$(GIVEN)),$(if $(strip $($(name))),,$(name))))
ifneq ($(EMPTY),)
$(error $(EMPTY) is empty: give it a value, or leave it out)
endif

# A value that is in the environment, by chance, changes no run.
ignored = $(filter-out $(GIVEN),$(foreach name,$(1),$(if $($(name)),$(if $(filter environment,$(firstword $(origin $(name)))),$(name)))))
IGNORED := $(call ignored,$(if $(filter train checkpoints stack train-depths,$(MAKECMDGOALS)),$(TRAINING)) $(filter-out $(TRAINING),$(VARIABLES)))
ifeq ($(MAKELEVEL),0)
$(foreach name,$(IGNORED),$(info $(name) is in the environment, which changes nothing here: make $(MAKECMDGOALS) $(name)=... does))
endif
$(foreach name,$(filter-out $(GIVEN),$(filter-out $(TRAINING),$(VARIABLES))),$(eval override $(name) :=))
override PROFILE := $(or $(PROFILE),paper)
# An option of a command with the value of a variable of the command line: $(call option,--threads,THREADS)
option = $(if $(filter $(2),$(GIVEN)),$(1)=$(call quoted,$($(2))))
ifneq ($(filter-out yes,$(LOCKED)),)
$(error LOCKED is '$(LOCKED)', expected yes, or leave it out)
endif

PROFILES := quick $(call fitting,notebooks/profiles)
ifneq ($(words $(PROFILE)) $(filter $(PROFILES),$(PROFILE)),1 $(PROFILE))
$(error There is no profile '$(PROFILE)', the profiles are: $(PROFILES))
endif

# --- Environment: PYTHON as it is, else conda's kind into .conda, else .venv ---
ifeq ($(origin PYTHON),undefined)
# The exact versions that made the tracked figures are PyPI's. An environment that has them keeps them.
override LOCKED := $(or $(LOCKED),$(if $(wildcard .venv/.locked),yes))
CONDA := $(if $(LOCKED),,$(firstword $(foreach tool,micromamba mamba conda,$(if $(shell command -v $(tool) 2>/dev/null),$(tool)))))
PREFIX := $(if $(CONDA),.conda,.venv)
PYTHON := $(PREFIX)/bin/python
# The compiled engine comes with the environment where there is a compiler; results do not depend on it. Another
# processor, compiler or PyTorch is another name, and so a new build.
ENGINE := $(if $(shell command -v $${CXX:-c++} 2>/dev/null),.build/engine/up-to-date-$(firstword $(shell { \
  sed -n '/^flags/{p;q;}' /proc/cpuinfo; $${CXX:-c++} --version; ls -d $(PREFIX)/lib/python3*/site-packages/torch-*; } 2>/dev/null | cksum)))
ENVIRONMENT := $(PREFIX)/$(if $(LOCKED),.locked,.up-to-date)
else ifneq ($(LOCKED),)
$(error LOCKED=yes makes an environment, and PYTHON is one that is used as it is: give one of them)
else ifneq ($(filter-out help clean distclean,$(MAKECMDGOALS)),)
ifneq ($(and $(word 2,$(PYTHON)),$(shell [ -e $(call quoted,$(PYTHON)) ] && echo there)),)
$(error The path of PYTHON has a space, $(PYTHON), which make takes for two words: give it through a link without one, as made by ln -s)
endif
LACKS := $(shell $(PYTHON) -c 'import importlib.util as u, sys; print(*[name for name in sys.argv[1:] if not u.find_spec(name)])' \
  torch torchvision jupyterlab ipywidgets matplotlib papermill nbval psutil safetensors scipy tqdm yaml 2>/dev/null || echo everything: it does not run)
ifneq ($(LACKS),)
$(error PYTHON is $(PYTHON), which lacks $(LACKS). Give it the packages of environment.yml, or leave PYTHON out and an environment is made)
endif
endif
READY := $(ENVIRONMENT) $(ENGINE)

TARGETS := help figures verify train train-depths checkpoints stack measure test check check-one check-two test-style test-units test-figures test-notebooks \
  test-lab lab readme \
  report env engine bench notebooks clean distclean
# A notebook of the project has a cell tagged `parameters`: in its file, in quotes without a backslash.
NOTEBOOKS := $(filter-out $(TARGETS),$(basename $(filter $(call fitting,notebooks),$(notdir $(shell \
  LC_ALL=C grep -lE '(^|[^\])"parameters"[[:space:]]*(,|\]|$$)' notebooks/*.ipynb 2>/dev/null)))))
OTHERS := $(shell ls notebooks 2>/dev/null | grep '\.ipynb$$' | grep -vxF "$$(printf '%s.ipynb\n' $(NOTEBOOKS))" | tr '\n' ';')
ifneq ($(and $(OTHERS),$(filter 0,$(MAKELEVEL)),$(filter help figures test test-figures test-notebooks notebooks report,$(or $(MAKECMDGOALS),help))),)
$(info Left out of notebooks/: $(OTHERS) a figure has a cell tagged `parameters`, and a name of letters, digits, _, . and - that is no target)
endif
STORED := $(NOTEBOOKS:%=notebooks/%.ipynb)
# Explorers, training and the page that `make lab` opens are no figures.
FIGURES := $(filter-out explore_% train_% start,$(NOTEBOOKS))
HAVING := $(filter $(NOTEBOOKS),$(if $(filter quick,$(PROFILE)),$(NOTEBOOKS),$(patsubst %.yaml,%,$(call fitting,notebooks/profiles/$(PROFILE)))))
BUILD := .build/$(PROFILE)
CHECKED := $(BUILD)/checked
RUN = $(PYTHON) -m lib.project.notebooks

STRANGE := $(firstword $(foreach goal,$(MAKECMDGOALS),$(if $(findstring /,$(goal)),,$(filter-out $(TARGETS) $(FIGURES),$(goal)))))
ifneq ($(STRANGE),)
$(error There is no target $(STRANGE). The figures are: $(FIGURES); `make` alone lists all targets)
endif

# A variable that no target of this call reads would be lost without a word.
GOALS := $(or $(MAKECMDGOALS),help)
TAKES.train := $(TRAINING) PROFILE SET PARAMETERS LAUNCH
TAKES.checkpoints := EPOCHS DEVICE THREADS SET LAUNCH
TAKES.stack := EPOCHS DEVICE STACK
TAKES.lab := LAB
TAKES.bench := BENCH
TAKES.verify := VERIFY
TAKES.measure := MEASURE
TAKES.train-depths := FAMILIES THREADS LAUNCH
TAKES.env := LOCKED
TAKES.test :=
TAKES.check :=
TAKES.readme :=
TAKES.notebooks :=
takes = $(if $(filter undefined,$(origin TAKES.$(1))),PROFILE $(if $(filter $(FIGURES),$(1)),SET PARAMETERS),$(TAKES.$(1)))
TAKEN := $(foreach goal,$(GOALS),$(call takes,$(goal)))
IDLE := $(firstword $(filter-out $(TAKEN),$(filter $(VARIABLES),$(GIVEN))))
ifneq ($(filter SET PARAMETERS,$(IDLE)),)
$(error SET and PARAMETERS change one run of one figure: name it, as in make $(firstword $(FIGURES)) SET="$(SET)")
else ifneq ($(IDLE),)
$(error make $(GOALS) does not take $(IDLE)$(if $(filter checkpoints stack,$(GOALS)),: the runs of checkpoints/sweep.csv have the \
  values that it lists$(comma) make train takes any,$(if $(filter $(IDLE),$(TRAINING)), (a parameter of a figure goes into SET: \
  make $(firstword $(filter $(FIGURES),$(GOALS)) $(FIGURES)) SET="seed=3"))))
endif

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
unexport MPLBACKEND

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: $(TARGETS) $(FIGURES)

help: ## This list
	@echo 'make TARGET [PROFILE=paper|released|quick] [PYTHON=interpreter to use as it is]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-22s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'One figure, for one run with other values: make NAME [SET="row=3 learning_rate=0.02"] [PARAMETERS=my.yaml]'
	@for name in $(FIGURES); do printf '  %-22s %s\n' $$name \
	  "$$(sed -n 's/^ *"# *\([^"\\]*\).*/\1/p' notebooks/$$name.ipynb | head -n 1)"; done

# --- Figures ---
figures: $(CHECKED) $(patsubst %,$(BUILD)/%.ipynb,$(filter $(HAVING),$(FIGURES))) ## Every figure of the profile, into figures/

BY_HAND = $(call option,--set,SET) $(call option,--parameters,PARAMETERS)
ifneq ($(SET)$(PARAMETERS),)
$(FIGURES): | $(READY)
	@$(RUN) run $@ --profile $(PROFILE) $(BY_HAND)
else
$(FIGURES): %: $(BUILD)/%.ipynb
endif

# All parameters of a profile are checked in one go before the first notebook of it runs.
$(CHECKED): $(STORED) $(wildcard $(HAVING:%=notebooks/profiles/$(PROFILE)/%.yaml) lib/*.py) \
  $(filter-out lib/tests/%,$(wildcard lib/*/*.py)) | $(READY)
	@$(RUN) check --profile $(PROFILE)
	@$(PYTHON) -m lib.engine.build report
	@mkdir -p $(BUILD) && touch $@

# The runner writes what else a result depends on (profile, modules of lib) into the .d file beside it.
$(FIGURES:%=$(BUILD)/%.ipynb): $(BUILD)/%.ipynb: notebooks/%.ipynb | $(READY) $(CHECKED)
	@$(SHARE) $(RUN) run $* --profile $(PROFILE)
-include $(wildcard $(BUILD)/*.d)
# A figure whose files are not all there is made again: the runner lists them in the .made file beside its stamp.
LACKING := $(shell for list in "$(BUILD)"/*.made; do [ ! -f "$$list" ] || while IFS= read -r file; do \
  [ -e "$$file" ] || { echo "$${list%.made}.ipynb"; break; }; done < "$$list"; done)
ifneq ($(LACKING),)
$(LACKING): missing-files
.PHONY: missing-files
endif
# The claims are judged from what the other figures wrote: they come last.
ifneq ($(filter figures verify,$(MAKECMDGOALS)),)
$(BUILD)/claims.ipynb: $(patsubst %,$(BUILD)/%.ipynb,$(filter-out claims,$(filter $(HAVING),$(FIGURES))))
endif

verify: figures ## How far this machine's tables are from the tracked ones (VERIFY="--against COMMIT or FOLDER")
	@$(call after,VERIFY) $(PYTHON) -m lib.project.verify

ifneq ($(filter verify,$(MAKECMDGOALS)),)
# What is compared with is looked for before figures are made.
$(CHECKED) $(FIGURES:%=$(BUILD)/%.ipynb): | tracked-tables
tracked-tables: | $(READY)
	@$(call after,VERIFY) $(PYTHON) -m lib.project.verify --look
.PHONY: tracked-tables
endif

# --- Training on CIFAR-10: never part of `make figures`. CIFAR10_ROOT=folder says where the images are ---
VALUES = $(foreach name,$(filter $(TRAINING),$(GIVEN)),$(call quoted,$(name)=$($(name))))

train: | $(READY) ## One network: ACTIVATION=gelu INITIALISATION=weight-tied SEED=1 DEPTH=256 LR=0.04 EPOCHS=180 (more: checkpoints/README.md)
	@$(call before,LAUNCH) $(PYTHON) -m lib.project.runs --profile $(PROFILE) $(BY_HAND) $(VALUES)

train-depths: | $(READY) ## Networks of growing depth, for conv_limit, that are not finished (FAMILIES="gelu_none_epochs15_seed0 ...", THREADS)
	@$(call before,LAUNCH) $(PYTHON) -m lib.cifar.depth_limit $(foreach name,$(FAMILIES),$(call quoted,$(name))) $(call option,--threads,THREADS)

checkpoints: | $(READY) ## The networks of checkpoints/sweep.csv that are not finished (-j, LAUNCH, EPOCHS, DEVICE, THREADS)
	@$(PYTHON) -m lib.project.runs --listed --jobs $(if $(filter -j%,$(MAKEFLAGS)),$(or $(JOBS),0),1) $(call option,--launch,LAUNCH) $(BY_HAND) $(VALUES)

stack: | $(READY) ## Runs of sweep.csv with batch norm, side by side on one GPU of compute capability 9.0 (EPOCHS, STACK="--help")
	@$(call after,STACK) $(PYTHON) -m lib.cifar.stacked.training $(call option,--epochs,EPOCHS) $(call option,--device,DEVICE)

measure: | $(READY) ## Trained networks with fewer layers and as ODEs, an hour (MEASURE="--help"); not part of figures
	@$(call after,MEASURE) $(PYTHON) -m lib.cifar.measured

# --- Tests ---
# Two at a time, one thread each: that is what fills two cores. Each part's output comes in one piece.
PAIRED = OMP_NUM_THREADS=1 $(MAKE) -k -j2 --no-print-directory $(if $(filter output-sync,$(.FEATURES)),--output-sync)

test: | $(READY) ## Style, unit tests, every figure at its quick size, stored notebooks
	@$(PAIRED) test-style test-units test-figures test-notebooks

check: | $(READY) ## Style and the quick tests, while working
	@$(PAIRED) test-style check-one check-two

# Halves that take about the same time.
QUICK = $(PYTHON) -m pytest -m 'not slow'
HALF := lib/tests/project lib/tests/figures

check-one: | $(READY)
	$(QUICK) $(HALF)

check-two: | $(READY)
	$(QUICK) lib/tests $(HALF:%=--ignore=%)

test-style: | $(READY)
	$(PYTHON) -m ruff check lib $(STORED)

test-units: | $(READY)
	$(PYTHON) -m pytest -rs lib/tests

test-figures: | $(READY)
	@$(MAKE) --no-print-directory figures PROFILE=quick

test-notebooks: | $(READY)
	$(PYTHON) -m pytest -rs $(STORED) --nbval-lax --nbval-current-env

test-lab: | $(READY) ## The explorers in a real browser (LAB_PICTURE=figures/explorer.png takes the picture of the README)
	$(PYTHON) -m pytest -s lib/tests/lab.py

# --- Work ---
# .lab has settings: notebooks are tracked files, so JupyterLab saves one only if it is told to.
# Jupyter wants to be asked before it runs as root, as in a container; it listens to this machine alone.
lab: | $(READY) ## JupyterLab on the start page (options: LAB="--no-browser --port 9000")
	$(call after,LAB) $(PYTHON) -m jupyterlab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/start.ipynb \
	  --LabApp.app_settings_dir=.lab \
	  $(if $(filter 0,$(shell id -u)),--allow-root --ServerApp.ip=127.0.0.1)

readme: | $(READY) ## Fill the marked numbers of the READMEs from the tables
	@$(PYTHON) -m lib.project.readme

report: | $(READY) ## The executed notebooks of the profile as one HTML document (after `make figures`)
	@$(PYTHON) -m lib.project.report --profile $(PROFILE)

env: $(READY) ## The environment alone: by micromamba, mamba or conda into .conda, else .venv (LOCKED=yes: the tracked figures' versions)

engine: | $(ENVIRONMENT) ## The compiled engine (`make env` builds it where it finds a compiler)
	$(PYTHON) -m lib.engine.build build

bench: | $(READY) ## What a training step costs, by engine, into .build (BENCH="--save" into figures, "--only CIFAR", "--figures")
	env -u GOMP_SPINCOUNT $(call after,BENCH) $(PYTHON) -m lib.project.bench

notebooks: | $(READY) ## Run the notebooks with their own values and store the outputs in them
	$(RUN) execute

# --- Environments ---
# An environment cannot be moved once it is made. So the old one waits beside while a new one is made in its place, and
# comes back if that fails. If it waits there already, an earlier make was killed, and what is in its place is not whole.
# $(call renew,FOLDER,COMMANDS)
renew = trap : HUP INT TERM; if [ -d $(1).old ]; then rm -rf $(1); elif [ -d $(1) ]; then mv $(1) $(1).old; fi; \
  if { $(2); }; then if [ -d $(1).old ]; then rm -rf $(1).gone; mv $(1).old $(1).gone; rm -rf $(1).gone; fi; \
  else rm -rf $(1); [ ! -d $(1).old ] || { mv $(1).old $(1); echo "$(1) is the one from before." >&2; }; exit 2; fi

.conda/.up-to-date: environment.yml pyproject.toml
	@$(call renew,.conda,MAMBA_ALWAYS_YES=true CONDA_ALWAYS_YES=true PIP_NO_DEPS=true \
	  $(CONDA) $(if $(filter micromamba,$(CONDA)),,env) create -p "$(CURDIR)/.conda" -f environment.yml)
	@touch $@

# One that runs is brought up to date in place: pip and uv download all before they change anything.
UV := $(shell command -v uv 2>/dev/null)
VENV = $(if $(UV),uv venv --seed --python $$python .venv,$$python -m venv .venv)
INSTALL = $(if $(UV),uv pip install --python .venv/bin/python,.venv/bin/python -m pip install) $(if $(LOCKED),-c .locked/constraints.txt) -e .
AT_LEAST_3_11 = -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
.venv/.locked: .locked/constraints.txt
.venv/.up-to-date .venv/.locked: environment.yml pyproject.toml
	@if [ ! -d .venv.old ] && .venv/bin/python $(AT_LEAST_3_11); then $(INSTALL); exit; fi; \
	for python in python3 python3.14 python3.13 python3.12 python3.11; do if $$python $(AT_LEAST_3_11); then \
	  echo "Environment .venv with $$($$python --version): some minutes."; $(call renew,.venv,$(VENV) && $(INSTALL)); exit; \
	fi; done; \
	echo "No Python >= 3.11 is on the PATH (python3 is: $$(python3 --version 2>&1)). Install one, or name one with" \
	  "the packages of environment.yml: make PYTHON=/path/to/python." >&2; exit 2
	@touch .venv/.up-to-date $@

.build/engine/up-to-date-%: lib/engine/build.py $(wildcard lib/engine/csrc/*) | $(ENVIRONMENT)
	$(PYTHON) -m lib.engine.build build
	@mkdir -p $(@D) && touch $@

# By whatever Python there is: the environment may not be made, or no longer run.
clean: ## Remove what make made: stamps, executed notebooks, untracked figures (not figures/custom, not training states)
	@$$($(PYTHON) -c '' 2>/dev/null && echo "$(PYTHON)" || echo python3) -I lib/project/clean.py

distclean: clean ## As clean, and the environments too
	rm -rf .venv .conda .venv.old .conda.old .venv.gone .conda.gone
