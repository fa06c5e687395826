"""`make sweep`: the product of parameters' values, trained on validation data alone, by several
processes if asked; killed, it goes on."""
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import vit_helpers
from jobs import SCRIPT

ASKED = ["learning_rate=0.03,0.1", "dims=8,16/16", "head_dim=8", "depth=2", "epochs=2",
         "at_once=1"]
TWO_BY_TWO = "learning_rate=0.03,0.1 drop_path=0,0.1"


def make_sweep(run, *words):
    """`make sweep` as one types it, in a group of processes of its own; .venv is used as it is."""
    command = ["make", "--old-file", ".venv/done", "sweep", f"RUN={run}", *words]
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.Popen(command, cwd=vit_helpers.ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True, env=environment)


def rows_of(running, run):
    """{plan_key: row without its seconds} of a sweep's lines."""
    rows = running.read_lines(vit_helpers.RUNS / run / "trials.jsonl")
    return {key: {name: value for name, value in row.items() if "seconds" not in name}
            for key, row in rows.items()}


def columns(table):
    """{setting: validation loss} as a sweep's table has them."""
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][2:]
    return {(row[1].strip(), row[2].strip()): row[3].strip() for row in rows}


def test_killed_it_goes_on_to_the_table_of_an_undisturbed_one(running, capsys):
    undisturbed, killed = (make_sweep(run, *ASKED) for run in ("undisturbed", "killed"))
    for line in killed.stdout:
        if line.startswith("1/4 done"):
            break
    os.killpg(killed.pid, signal.SIGKILL)               # its forked processes as well
    shown = undisturbed.communicate(timeout=200)[0]
    assert undisturbed.returncode == 0, shown
    first = rows_of(running, "killed")
    assert 1 <= len(first) < 4
    resumed = make_sweep("killed", *ASKED)
    again = resumed.communicate(timeout=200)[0]
    assert resumed.returncode == 0, again
    assert f"{4 - len(first)} of 4 runs to train" in again
    lines = (vit_helpers.RUNS / "killed" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 4                              # none was trained twice
    assert rows_of(running, "killed") == rows_of(running, "undisturbed")
    assert "test" not in json.loads(lines[0])["parameters"] and "test_" not in "".join(lines)
    table = (vit_helpers.RUNS / "undisturbed" / "sweep.md").read_text()
    assert "4 of 4 runs, on validation data alone" in table and table.strip() in shown
    again = (vit_helpers.RUNS / "killed" / "sweep.md").read_text()
    assert columns(again) == columns(table) and len(columns(table)) == 4
    assert (vit_helpers.RUNS / "undisturbed" / "losses.png").exists()
    vit_helpers.read_runs()
    assert "killed" not in capsys.readouterr().out      # a sweep's folder is not taken for a run


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("text, said", [
    ("drop_paht=0,0.1", "unknown parameter 'drop_paht', did you mean 'drop_path'?"),
    ("DATASET=digits learning_rate=0.1,0.2", "unknown parameter 'DATASET', did you mean 'dataset'"),
    ("learning_rate", "learning_rate has no value; write learning_rate=…, with , between"),
    ("learning_rate=0.1,,0.2", "learning_rate has an empty value"),
    ("dims=/8,16", "dims has an empty value; write dims=…, with / between"),
    ("drop_path=0,1.5", "drop_path is 1.5; it must be at least 0 and below 1"),
    ("epochs=1,2.5", "parameter 'epochs' is '2.5', but it must be int"),
    ("model=vit,vitt", "model is 'vitt', did you mean 'vit'?"),
    ("dims=64,64;96,96 depth=1,2", "dims is '64,64;96,96'; write whole numbers"),
    ("pool=cls,max", "pool is 'max'"),
    ("dataset=digits,mnist", "dataset cannot be swept: losses on other images cannot be compared"),
    ("workers=0,2 learning_rate=0.1,0.2", "workers cannot be swept: it does not change the model"),
    ("run=eight", "run is no parameter of a sweep: RUN=… names the sweep"),
    ("threads=1,2", "threads is no parameter of a sweep: a run has one core, or a GPU; at_once"),
    ("learning_rate=0.1 seed=0,1", "there is nothing to sweep: give a parameter"),
    ("", "there is nothing to sweep"),
    (f"{TWO_BY_TWO} RUN=", "RUN has no value"),
    (f"{TWO_BY_TWO} RUN=a:b", "run is 'a:b'; a run's name is letters, digits"),
    (f"{TWO_BY_TWO} RUN=../up", "run is '../up'; a run's name is letters, digits"),
    (f"{TWO_BY_TWO} RUN=taken", "is the folder of a run; give the sweep another name"),
    (f"{TWO_BY_TWO} RUN=there epochs=3", "(epochs was 2 and is now 3); give this one another name"),
    ("learning_rate=0.1,0.2 epochs=2 RUN=there",
     "(drop_path was several values and is now left open)"),
    (f"{TWO_BY_TWO} at_once=0", "at_once is 0; it must be 1 or more"),
    (f"{TWO_BY_TWO} at_once=two", "parameter 'at_once' is 'two', but it must be int"),
    (TWO_BY_TWO, "which sweep? Give it a name, RUN=…"),
])
def test_what_cannot_be_swept_is_refused_before_any_work(running, monkeypatch, text, said):
    monkeypatch.setattr(running, "train_plan", None)
    (vit_helpers.RUNS / "taken").mkdir(parents=True, exist_ok=True)
    (vit_helpers.RUNS / "taken" / "config.json").write_text("{}")
    running.open_sweep("there", running.sweep_plan(running.sweep_words(f"{TWO_BY_TWO} epochs=2")))
    with pytest.raises(SystemExit) as caught:
        running.run_sweep(text)
    print(caught.value)
    assert said in str(caught.value) and str(caught.value).startswith("sweep: ")
    (vit_helpers.RUNS / "taken" / "config.json").unlink()
    (vit_helpers.RUNS / "taken").rmdir()


def test_values_may_be_added_to_a_sweep(running):
    for text in (TWO_BY_TWO, "learning_rate=0.03,0.1,0.3 drop_path=0,0.1"):
        running.open_sweep("grows", running.sweep_plan(running.sweep_words(text)))
    first, more = (running.sweep_plan(running.sweep_words(text))
                   for text in (TWO_BY_TWO, f"{TWO_BY_TWO} seed=0,1"))
    running.open_sweep("grows", more)
    keys = [set(map(running.plan_key, plan)) for plan in (first, more)]
    assert keys[0] < keys[1] and len(keys[1]) == 2 * len(keys[0])       # nothing is trained twice


def test_a_sweep_does_not_go_on_with_other_images(running, tmp_path):
    """Their losses would stand in one table.  What a file browser leaves does not count."""
    trials = running.sweep_plan(running.sweep_words(f"{TWO_BY_TWO} dataset={tmp_path}"))
    (tmp_path / "cat").mkdir()
    for name in ("one.png", "two.png"):
        (tmp_path / "cat" / name).touch()
    folder = running.open_sweep("images", trials)
    (tmp_path / ".DS_Store").touch()
    assert running.open_sweep("images", trials) == folder
    (tmp_path / "cat" / "three.png").touch()
    with pytest.raises(ValueError, match="number of files in its folder was 2 and is now 3"):
        running.open_sweep("images", trials)


def test_words_are_read_as_make_writes_them(running):
    words = running.sweep_words(r"dataset=my\ photos/a,b dims=8,16/16 LOCKED=1 merge_at=/2")
    assert words == {"dataset": ["my photos/a,b"], "dims": ["8,16", "16"], "merge_at": ["", "2"]}


# ---------------------------------------------------------------- runs that fail or are taken

def fake_row(parameters, *_, **__):
    """In place of a training: a loss that follows from the parameters; some fail, some are
    killed."""
    rate = parameters["learning_rate"]
    if rate == 7:
        raise FloatingPointError("the training loss is nan")
    if rate == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    loss = abs(np.log10(rate) + 1) + parameters.get("seed", 0) / 10
    return {"parameters": {name: parameters[name] for name in parameters if name != "test"},
            "val_loss": loss, "val_accuracy": 0.5, "best_epoch": 1, "seconds": 1.0, "size": 10,
            "device_name": "a processor"}


def no_minutes(*_):
    return 0


def test_runs_that_fail_or_are_killed_are_named_and_the_others_trained(running, monkeypatch,
                                                                       capsys):
    monkeypatch.setattr(running, "train_to_a_line", fake_row)
    monkeypatch.setattr(running, "expected_minutes", no_minutes)
    with pytest.raises(SystemExit) as caught:
        running.run_sweep("RUN=fails learning_rate=0.01,7,9,0.1,1 at_once=2")
    said = str(caught.value)
    assert '"learning_rate": 7.0, "seed": 0}: FloatingPointError: the training loss is nan' in said
    assert '"learning_rate": 9.0, "seed": 0}: its process ended with code -9' in said
    shown = capsys.readouterr().out
    assert "5/5 done" in shown and "3 of 5 runs (the same command goes on" in shown
    assert "Lowest validation loss: learning_rate=0.1, 0.0000 (n = 1: it may be chance" in shown
    monkeypatch.setattr(running, "train_to_a_line", None)       # nothing is left to train
    running.run_sweep("RUN=fails learning_rate=0.01,0.1,1")
    assert "0 of 3 runs to train" in capsys.readouterr().out


def test_a_run_that_another_process_has_is_skipped(running, monkeypatch, tmp_path):
    monkeypatch.setattr(running, "train_to_a_line", fake_row)
    lines, trial = tmp_path / "trials.jsonl", {"learning_rate": 0.1, "test": False}
    held = []

    def held_lock(path, timeout):
        """A lock on a file that another holds already."""
        held.append(FileLock(path, is_singleton=False).acquire())
        return FileLock(path, timeout, is_singleton=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "FileLock", held_lock)
        assert running.train_unless_taken(trial, lines) is None
    assert not lines.exists()
    held[0].lock.release()
    for _ in range(2):
        assert running.train_unless_taken(trial, lines) is None
    assert len(lines.read_text().splitlines()) == 1
    assert [path.name for path in Path(tmp_path, ".trials.jsonl").iterdir()] == [".lock"]


# ---------------------------------------------------------------- which is best

def test_the_best_setting_is_that_of_the_lowest_mean_over_whole_sets_of_seeds(running):
    plan = running.sweep_plan({"learning_rate": [0.1, 0.3], "seed": [0, 1], "epochs": 2,
                               "drop_path": None})
    assert len(plan) == 4 and all(trial["test"] is False for trial in plan)
    losses = [0.5, 0.7, 0.4, 0.9]                       # means 0.60 and 0.65
    done = {running.plan_key(trial): {**fake_row(trial), "val_loss": loss}
            for trial, loss in zip(plan, losses, strict=True)}
    assert running.trial_losses(plan, done)[0][0]["learning_rate"] == 0.1
    assert "0.6000 ± 0.1414 |   2" in running.sweep_table(plan, done)
    assert "n = 2; the next is 0.0500 behind, less than two standard errors" in (
        running.sweep_verdict(plan, done))
    assert "seed" not in running.sweep_command(plan, done, "best")
    three = [trial for trial in plan if trial != plan[3]]       # the seed at 0.9 has failed
    assert running.trial_losses(three, done)[0][0]["learning_rate"] == 0.1
    del done[running.plan_key(plan[1])]
    assert running.trial_losses(plan, done)[0][0]["learning_rate"] == 0.3   # n = 2 before n = 1


def test_rates_at_which_the_loss_is_no_number_are_said_to_diverge(running):
    plan = running.sweep_plan({"learning_rate": [0.1, 100.0], "seed": [0, 1]})
    lost = {"val_loss": np.inf, "val_accuracy": 0.0, "best_epoch": 0}
    done = {running.plan_key(trial): fake_row(trial) for trial in plan}
    done.update({key: {**row, **lost} for key, row in done.items() if "100.0" in key})
    assert "(n = 2; the next diverged)" in running.sweep_verdict(plan, done)
    assert "diverged |" in running.sweep_table(plan, done)
    everything = {key: {**row, **lost} for key, row in done.items()}
    assert running.sweep_verdict(plan, everything).startswith("All settings diverged")


def test_the_command_trains_the_setting_that_was_tried(running):
    plan = running.sweep_plan({"dims": ["8,16", "16"], "merge_at": "", "head_dim": 8})
    done = {running.plan_key(trial): {"val_loss": len(trial["dims"]) == 2} for trial in plan}
    words = shlex.split(running.sweep_command(plan, done, "eight-best"))
    assert words[:2] == ["bash", Path(SCRIPT).name]
    given = dict(zip(words[3::3], words[4::3], strict=True))
    assert given == {"model": "vit", "dims": "8,16", "merge_at": "", "head_dim": "8",
                     "run": "eight-best"}


def test_a_best_value_at_the_end_of_those_tried_is_said(running):
    plan = running.sweep_plan({"learning_rate": [0.001, 0.01, 0.1]})
    done = {running.plan_key(trial): fake_row(trial) for trial in plan}
    assert "No learning_rate beyond 0.1 was tried." in running.sweep_verdict(plan, done)
    plan = running.sweep_plan({"drop_path": [0.0, 0.1, 0.2], "learning_rate": 0.1})
    done = {running.plan_key(trial): {**fake_row(trial), "val_loss": trial["drop_path"]}
            for trial in plan}
    assert "beyond" not in running.sweep_verdict(plan, done)        # nothing lies below 0
