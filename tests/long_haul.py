"""300 epochs on digits: does memory grow, do files stay open, how large is the log?  python tests/long_haul.py"""
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

training = vit_helpers.load_notebook("06_run")
process, seen = psutil.Process(), []
config = small_config(epochs=300, run="long")
device = training.start_processes("cpu")
data = vit_helpers.load_data("digits")
folder, writer, _ = training.open_run(config)
vit_helpers.train_and_validation_loop(vit_helpers.build_model(config), data, config, 300, device, writer, folder,
                                      on_epoch=lambda history, epochs: seen.append((process.memory_info().rss / 2**20, process.num_fds())))
training.close_run(config, writer)
quarters = [seen[:75], seen[-75:]]
log = sum(path.stat().st_size for path in (vit_helpers.RUNS / "long").glob("events*"))
print(json.dumps({f"{when} quarter: {what}": round(statistics.mean(row[i] for row in rows), 1) for when, rows in zip(("first", "last"), quarters)
                  for i, what in enumerate(("memory, MiB", "open files"))} | {"TensorBoard log, KiB": round(log / 1024)}, indent=1))
