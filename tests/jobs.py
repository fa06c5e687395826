"""What the tests of the job script share: a small run, the script, and what is left of a run's numbers without timings."""
import os
import subprocess

import vit_helpers

SCRIPT = vit_helpers.ROOT / "train_job.sh"
SMALL = ["-p", "model", "towervit-matched", "-p", "dims", "16,32", "-p", "head_dim", "8", "-p", "epochs", "12", "-p", "recipe", "adamw", "-p", "pool", "mean"]


def train_job(*arguments, **environment):
    """The finished process, its output as text."""
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def untimed(run):
    """The history and the results of a run, timings aside."""
    run = vit_helpers.read_run(vit_helpers.RUNS / run)
    history = {tag: values for tag, values in run["history"].items() if tag != "images_per_second"}
    return history, {name: value for name, value in run["results"].items() if name not in ("seconds", "images_per_second")}


def small_config(**changes):
    """The full settings of a small run on digits, as notebook 6 makes them."""
    settings = vit_helpers.resolve({**vit_helpers.default_parameters(), "dims": "16,32", "head_dim": 8, **changes})
    return {**vit_helpers.configure(settings, in_channels=1, num_classes=10), "precision": "fp32"}
