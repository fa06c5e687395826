"""train_job.sh and notebook 6 as a user runs them, without SLURM; several ranks by torchrun."""
import contextlib
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics

import vit_helpers
from jobs import SCRIPT, SMALL, train_job, untimed

# (world size, images per micro-batch; 0: all at once)
RANKS = [(1, 0), (2, 0), (4, 4)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_a_run_is_a_folder_with_all_that_the_contract_promises(whole):
    assert "epoch  12/12  loss" in whole.stdout
    assert any(line.startswith("whole ") for line in whole.stdout.splitlines())
    folder, saved = vit_helpers.RUNS / "whole", vit_helpers.SAVED_MODELS / "whole"
    assert {path.name for path in saved.iterdir()} == {"best.pt", "last.pt", "previous.pt", ".lock"}
    left = list(vit_helpers.RUNS.glob(f".job-{socket.gethostname()}-*@*"))
    assert (folder / "06_run.ipynb").exists() and not left
    results = json.loads((folder / "results.json").read_text())
    assert set(results) >= {"test_accuracy", "test_loss", "best_epoch", "val_loss", "epochs",
                            "seconds", "images_per_second", "parameters", "flops"}
    history = vit_helpers.read_history("whole")
    assert set(history) == {"epoch", *vit_helpers.TAGS}
    assert history["epoch"] == list(range(1, 13))
    assert results["val_loss"] == pytest.approx(min(history["loss/val"]), abs=1e-6)


def test_the_config_of_a_run_has_every_parameter_and_what_it_resolved_to(whole, training):
    config = json.loads((vit_helpers.RUNS / "whole" / "config.json").read_text())
    assert set(config) >= {*vit_helpers.default_parameters(), "code_hash", "git_commit", "versions",
                           "threads", "device_name", "classes", "parameters", "flops"}
    assert config["pool"] == "mean" and config["class"] == "TowerViT"
    assert config["learning_rate"] == training.RECIPES["adamw"]["learning_rate"]


def test_the_predictions_and_the_model_of_a_run_say_what_its_results_say(whole, digits, training):
    results = json.loads((vit_helpers.RUNS / "whole" / "results.json").read_text())
    with np.load(vit_helpers.RUNS / "whole" / "predictions.npz") as stored:
        assert set(stored.files) == {"logits", "labels", "images", "indices"}
        assert stored["logits"].shape == (359, 10) and stored["logits"].dtype == np.float16
        accuracy = (stored["logits"].argmax(1) == stored["labels"]).mean()
        guesses, labels = stored["logits"].argmax(1), stored["labels"]
    assert accuracy == pytest.approx(results["test_accuracy"], abs=0.01)
    balanced = sklearn.metrics.balanced_accuracy_score(labels, guesses)
    assert results["balanced_accuracy"] == pytest.approx(balanced, abs=0.01)
    with open(vit_helpers.RUNS / "whole" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == digits.classes
    sizes, rates = zip(*((int(row["test_images"]), float(row["test_accuracy"])) for row in rows),
                       strict=True)
    assert np.average(rates, weights=sizes) == pytest.approx(results["test_accuracy"], abs=1e-5)
    assert np.mean(rates) == pytest.approx(results["balanced_accuracy"], abs=1e-5)
    trained = [int(row["training_images"]) for row in rows]
    assert (sum(trained), sum(sizes)) == (len(digits.train), len(digits.test))
    model = vit_helpers.load_model("whole")
    again = training.evaluate(model, digits, digits.test, model.config)
    assert again["accuracy"] == pytest.approx(results["test_accuracy"])
    assert not model.training


def test_a_finished_run_is_left_alone(whole):
    again = train_job(*SMALL, "-r", "run", "whole")
    assert again.returncode == 0
    assert "run whole is done: nothing is trained again" in again.stdout
    assert "epoch   1/12" not in again.stdout


def start(run, **environment):
    """The small run by train_job.sh, as a process."""
    return subprocess.Popen(["bash", SCRIPT, *SMALL, "-r", "run", run], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, **environment})


def interrupt(run, setup):
    """Begin the run with a file to source, and ask it to stop by a signal after its first epoch."""
    process = start(run, VIT_SETUP=str(setup))
    for line in process.stdout:
        if "epoch   1/12" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "Stopped: asked to stop: saved in epoch" in rest and "the same command goes on" in rest


def descendants(process):
    """This process and all that descend from it, each after its parent."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            parents[int(path.parent.name)] = parent
    found = [process]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def is_alive(process):
    path = Path(f"/proc/{process}/cmdline")
    return path.exists() and bool(path.read_bytes())


def kill(process):
    """SIGKILL for a process and all that descend from it."""
    tree = descendants(process.pid)
    for one in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 60
    while any(is_alive(one) for one in tree):           # a large process takes a moment to go
        assert time.monotonic() < deadline
        time.sleep(0.1)


def kill_in_epoch(epoch, process, seconds):
    """Kill a run so many seconds after it says that this epoch is done."""
    shown = []
    for line in process.stdout:
        shown.append(line)
        if f"epoch {epoch:3}/12" in line:
            break
    time.sleep(seconds)
    assert process.poll() is None, "".join(shown)
    kill(process)


@pytest.mark.parametrize("number", range(int(os.environ.get("VIT_KILLS", 1))))
def test_interrupted_and_killed_it_goes_on_to_the_same_result(whole, tmp_path, number):
    """Asked to stop by a signal, where a file was sourced that says `set -e`; then killed at a
    random moment of its training (VIT_KILLS=20: twenty such runs); then left in peace."""
    run, numbers = f"disturbed-{number}", random.Random(number)
    setup = tmp_path / "setup.sh"
    setup.write_text(f"set -euo pipefail\nPATH='{Path(sys.executable).parent}':$PATH\n")
    interrupt(run, setup)
    assert not list(vit_helpers.RUNS.glob(f".job-{socket.gethostname()}-*@*"))
    kill_in_epoch(numbers.randint(3, 8), start(run), numbers.uniform(0, 0.3))
    process = start(run)
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 0, shown
    assert "goes on from its last checkpoint" in shown and "epoch   2/12" not in shown
    assert untimed(run) == untimed("whole")             # no epoch twice, none missing
    config = json.loads((vit_helpers.RUNS / run / "config.json").read_text())
    started = [each["started"] for each in config["tries"]]
    assert len(started) > 1 and started == sorted(set(started)) and started[-1] == config["started"]
    left = {path.name for base in (vit_helpers.RUNS, vit_helpers.SAVED_MODELS)
            for path in (base / run).iterdir() if "events.out.tfevents" not in path.name}
    assert left == {"best.pt", "last.pt", "previous.pt", ".lock", "config.json", "results.json",
                    "predictions.npz", "per_class.csv", "progress.log", "06_run.ipynb"}
    print(f"run {number}: killed, finished with the undisturbed result")


PARENT = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, lambda *_: None)
print("code", subprocess.Popen(sys.argv[1:]).wait(), flush=True)
"""


def test_interrupted_twice_it_ends_at_once_and_leaves_alone_who_started_it():
    """As JupyterLab's stop does, whose signal goes to the kernel's whole process group.  The first
    only asks, also where the shell of the node has made the file `stop` before."""
    command = [sys.executable, "-c", PARENT, "bash", SCRIPT, *SMALL, "-r", "run", "twice"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, start_new_session=True)
    shown = []
    for line in process.stdout:
        shown.append(line)
        if "run twice on" in line:
            all_below = descendants(process.pid)[1:]
            [job] = vit_helpers.RUNS.glob(f".job-{socket.gethostname()}-*@*")
            (job / "stop").touch()
        if "run twice on" in line or "INT: the training saves" in line:
            os.killpg(process.pid, signal.SIGINT)
    rest = "".join(shown)
    assert rest.index("INT: the training saves") < rest.index("interrupted twice: killed")
    assert shown[-1] == f"code {-signal.SIGKILL}\n" and process.wait(60) == 0
    assert len(all_below) > 2 and not any(map(is_alive, all_below))
    assert not list(vit_helpers.RUNS.glob(f".job-{socket.gethostname()}-*@*"))


def test_a_wrong_parameter_ends_it_at_once_and_the_last_line_says_why():
    shown = train_job("-p", "model", "vit", "-p", "epochz", "3")
    said = "unknown parameter 'epochz', did you mean 'epochs'? The parameters"
    assert shown.returncode != 0
    assert said in shown.stderr.strip().splitlines()[-1], shown.stderr


def test_help_is_the_head_of_the_script_and_an_equals_sign_is_explained():
    assert "sbatch train_job.sh" in train_job("--help").stdout
    shown = train_job("-p", "epochs=3", "-p", "model", "vit")
    assert shown.returncode == 2 and "write -p epochs 3, without =" in shown.stdout


@pytest.mark.parametrize("arguments", [["--epochs", "3"], ["vit"], ["-p", "epochs"]])
def test_wrong_options_are_refused(arguments):
    shown = train_job(*arguments)
    said = "options are -p NAME VALUE" in shown.stdout or "needs a value" in shown.stderr
    assert shown.returncode != 0 and said


# ---- several ranks

def test_the_losses_are_the_same_on_any_number_of_ranks(tmp_path):
    """With Muon, which has AdamW beside it: what they do, SGD does, too."""
    losses = {}
    for world_size, micro in RANKS:
        launcher = [*TORCHRUN, f"--nproc-per-node={world_size}"]
        command = launcher if world_size > 1 else [sys.executable]
        path = tmp_path / f"{world_size}-{micro}.json"
        script = vit_helpers.ROOT / "tests" / "train_on_ranks.py"
        shown = subprocess.run([*command, script, path, str(micro), "muon"],
                               capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        losses[world_size, micro] = json.loads(path.read_text())
        threads = losses[world_size, micro]["threads"]
        assert not [name for name in threads if "gloo" in name]     # left, they may abort it
    one = losses[1, 0]
    for (world_size, micro), other in losses.items():
        difference = np.abs(np.array(other["losses"]) - one["losses"]).max()
        print(f"{world_size} ranks, micro-batches of {micro or 'all'}: "
              f"largest difference of 50 losses {difference:.1e}")
        assert difference < 1e-9
        assert other["validation"] == pytest.approx(one["validation"], abs=1e-9)


ONE_RANK = """
import sys
sys.path[:0] = sys.argv[1:3]
import jobs, pathlib, vit_helpers
training = vit_helpers.load_notebook('04_training')
training.start_processes({'device': 'cpu'})
config, data = jobs.small_config(epochs=3), vit_helpers.load_notebook('02_data').load_data('digits')
folder = pathlib.Path(sys.argv[3], str(vit_helpers.ranks()[0]))
training.train_and_validation_loop(vit_helpers.build_model(config), data, config, folder)
"""


def test_ranks_that_see_different_checkpoints_all_stop(tmp_path, settings, train):
    """As on nodes whose disk is not shared: rank 0 finds a checkpoint, rank 1 does not.  Nobody
    waits for the other."""
    train(settings(epochs=1), tmp_path / "0")
    script = tmp_path / "rank.py"
    script.write_text(ONE_RANK)
    tests = vit_helpers.ROOT / "tests"
    shown = subprocess.run([*TORCHRUN, "--nproc-per-node=2", script, vit_helpers.ROOT, tests,
                            tmp_path], capture_output=True, text=True, timeout=300)
    assert shown.returncode != 0
    assert "the ranks read different checkpoints from" in shown.stderr
    assert "disk that all nodes share?" in shown.stderr
