# `make` lists the commands.  Each sets up what it needs in .venv first.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# What is relative, such as VIT_HOME, is meant from here.
export VIT_CWD := $(CURDIR)
QUIET := -k python3 --cwd notebooks --no-progress-bar --log-level ERROR --stdout-file - --no-request-save-on-cell-execute
PAPERMILL := python -W ignore -m papermill $(QUIET)
PYTHON := python -c
LOAD := import os, vit_helpers; vit_helpers.show_errors_in_a_line(); load = vit_helpers.load_notebook;
# A variable that was given, as Python: make exports it, so no quote in it can end the text.
given = (os.environ.get('$(1)') or '$(2)')
OUT ?= comparison

help:           ## this list
	@awk -F ':.*## *' '/^[a-z]+:.*## /{printf "%-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

STAMP := .venv/done$(if $(LOCKED),-locked)
setup: $(STAMP)     ## make .venv and install requirements.txt (LOCKED=1: in the versions of constraints.txt)
$(STAMP): requirements.txt $(if $(LOCKED),constraints.txt)
	@python3 -c 'import sys; sys.exit("Python 3.10 or later is needed" if sys.version_info < (3, 10) else 0)'
	python3 -m venv .venv
	python -m pip install -q --disable-pip-version-check --no-compile -r requirements.txt $(if $(LOCKED),-c constraints.txt)
	@# What pip would do on one core. (What is of a later Python does not compile: it is not imported, either.)
	@python -m compileall -q -j 0 .venv/lib >/dev/null || true
	touch $(sort .venv/done $@)

train: setup    ## train all contestants on digits (a few minutes on two cores)
	bash train_job.sh

# The longest first, so that no core is idle at the end.
LONG := tests/slurm $(patsubst %,tests/test_%.py,train_job field browser house figures) notebooks/04_training.ipynb
SHORT := $(filter-out $(LONG),$(sort $(wildcard tests/test_*.py notebooks/0[1-5]_*.ipynb)))
test: setup lint    ## all tests, the notebooks among them
	python -m pytest -q -rs --durations=10 -n 4 --dist loadscope --no-loadscope-reorder $(LONG) $(SHORT) --nbval-lax --nbval-current-env

lint: setup     ## what a reader would trip over, in .py files and notebooks
	python -m ruff check .

figures: setup  ## draw every figure in img/, fill the tables of README.md and RESULTS.md from runs/published/
	@for name in 07_comparison 08_inside 09_questions 10_throughput 11_results 12_growing; do \
	    $(PAPERMILL) notebooks/$$name.ipynb /dev/null -r output . || exit; done

compare: setup  ## the same for your own runs: make compare RUNS="mnist-* published/digits-*" [OUT=folder]
	@test -n "$(RUNS)" || { echo 'say which runs: make compare RUNS="mnist-*"  (make runs lists them)'; exit 2; }
	@$(PYTHON) "$(LOAD) vit_helpers.read_runs($(call given,RUNS).split(), finished=True)"
	@$(PAPERMILL) notebooks/07_comparison.ipynb /dev/null -r runs "$(RUNS)" -r output "$(OUT)" 2> >(grep -v "over TCP without encryption" >&2)
	@echo "see $(OUT)/README.md"

runs: setup     ## list the runs that are here
	@$(PYTHON) "$(LOAD) vit_helpers.print_runs()"

published: setup   ## train the published runs where they are missing (a night on two cores): make published [ONLY="contestants"]
	@$(PYTHON) "$(LOAD) load('11_results').train_published($(call given,ONLY))"

study: setup    ## train what notebook 9 asks for, many small models, where it is missing (an hour on two cores; in colour, several)
	@$(PYTHON) "$(LOAD) q = load('09_questions'); q.run_study($(call given,SUMMARY,runs/published/study.jsonl)); q.run_colour($(call given,COLOUR,runs/published/colour.jsonl))"

growing: setup  ## train notebook 12's cross of growing and merging where runs are missing (hours on two cores)
	@$(PYTHON) "$(LOAD) load('12_growing').run_growing($(call given,GROWING,runs/published/growing.jsonl))"

bench: setup    ## measure images/s against timm, torchvision and vit-pytorch (half an hour): make bench [IMAGES=folder]
	python -m pip install -q --disable-pip-version-check timm vit-pytorch
	@$(PYTHON) "$(LOAD) load('10_throughput').run_bench($(call given,BENCH,runs/bench.json), images=$(call given,IMAGES))"

sweep: export SWEEP = $(MAKEOVERRIDES)
sweep: setup    ## try settings, judged on validation data: make sweep RUN=eight learning_rate=0.03,0.1 drop_path=0,0.1 [epochs=2] [at_once=2]
	@$(PYTHON) "$(LOAD) load('06_run').run_sweep(os.environ['SWEEP'])"

results: setup  ## train notebook 11's plan for the GPU or CPU at hand: make results [DATASET=folder] [ONLY="cifar10-best"] [EPOCHS=1] [KIND=cuda]
	@$(PYTHON) "$(LOAD) load('11_results').run_results($(call given,DATASET,cifar10), $(call given,ONLY), $(call given,EPOCHS), $(call given,KIND), $(call given,FOLDER,results))"

retest: setup   ## test the checkpoints of runs again: make retest [RUNS="published/**"]
	@$(PYTHON) "$(LOAD) load('11_results').retest($(call given,RUNS,published/**).split())"

predict: setup  ## classify images by a run: make predict RUN=pets IMAGES="folder 'my folder' a.jpg" [OUTPUT=found.csv]
	@$(if $(and $(RUN),$(IMAGES)),,echo 'say which: make predict RUN=pets IMAGES="folder or files"  (make runs lists the runs)' >&2; exit 2)
	@python scripts/predict.py $(if $(OUTPUT),--output "$(OUTPUT)") "$(RUN)" $(IMAGES)

export: setup   ## a folder for the Hugging Face hub: make export RUN=pets [OUTPUT=folder] [REPLACE=1]
	@$(if $(RUN),,echo 'say which: make export RUN=pets  (make runs lists the runs)' >&2; exit 2)
	@python scripts/export.py $(if $(OUTPUT),--output "$(OUTPUT)") $(if $(REPLACE),--replace) "$(RUN)"

notebooks: setup   ## run every notebook from top to bottom and store its outputs in it: make notebooks [ONLY=04_training]
	@rm -rf runs/.notebooks && mkdir -p runs/.notebooks
	@for name in $(or $(ONLY),$(basename $(notdir $(sort $(wildcard notebooks/*.ipynb))))); do \
	    echo $$name; VIT_HOME="$(CURDIR)/runs/.notebooks" $(PAPERMILL) notebooks/$$name.ipynb runs/.notebooks/out.ipynb >/dev/null || exit; \
	    python tests/strip_notebook.py runs/.notebooks/out.ipynb notebooks/$$name.ipynb || exit; done
	@rm -rf runs/.notebooks

data: setup     ## fetch a data set for machines without a network: make data DATASET=cifar10
	@test -n "$(DATASET)" || { echo 'say which: make data DATASET=cifar10'; exit 2; }
	@$(PYTHON) "$(LOAD) print(len(load('02_data').load_data($(call given,DATASET)).train), 'training images in', vit_helpers.DATA)"

lab: setup      ## open the suite in JupyterLab, on this machine only
	python -m jupyterlab --ServerApp.ip=localhost --LabApp.default_url=/lab/tree/notebooks/01_models.ipynb $(LAB_OPTIONS)

tensorboard: setup   ## watch your runs in TensorBoard, on this machine only: make tensorboard [RUNS="published/**"]
	@python scripts/watch.py "$(RUNS)" --options="$(TENSORBOARD_OPTIONS)"

.PHONY: help setup train test lint figures compare runs published study growing sweep bench results retest predict export notebooks data lab tensorboard
