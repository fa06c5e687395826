"""300 epochs on digits: does memory grow, do files stay open, how large is the log?

python tests/long_haul.py
"""
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ["VIT_HOME"] = tempfile.mkdtemp()

import psutil

import vit_helpers
from jobs import small_config

training, running = vit_helpers.load_notebook("04_training"), vit_helpers.load_notebook("06_run")
process, seen = psutil.Process(), []
config = small_config(epochs=300, run="long")
training.start_processes({"device": "cpu"})
data = vit_helpers.load_notebook("02_data").load_data("digits")
folder, writer, _ = running.open_run(config)


def measure(history):
    """Remember the memory and the open files after an epoch."""
    seen.append((process.memory_info().rss / 2**20, process.num_fds()))


model = vit_helpers.build_model(config)
training.train_and_validation_loop(model, data, config, folder, writer, measure)
running.close_run(config, writer)
found = {}
for when, rows in (("first", seen[:75]), ("last", seen[-75:])):
    for i, what in enumerate(("memory, MiB", "open files")):
        found[f"{when} quarter: {what}"] = round(statistics.mean(row[i] for row in rows), 1)
log = sum(path.stat().st_size for path in (vit_helpers.RUNS / "long").glob("events*"))
print(json.dumps({**found, "TensorBoard log, KiB": round(log / 1024)}, indent=1))
