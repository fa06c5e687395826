"""train_job.sh and the training notebook as a user runs them, without SLURM; several ranks by torchrun."""
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vit_helpers
from jobs import SCRIPT, SMALL, train_job, untimed
from PIL import Image

RANKS = [(1, 0), (2, 0), (4, 4)]        # how many, and of how many pictures the micro batches are (0: all at once)


def test_a_run_is_a_folder_with_all_that_the_contract_promises(whole):
    assert "epoch  12/12  loss" in whole.stdout and "whole" in whole.stdout.splitlines()[-2]
    folder, saved = vit_helpers.RUNS / "whole", vit_helpers.SAVED_MODELS / "whole"
    config, results = (json.loads((folder / name).read_text()) for name in ("config.json", "results.json"))
    assert {path.name for path in saved.iterdir()} == {"best.pt", "last.pt", "previous.pt", ".lock"}
    assert (folder / "06_run.ipynb").exists() and not list(vit_helpers.RUNS.glob(".job-*"))
    assert set(results) >= {"test_accuracy", "test_loss", "best_epoch", "val_loss", "epochs", "passes", "seconds", "images_per_second", "parameters", "flops"}
    assert set(config) >= {*vit_helpers.default_parameters(), "code_hash", "git_commit", "versions", "threads", "device_name", "classes", "parameters", "flops"}
    assert config["pool"] == "mean" and config["learning_rate"] == vit_helpers.RECIPES["adamw"]["learning_rate"] and config["class"] == "TowerViT"
    history = vit_helpers.read_history("whole")
    assert set(history) == {"epoch", *vit_helpers.TAGS} and history["epoch"] == list(range(1, 13))
    assert results["val_loss"] == pytest.approx(min(history["loss/val"]), abs=1e-6) and results["passes"] == pytest.approx(12, abs=0.3)
    with np.load(folder / "predictions.npz") as stored:
        assert stored["logits"].shape == (359, 10) and stored["logits"].dtype == np.float16 and len(stored["pictures"]) == 32
        assert (stored["logits"].argmax(1) == stored["labels"]).mean() == pytest.approx(results["test_accuracy"], abs=0.01)
    model, data = vit_helpers.load_model("whole"), vit_helpers.load_data("digits")
    again = vit_helpers.evaluate(model, data, data.test, model.config)
    assert again["accuracy"] == pytest.approx(results["test_accuracy"]) and not model.training


def test_a_finished_run_is_left_alone_and_a_changed_one_refused(whole):
    again = train_job(*SMALL, "-r", "run", "whole")
    assert again.returncode == 0 and "run whole is done: nothing is trained again" in again.stdout and "epoch   1/12" not in again.stdout
    changed = train_job(*SMALL, "-r", "run", "whole", "-p", "learning_rate", "0.2")
    assert changed.returncode != 0 and "learning_rate was 0.002 and is now 0.2" in changed.stderr.strip().splitlines()[-1]


def test_interrupted_by_a_signal_it_goes_on_to_the_same_result(whole):
    process = subprocess.Popen(["bash", SCRIPT, *SMALL, "-r", "run", "parts"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "epoch   4/12" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "Stopped: asked to stop: saved in epoch" in rest and "the same command goes on" in rest
    shown = train_job(*SMALL, "-r", "run", "parts")
    assert shown.returncode == 0 and "goes on from its last checkpoint" in shown.stdout and "epoch   3/12" not in shown.stdout
    assert untimed("parts") == untimed("whole")                 # no epoch twice, none missing, every number the same


def descendants(process):
    """This process and all that descend from it, each after its parent."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


@pytest.mark.parametrize("number", range(int(os.environ.get("VIT_KILLS", 1))))
def test_killed_at_a_random_moment_it_goes_on_to_the_same_result(whole, number):
    """SIGKILL for the whole tree of processes, until a try gets through.  VIT_KILLS=20 for twenty such runs."""
    run, draws, kills = f"killed-{number}", random.Random(number), 0
    while True:
        process = subprocess.Popen(["bash", SCRIPT, *SMALL, "-r", "run", run], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            shown = process.communicate(timeout=draws.uniform(4, 14) if kills < 2 else 300)[0]
            break
        tree = descendants(process.pid)
        for one in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.communicate()
        kills += 1
        assert not [one for one in tree if Path(f"/proc/{one}/cmdline").exists() and Path(f"/proc/{one}/cmdline").read_bytes()]
    assert process.returncode == 0, shown
    assert untimed(run) == untimed("whole")
    left = {path.name for folder in (vit_helpers.RUNS, vit_helpers.SAVED_MODELS) for path in (folder / run).iterdir()}
    assert left == {"best.pt", "last.pt", "previous.pt", ".lock", "config.json", "results.json", "predictions.npz", "06_run.ipynb",
                    *(path.name for path in (vit_helpers.RUNS / run).glob("events.out.tfevents.*"))}
    print(f"run {number}: killed {kills} times, finished with the undisturbed result")


@pytest.mark.parametrize("arguments, said", [
    (["-p", "epochz", "3"], "unknown parameter 'epochz', did you mean 'epochs'? The parameters of 06_run are: model, dataset"),
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
    for world, micro in RANKS:
        command = [sys.executable] if world == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        path = tmp_path / f"{world}-{micro}.json"
        shown = subprocess.run([*command, vit_helpers.ROOT / "tests" / "train_on_ranks.py", path, str(micro)], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        losses[world, micro] = json.loads(path.read_text())
        assert not [name for name in losses[world, micro]["threads"] if "gloo" in name]     # left until exit, they abort it now and then
    one = losses[1, 0]
    for (world, micro), other in losses.items():
        difference = np.abs(np.array(other["losses"]) - one["losses"]).max()
        print(f"{world} ranks, micro batches of {micro or 'all'}: largest difference of 50 losses {difference:.1e}")
        assert difference < 1e-9 and other["validation"] == pytest.approx(one["validation"], abs=1e-9)


def test_two_ranks_train_a_whole_run():
    shown = train_job(*SMALL, "-p", "epochs", "1", "-r", "run", "two-ranks", NPROC="2")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    run = vit_helpers.read_run(vit_helpers.RUNS / "two-ranks")
    assert run["config"]["ranks"] == 2 and run["results"]["epochs"] == 1
    assert shown.stdout.count("epoch   1/1") == 1


def test_ranks_that_see_different_checkpoints_all_stop(tmp_path, settings, train):
    """As on nodes whose disk is not shared: rank 0 finds a checkpoint, rank 1 does not.  Nobody waits for the other."""
    train(settings(epochs=1), tmp_path / "0")
    code = ("import sys, pathlib; sys.path[:0] = sys.argv[1:3]; import vit_helpers, jobs; device = vit_helpers.load_notebook('06_run').start_processes('cpu'); c = jobs.small_config(epochs=3); "
            "vit_helpers.train_and_validation_loop(vit_helpers.build_model(c), vit_helpers.load_data('digits'), c, 3, device, folder=pathlib.Path(sys.argv[3], str(vit_helpers.ranks()[0])))")
    shown = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-c", code,
                            vit_helpers.ROOT, vit_helpers.ROOT / "tests", tmp_path], capture_output=True, text=True, timeout=120)
    assert shown.returncode != 0 and "the ranks read different checkpoints from" in shown.stderr and "disk that all nodes share?" in shown.stderr


def test_the_headline_plan_is_trained_once_and_its_checkpoint_tested_again(tmp_path, capfd):
    for part, label, number in itertools.product(("train", "test"), ("dark", "light"), range(12)):
        path = tmp_path / "greys" / part / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * number,) * 3 if label == "dark" else (255 - 10 * number,) * 3).save(path)
    headline, results = vit_helpers.load_notebook("11_results"), vit_helpers.RUNS / "headline-1-passes" / "greys-cpu-seed0" / "results.json"
    for todo in (1, 0):
        headline.run_headline(str(tmp_path / "greys"), passes=1, kind="cpu")
        assert f"greys-cpu: {todo} of 1 runs to do, 1 passes each, at most" in capfd.readouterr().out
    headline.retest(["headline-1-passes/*"])
    reported = vit_helpers.read_json(results)
    assert f"{100 * reported['test_accuracy']:.2f}% again, {100 * reported['test_accuracy']:.2f}% reported" in capfd.readouterr().out
    vit_helpers.write_json(results, {**reported, "test_accuracy": reported["test_accuracy"] - 0.1})
    with pytest.raises(SystemExit, match="not what was reported: headline-1-passes/greys-cpu-seed0"):
        headline.retest(["headline-1-passes/*"])


def test_the_headline_names_what_it_does_not_know_and_what_failed(tmp_path):
    headline = vit_helpers.load_notebook("11_results")
    with pytest.raises(ValueError, match="only is 'best'.* Allowed: greys-cpu"):
        headline.run_headline("greys", only="best", kind="cpu")
    with pytest.raises(SystemExit, match="failed: headline-1-passes/nowhere-cpu-seed0; the end of each log says why"):
        headline.run_headline(str(tmp_path / "nowhere"), passes=1, kind="cpu")
