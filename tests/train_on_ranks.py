"""Run by torchrun, or alone: 50 steps in float64 with augmentation; rank 0 writes their losses.

python tests/train_on_ranks.py losses.json micro_batch_size [recipe]    (micro_batch_size 0: whole)
"""
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch

import vit_helpers
from jobs import small_config

training = vit_helpers.load_notebook("04_training")


def train(micro_batch_size, recipe):
    """The losses of 50 steps, and what validation says afterwards."""
    config = small_config(batch_size=30, micro_batch_size=micro_batch_size or None, recipe=recipe,
                          class_weights="balanced" if recipe == "muon" else None)
    data = vit_helpers.load_notebook("02_data").load_data("digits")
    model = vit_helpers.build_model(config).double()
    state = training.start_training(model, data, config)
    if torch.distributed.is_initialized():
        state.network = torch.nn.parallel.DistributedDataParallel(model)
    rank, world_size = vit_helpers.ranks()
    losses = []
    for step in range(50):
        indices = torch.arange(30 * step, 30 * step + 30)[rank::world_size] % len(data.train)
        images, labels = next(data.train.batches([indices]))
        sums = training.train_step(state, images, labels)
        losses.append(training.sum_over_ranks([sums[0].item()])[0] / 30)
    return {"losses": losses, "validation": training.evaluate(model, data, data.val, config)}


training.start_processes({"device": "cpu"})
result = train(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "sgd")
training.end_processes()
threads = Path("/proc/self/task").glob("*/comm")
result["threads"] = [path.read_text().strip() for path in threads]
if vit_helpers.ranks()[0] == 0:
    Path(sys.argv[1]).write_text(json.dumps(result))
