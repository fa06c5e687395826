"""Run by torchrun, or alone: 50 steps in float64 with augmentation; rank 0 writes the step's losses as JSON to the given file."""
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import torch
import vit_helpers
from jobs import small_config


def train(micro_batch_size):
    """The losses of 50 steps, and what validation says afterwards."""
    settings = small_config(batch_size=30, micro_batch_size=micro_batch_size)
    data = vit_helpers.load_data("digits")
    model = vit_helpers.build_model(settings).double()
    network = torch.nn.parallel.DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    optimizer = vit_helpers.make_optimizer(model, settings)
    rank, world = vit_helpers.ranks()
    losses, state = [], {"epoch": 0, "step": 0}
    for step in range(50):
        share = torch.arange(30 * step, 30 * step + 30)[rank::world] % len(data.train)
        pictures, labels = next(data.train.batches([share]))
        totals = vit_helpers.train_step(network, optimizer, pictures, labels, data, settings, state, 30)
        losses.append(vit_helpers.sum_over_ranks([totals[0].item()])[0] / 30)
        state["step"] += 1
    return {"losses": losses, "validation": vit_helpers.evaluate(model, data, data.val, settings)}


training = vit_helpers.load_notebook("06_run")
training.start_processes("cpu")
result = train(int(sys.argv[2]))
training.end_processes()
result["threads"] = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
if vit_helpers.ranks()[0] == 0:
    Path(sys.argv[1]).write_text(json.dumps(result))
