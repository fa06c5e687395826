"""What tests of runs share: a small run, the script, notebook 6 in this process, a run's numbers
without timings."""
import contextlib
import io
import os
import re
import shutil
import subprocess

import matplotlib.pyplot as plt
import pytest

import vit_helpers

SCRIPT = vit_helpers.ROOT / "train_job.sh"
SMALL = ["-p", "model", "towervit-matched", "-p", "dims", "16,32", "-p", "head_dim", "8",
         "-p", "epochs", "12", "-p", "recipe", "adamw", "-p", "pool", "mean"]
BOOK = vit_helpers.notebook_cells(vit_helpers.NOTEBOOKS / "06_run.ipynb")
CELLS = ["".join(cell["source"]) for cell in BOOK if cell["cell_type"] == "code"]
TINY = {"dims": "16,32", "head_dim": 8, "epochs": 3, "workers": 0}
NO_KERNEL = "Kernel died before replying|Kernel didn't respond"
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ for torch.compile")
TIMINGS = {"seconds", "time", "images_per_second"}


def train_job(*arguments, **environment):
    """The finished process, its output as text."""
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=300)


def with_a_kernel(run):
    """run(), a finished process; up to twice more where its kernel did not start, for two that
    start at the same moment may pick the same port."""
    for _ in range(3):
        done = run()
        if not re.search(NO_KERNEL, done.stderr):
            break
    return done


def parameters_cell(**changes):
    """The first cell of notebook 6, with the values of a small run and these at its end."""
    given = {**TINY, **changes}
    return "\n".join([CELLS[0], *(f"{name} = {value!r}" for name, value in given.items())])


def run_notebook(until=None, **changes):
    """Run notebook 6, cell by cell, as JupyterLab does, but in this process: all of it, or what
    comes before the cell `until`.  Returns what it printed."""
    cells = CELLS[1:CELLS.index(until)] if until else CELLS[1:]
    namespace, shown = {}, io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            for number, cell in enumerate([parameters_cell(**changes), *cells], 1):
                exec(compile(cell, f"06_run.ipynb, cell {number}", "exec"), namespace)
    finally:
        plt.close("all")
        for saved in list(namespace.get("LOCKS", ())):      # as when its kernel ends
            namespace["let_go"](saved)
    return shown.getvalue()


def untimed(run):
    """The history and the results of a run, timings aside."""
    run = vit_helpers.read_run(vit_helpers.RUNS / run)
    history = {tag: values for tag, values in run["history"].items() if tag not in TIMINGS}
    results = {name: value for name, value in run["results"].items() if name not in TIMINGS}
    return history, results


def small_config(**changes):
    """The config of a small run on digits, as notebook 6 makes it."""
    running = vit_helpers.load_notebook("06_run")
    parameters = {"dims": "16,32", "head_dim": 8, **changes}
    config = running.configure(running.resolve(parameters), in_channels=1, num_classes=10)
    return {**config, "precision": "fp32"}
