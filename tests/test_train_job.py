"""train_job.sh and the training notebook as a user runs them, without SLURM; several ranks by torchrun."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import vit_helpers

SCRIPT = vit_helpers.ROOT / "train_job.sh"
SMALL = ["-p", "model", "vit", "-p", "dims", "16,32", "-p", "head_dim", "8", "-p", "epochs", "2"]


def train_job(*arguments, **environment):
    """The finished process, its output as text."""
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_a_run_is_a_folder_with_all_that_the_contract_promises():
    shown = train_job("-p", "model", "towervit-matched", "-p", "recipe", "adamw", "-p", "epochs", "2", "-r", "run", "contract/run", "-p", "pool", "mean")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "epoch   2/2  loss" in shown.stdout and "contract/run" in shown.stdout.splitlines()[-2]
    folder, saved = vit_helpers.RUNS / "contract" / "run", vit_helpers.SAVED_MODELS / "contract" / "run"
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    assert {path.name for path in saved.iterdir()} == {"best.pt", "last.pt", "previous.pt", ".lock"}
    assert (folder / "02_training.ipynb").exists() and not list(vit_helpers.RUNS.glob(".job-*"))
    assert set(results) >= {"test_accuracy", "test_loss", "best_epoch", "val_loss", "epochs", "passes", "seconds", "images_per_second", "parameters", "flops"}
    assert set(config) >= {*vit_helpers.default_parameters(), "code_hash", "git_commit", "versions", "threads", "device_name", "classes", "parameters", "flops"}
    assert config["pool"] == "mean" and config["learning_rate"] == vit_helpers.RECIPES["adamw"]["learning_rate"] and config["class"] == "TowerViT"
    history = vit_helpers.read_history("contract/run")
    assert set(history) == {"epoch", *vit_helpers.TAGS} and history["epoch"] == [1, 2]
    assert results["val_loss"] == pytest.approx(min(history["loss/val"]), abs=1e-6) and results["passes"] == pytest.approx(2, abs=0.05)
    with np.load(folder / "predictions.npz") as stored:
        assert stored["logits"].shape == (359, 10) and stored["logits"].dtype == np.float16 and len(stored["pictures"]) == 32
        assert (stored["logits"].argmax(1) == stored["labels"]).mean() == pytest.approx(results["test_accuracy"], abs=0.01)
    model, data = vit_helpers.load_model("contract/run"), vit_helpers.load_data("digits")
    again = vit_helpers.evaluate(model, data, data.test, model.config)
    assert again["accuracy"] == pytest.approx(results["test_accuracy"]) and not model.training


def test_run_again_done_changed_and_interrupted():
    run = ["-r", "run", "again"]
    first = train_job(*SMALL, *run)
    assert first.returncode == 0, first.stdout + first.stderr
    second = train_job(*SMALL, *run)
    assert second.returncode == 0 and "run again is done: nothing is trained again" in second.stdout and "epoch   1/2" not in second.stdout
    changed = train_job(*SMALL, *run, "-p", "learning_rate", "0.2")
    assert changed.returncode != 0 and "learning_rate was 0.1 and is now 0.2" in changed.stderr.strip().splitlines()[-1]


def test_interrupted_by_a_signal_it_goes_on_to_the_same_result():
    arguments = [*SMALL[:-1], "20"]
    assert train_job(*arguments, "-r", "run", "whole").returncode == 0
    process = subprocess.Popen(["bash", SCRIPT, *arguments, "-r", "run", "parts"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "epoch   4/20" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "Stopped: asked to stop: saved in epoch" in rest and "the same command goes on" in rest
    shown = train_job(*arguments, "-r", "run", "parts")
    assert shown.returncode == 0 and "goes on from its last checkpoint" in shown.stdout and "epoch   3/20" not in shown.stdout
    whole, parts = (vit_helpers.read_run(vit_helpers.RUNS / name) for name in ("whole", "parts"))
    for run in (whole, parts):
        run["history"].pop("images_per_second")
    assert whole["history"] == parts["history"]             # no epoch twice, none missing, every number the same
    assert whole["results"]["test_loss"] == parts["results"]["test_loss"]


@pytest.mark.parametrize("arguments, said", [
    (["-p", "epochz", "3"], "unknown parameter 'epochz', did you mean 'epochs'? The parameters of 02_training are: model, dataset"),
    (["-p", "epochs", "many"], "parameter 'epochs' is 'many', but it must be int"),
    (["-p", "patch_size", "3"], "image_size 8 is not divisible by patch_size 3; patch sizes that fit: [1, 2, 4, 8]"),
    (["-p", "dataset", "./no-such-folder"], "no folder")])
def test_wrong_parameters_end_it_at_once_and_the_last_line_says_why(arguments, said):
    shown = train_job("-p", "model", "vit", *arguments)
    assert shown.returncode != 0 and said in shown.stderr.strip().splitlines()[-1], shown.stderr


@pytest.mark.parametrize("arguments", [["--epochs", "3"], ["vit"], ["-p", "epochs"]])
def test_wrong_options_are_refused(arguments):
    shown = train_job(*arguments)
    assert shown.returncode != 0 and ("options are -p NAME VALUE" in shown.stdout or "needs a value" in shown.stderr)


def test_the_losses_are_the_same_on_any_number_of_ranks(tmp_path):
    losses = {}
    for world, micro in ((1, 0), (1, 7), (2, 0), (4, 0), (3, 4)):
        command = [sys.executable] if world == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        path = tmp_path / f"{world}-{micro}.json"
        subprocess.run([*command, vit_helpers.ROOT / "tests" / "train_on_ranks.py", path, str(micro)], check=True, capture_output=True)
        losses[world, micro] = json.loads(path.read_text())
    one = losses[1, 0]
    for setting, other in losses.items():
        difference = np.abs(np.array(other["losses"]) - one["losses"]).max()
        print(f"{setting[0]} ranks, micro batches of {setting[1] or 'all'}: largest difference of 50 losses {difference:.1e}")
        assert difference < 1e-9 and other["validation"] == pytest.approx(one["validation"], abs=1e-9)


def test_two_ranks_train_a_whole_run():
    shown = train_job(*SMALL, "-r", "run", "two-ranks", NPROC="2")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    run = vit_helpers.read_run(vit_helpers.RUNS / "two-ranks")
    assert run["config"]["ranks"] == 2 and run["results"]["epochs"] == 2
    assert shown.stdout.count("epoch   2/2") == 1
