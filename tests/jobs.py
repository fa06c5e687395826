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
