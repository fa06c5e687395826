# `make` lists the commands.  Each sets up what it needs in .venv first.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PAPERMILL := VIT_CWD="$(CURDIR)" papermill -k python3 --cwd notebooks --no-progress-bar --log-level ERROR --stdout-file -
STRIP := python -c 'import nbformat, sys; nb = nbformat.read(sys.argv[1], 4); \
    [part.metadata.pop(name, None) for part in (nb, *nb.cells) for name in ("papermill", "widgets", "execution")]; \
    [cell.metadata.pop("tags", None) for cell in nb.cells if not cell.metadata.get("tags")]; nbformat.write(nb, sys.argv[2])'
OUT ?= comparison
SUMMARY ?= runs/published/study.jsonl
BENCH ?= runs/bench.json

help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: .venv/done   ## make .venv and install requirements.txt
.venv/done: requirements.txt
	python3 -m venv .venv
	pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

train: setup    ## train the four contestants on digits (a few minutes on two cores)
	bash train_job.sh

test: setup     ## all tests, the notebooks among them
	pytest -q -rs -n 2 --dist loadscope --no-loadscope-reorder tests/slurm tests/test_*.py notebooks --nbval-lax --nbval-current-env

figures: setup  ## draw every picture in img/ and fill the README's tables from runs/published/
	@mkdir -p runs && $(PAPERMILL) notebooks/07_comparison.ipynb runs/.figures.ipynb -r output .
	@$(PAPERMILL) notebooks/08_inside.ipynb runs/.figures.ipynb -r output .
	@$(PAPERMILL) notebooks/09_questions.ipynb runs/.figures.ipynb -r output .
	@$(PAPERMILL) notebooks/10_throughput.ipynb runs/.figures.ipynb -r output .
	@$(PAPERMILL) notebooks/11_results.ipynb runs/.figures.ipynb -r output .

compare: setup  ## the same for your own runs: make compare RUNS="mnist-* published/digits-*" [OUT=folder]
	@test -n "$(RUNS)" || { echo 'say which runs: make compare RUNS="mnist-*"  (make runs lists them)'; exit 2; }
	@mkdir -p runs && $(PAPERMILL) notebooks/07_comparison.ipynb runs/.figures.ipynb -r runs "$(RUNS)" -r output "$(OUT)"
	@echo "see $(OUT)/README.md"

runs: setup     ## list the runs that are here
	@python -c "import vit_helpers; vit_helpers.print_runs()"

# train_missing <name> <model> [options]: a published run, unless it is done (by whatever version of the code it was)
TRAIN_MISSING = train_missing() { test -e "runs/published/$$1/results.json" || bash train_job.sh -r run "published/$$1" -p model "$$2" "$${@:3}"; }
published: setup   ## train the published runs where they are missing (over an hour on two cores)
	$(TRAIN_MISSING); for seed in 0 1 2; do for model in vit towervit towervit-wide towervit-matched; do \
	    train_missing digits-seed$$seed-$$model $$model -p seed $$seed || exit; done; done
	$(TRAIN_MISSING); for seed in 0 1 2; do train_missing fashion-mnist-seed$$seed-vit vit -p seed $$seed -p dataset fashion-mnist || exit; done
	$(TRAIN_MISSING); for model in towervit towervit-wide towervit-matched; do \
	    train_missing fashion-mnist-seed0-$$model $$model -p dataset fashion-mnist || exit; done
	$(TRAIN_MISSING); train_missing more/fashion-mnist-adamw-seed0-vit vit -p dataset fashion-mnist -p recipe adamw
	$(TRAIN_MISSING); train_missing more/fashion-mnist-patch4-seed0-vit vit -p dataset fashion-mnist -p patch_size 4 -p epochs 15
	$(TRAIN_MISSING); train_missing more/fashion-mnist-adamw-patch4-seed0-vit vit -p dataset fashion-mnist -p recipe adamw -p patch_size 4 -p epochs 16
	$(TRAIN_MISSING); train_missing more/fashion-mnist-adamw-droppath-seed0-vit vit -p dataset fashion-mnist -p recipe adamw -p drop_path 0.1 -p epochs 30
	$(TRAIN_MISSING); train_missing more/fashion-mnist-modern-seed0-vit vit -p dataset fashion-mnist -p recipe modern -p epochs 60
	test ! -d data/cifar10-jpeg || test -d runs/published/headline || $(MAKE) headline KIND=cpu DATASET=data/cifar10-jpeg FOLDER=published/headline
	python -c "import vit_helpers; vit_helpers.load_notebook('11_results').publish_checkpoints()"

study: setup    ## train what notebook 9 asks for, many small models, where it is missing (over an hour on two cores)
	@python -c "import vit_helpers; vit_helpers.load_notebook('09_questions').run_study('$(SUMMARY)')"

bench: setup    ## measure images/s against timm, torchvision and vit-pytorch (half an hour on two cores): make bench [IMAGES=folder]
	pip install -q --disable-pip-version-check timm vit-pytorch
	@python -c "import vit_helpers; vit_helpers.load_notebook('10_throughput').run_bench('$(BENCH)', images='$(IMAGES)')"

headline: setup ## train notebook 11's plan for the GPU or CPU at hand: make headline [DATASET=folder] [ONLY="cifar10-best"] [PASSES=1] [KIND=cuda]
	@python -c "import vit_helpers; vit_helpers.load_notebook('11_results').run_headline('$(or $(DATASET),cifar10)', '$(ONLY)', int('$(PASSES)' or 0), '$(KIND)', '$(or $(FOLDER),headline)')"

retest: setup   ## test the checkpoints of runs again: make retest [RUNS="published/**"]
	@python -c "import vit_helpers; vit_helpers.load_notebook('11_results').retest('$(or $(RUNS),published/**)'.split())"

notebooks: setup   ## run every notebook from top to bottom and store its outputs in it
	@rm -rf runs/.notebooks && mkdir -p runs/.notebooks
	@for name in notebooks/*.ipynb; do \
	    echo $$name; VIT_HOME=$(CURDIR)/runs/.notebooks $(PAPERMILL) $$name runs/.notebooks/out.ipynb >/dev/null || exit; \
	    $(STRIP) runs/.notebooks/out.ipynb $$name || exit; done

data: setup     ## fetch a data set for machines without a network: make data DATASET=cifar10
	@test -n "$(DATASET)" || { echo 'say which: make data DATASET=cifar10'; exit 2; }
	@python -c "import vit_helpers; print(len(vit_helpers.load_data('$(DATASET)').train), 'training pictures in', vit_helpers.DATA)"

lab: setup      ## open the suite in JupyterLab, on this machine only
	jupyter lab --ServerApp.ip=localhost --LabApp.default_url=/lab/tree/notebooks/01_models.ipynb $(LAB_OPTIONS)

tensorboard: setup   ## watch runs/ in TensorBoard, on this machine only
	tensorboard --logdir "$${VIT_HOME:-.}/runs" --host localhost $(TENSORBOARD_OPTIONS)

.PHONY: help setup train test figures compare runs published notebooks study bench headline retest data lab tensorboard
