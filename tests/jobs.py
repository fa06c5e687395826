"""What tests of the job script share: a small run, the script, a run's numbers without timings."""
import os
import subprocess

import vit_helpers

SCRIPT = vit_helpers.ROOT / "train_job.sh"
SMALL = ["-p", "model", "towervit-matched", "-p", "dims", "16,32", "-p", "head_dim", "8",
         "-p", "epochs", "12", "-p", "recipe", "adamw", "-p", "pool", "mean"]
TIMINGS = {"seconds", "time", "images_per_second"}


def train_job(*arguments, **environment):
    """The finished process, its output as text."""
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=300)


def untimed(run):
    """The history and the results of a run, timings aside."""
    run = vit_helpers.read_run(vit_helpers.RUNS / run)
    history = {tag: values for tag, values in run["history"].items() if tag not in TIMINGS}
    results = {name: value for name, value in run["results"].items() if name not in TIMINGS}
    return history, results


def small_config(**changes):
    """The config of a small run on digits, as notebook 6 makes it."""
    running = vit_helpers.load_notebook("06_run")
    parameters = {**vit_helpers.default_parameters(), "dims": "16,32", "head_dim": 8, **changes}
    config = running.configure(running.resolve(parameters), in_channels=1, num_classes=10)
    return {**config, "precision": "fp32"}
