"""The helper module of the notebook suite: what keeps house for the notebooks.

The ground floor, to be read from top to bottom: notebooks as modules · parameters · devices, ranks
and random numbers · images · files and checkpoints · run folders · trained models · figures.
What teaches is in the notebooks: the models in 01, data in 02, augmentation in 03, the training
loop in 04.  Of these the helper knows 01 alone, to build the model of a checkpoint.
"""
import ast
import contextlib
import difflib
import hashlib
import io
import itertools
import json
import linecache
import logging
import math
import numbers
import os
import re
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent
# VIT_HOME: another place for data, runs and checkpoints, such as a cluster's scratch disk.  A
# relative one is meant where the command was typed; a kernel's PWD is where JupyterLab was started.
KERNELS_PWD = os.environ.get("PWD") if "ipykernel" in sys.modules else None
TYPED_IN = os.environ.get("VIT_CWD") or KERNELS_PWD or os.getcwd()
HOME = Path(os.path.abspath(os.path.join(
    TYPED_IN, os.path.expanduser(os.environ.get("VIT_HOME") or ROOT))))
DATA, RUNS, SAVED_MODELS = HOME / "data", HOME / "runs", HOME / "saved_models"
NOTEBOOKS = ROOT / "notebooks"


# ---------------------------------------------------------------- notebooks as modules

def notebook_cells(path):
    """The cells of a notebook file; waits up to two seconds where JupyterLab is just saving it."""
    for attempt in range(20):
        try:
            return json.loads(path.read_text(encoding="utf-8"))["cells"]
        except ValueError:
            if attempt == 19:
                raise
            time.sleep(0.1)


def exported_cells(name):
    """(cell number, source) of each code cell of notebooks/<name>.ipynb that begins `#| export`."""
    path = NOTEBOOKS / f"{name}.ipynb"
    if not path.exists():
        there = sorted(each.stem for each in NOTEBOOKS.glob("*.ipynb"))
        raise FileNotFoundError(f"no notebook {path}; there are {there}")
    cells = [(number, "".join(cell["source"]))
             for number, cell in enumerate(notebook_cells(path), 1) if cell["cell_type"] == "code"]
    return [(number, source) for number, source in cells if source.startswith("#| export")]


def code_hash(name="01_models"):
    """A short hash of a notebook's exported cells.  A run records that of the models."""
    sources = [source for _, source in exported_cells(name)]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()[:12]


def load_notebook(name):
    """The exported cells of notebooks/<name>.ipynb as a module.

    The module enters `sys.modules` before its code runs (dataclasses and pickle look it up there)
    and each cell's source enters `linecache`, so that a traceback shows the line and names the
    cell.  It is loaded again only if one of its own exported cells has changed; after a change in
    a notebook that it loads, restart the kernel.  The module's name begins with a letter:
    TorchScript writes it into a traced model, and could not read it otherwise.
    """
    digest = code_hash(name)
    earlier = sys.modules.get(name)
    if getattr(earlier, "__code_hash__", None) == digest:
        return earlier
    module = types.ModuleType(f"notebook_{name}")
    module.__code_hash__ = digest
    module.__file__ = str(NOTEBOOKS / f"{name}.ipynb")
    sys.modules[name] = sys.modules[module.__name__] = module
    try:
        for number, source in exported_cells(name):
            where = f"{name}.ipynb, cell {number}"
            linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)
            exec(compile(source, where, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name], sys.modules[module.__name__]
        if earlier is not None:
            sys.modules[name] = sys.modules[module.__name__] = earlier
        raise
    return module


# ---------------------------------------------------------------- parameters

# name: (type, default) of the parameters of 06_run.  None: what suits the data set and the recipe.
PARAMETERS = {
    "model": (str, "vit"), "dataset": (str, "digits"), "recipe": (str, None),
    "epochs": (int, None), "batch_size": (int, None), "micro_batch_size": (int, None),
    "learning_rate": (float, None), "warmup_epochs": (float, None), "weight_decay": (float, None),
    "schedule": (str, None), "momentum": (float, None), "grad_clip": (float, None),
    "label_smoothing": (float, None), "class_weights": (str, None),
    "augment": (str, None), "mix": (float, None), "ema_decay": (float, None),
    "image_size": (int, None), "patch_size": (int, None), "dims": (str, None),
    "depth": (int, None), "head_dim": (int, None), "mlp_ratio": (float, None),
    "pool": (str, None), "merge_at": (str, None), "stem": (str, None),
    "pos_embed_std": (float, None), "dropout": (float, None), "drop_path": (float, None),
    "val_fraction": (float, None), "initial_weights": (str, None), "seed": (int, 0),
    "device": (str, None), "precision": (str, None), "threads": (int, None),
    "compile": (bool, False), "workers": (int, 2), "run": (str, None),
}
RANGES = [      # names, whether a value is in their range, and the range in words
    ("epochs batch_size micro_batch_size image_size patch_size depth head_dim",
     lambda value: value >= 1, "1 or more"),
    ("threads", lambda value: 1 <= value <= 1024, "from 1 to 1024"),
    ("seed", lambda value: 0 <= value < 2**32, f"from 0 to {2**32 - 1}"),
    ("workers", lambda value: value >= 0, "0 or more"),
    ("learning_rate grad_clip warmup_epochs weight_decay pos_embed_std",
     lambda value: 0 <= value < math.inf, "a finite number, 0 or more"),
    ("mlp_ratio", lambda value: 0 < value < math.inf, "a finite number above 0, usually 2 to 4"),
    ("momentum label_smoothing ema_decay dropout drop_path",
     lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("mix", lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("val_fraction", lambda value: 0 < value < 1,
     "above 0 and below 1: the best epoch is chosen on these data"),
]


def default_parameters():
    """{name: default} of the parameters of 06_run."""
    return {name: default for name, (_, default) in PARAMETERS.items()}


def check_parameters(namespace, known=None):
    """A notebook's parameters out of its `globals()`, each checked for its name and type.

    known: {name: (type, default)}; those of 06_run if left out.  Call it after the parameters cell.
    None means 'left open' and becomes the default; so does a parameter whose line was deleted from
    the cell before this was run again.  ValueError names a parameter that the notebook does not
    know (papermill only warns of one) or a value of the wrong type.
    """
    known = known or PARAMETERS
    unknown, deleted = names_given(namespace.get("In", []), known)
    refuse_unknown(unknown, known, "; let the name of a variable of your own begin with _")
    given = {name: namespace.get(name) for name in known if name not in deleted}
    return typed_parameters(given, known)


def typed_parameters(given, known=PARAMETERS):
    """{name: value} of every parameter of `known` (those of 06_run if left out), by those that are
    given: None, or one left out, becomes the default.

    ValueError names a parameter that is not known or a value of the wrong type.
    """
    refuse_unknown(set(given) - set(known), known)
    return {name: as_type(name, given.get(name), kind, default)
            for name, (kind, default) in known.items()}


def refuse_unknown(names, known, advice=""):
    """ValueError that names the first of these names, if there is one, and those that are known."""
    for name in sorted(names):
        raise ValueError(f"unknown parameter {name!r}{did_you_mean(name, known)}"
                         f" The parameters are: {', '.join(known)}{advice}")


def names_given(sources, known):
    """(unknown, deleted) names, by the cells that were run.

    unknown: given values in the last cell that papermill injected, or in the parameters cell, and
    no parameters.  Variables are none: names that the cell itself reads, and those of loops, `with`
    and several on a line, unless they look like a parameter misspelt.
    deleted: parameters of an earlier version of the parameters cell that the last one lacks, and
    that no cell after it sets.
    """
    cells = [(is_injected(source), *names_in(source)) for source in sources
             if "check_parameters(" not in source]
    shares = [len(assigned & set(known)) for injected, assigned, _, _ in cells if not injected]
    enough = min((len(known) + 1) // 2, max(shares, default=0)) or 1        # to be that cell
    by_papermill, of_cell, deleted, before = set(), set(), set(), set()
    for injected, assigned, alone, read in cells:
        shared = assigned & set(known)
        deleted -= shared
        if injected:
            by_papermill = assigned
        elif len(shared) >= enough:
            misspelt = {name for name in assigned if did_you_mean(name, known) != "."}
            of_cell = {name for name in (alone | misspelt) - read if not name.startswith("_")}
            if len(shared) > max(4, len(known) // 2):
                deleted, before = deleted | before - shared, shared
    return (by_papermill | of_cell) - set(known), deleted


def is_injected(source):
    """Whether papermill wrote a cell: nothing but names and plain values."""
    return source.startswith("# Parameters") and not names_in(source)[2] - {"float"}


OWN_NAMES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp,
             ast.SetComp, ast.DictComp, ast.GeneratorExp)   # what these assign is their own


def names_in(source):
    """The names that a cell gives values to, in loops and conditions, too; those of them in lines
    such as `name = value`; and the names that it reads."""
    assigned, alone, read, nodes = set(), set(), set(), [parsed(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Name):
            (assigned if isinstance(node.ctx, ast.Store) else read).add(node.id)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            alone.update(target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            read.add(node.target.id)                        # epochs += 1
        if isinstance(node, OWN_NAMES):
            read.update(each.id for each in ast.walk(node) if isinstance(each, ast.Name))
        else:
            nodes.extend(ast.iter_child_nodes(node))
    return assigned, alone, read


def parsed(source):
    """The syntax tree of a cell, IPython's magics and commands of the shell among it; an empty one
    of what is no Python, such as a cell of %%bash."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    with contextlib.suppress(SyntaxError, ValueError):
        return compile(source, "cell", "exec", flags)
    from IPython.core.inputtransformer2 import TransformerManager
    source = re.sub(r"\A\s*%%(time|timeit|capture|prun)\b.*", "", source)     # Python below it
    with contextlib.suppress(SyntaxError, ValueError):
        return compile(TransformerManager().transform_cell(source), "cell", "exec", flags)
    return ast.Module([], [])


def as_type(name, value, kind, default=None):
    """`value` as `kind`: papermill's -p makes 7 of 007, 'true' of true and 2e5 a float; a cell may
    hold numbers and arrays of numpy's or torch's, ranges, lists, paths."""
    value = plain(value)
    if value is None or value == "None":
        return default
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind is str and isinstance(value, list):                     # dims = [64, 96]
            return ",".join(as_item(part) for part in value)
        if kind is str and isinstance(value, (str, numbers.Real, os.PathLike, torch.device)):
            if not isinstance(value, bool):
                return str(value)
        if kind in (int, float) and isinstance(value, (str, numbers.Real)):
            number = float(value)
            if not isinstance(value, bool) and (kind is float or number.is_integer()):
                return kind(number) if kind is float or isinstance(value, str) else int(value)
    raise ValueError(f"parameter {name!r} is {shortened(value)}, but it must be {kind.__name__}"
                     f"{'' if default is None else f', like {default!r}'}")


def plain(value):
    """Numbers of numpy and torch as Python's, arrays of them, tuples and ranges as lists."""
    if isinstance(value, np.floating):
        return float(str(value))                            # .1 in single precision is .1
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    return list(value) if isinstance(value, (tuple, range)) else value


def as_item(part):
    """A word or a whole number out of a list, as text; ValueError for anything else."""
    part = plain(part)
    if isinstance(part, str):
        return part
    if isinstance(part, bool) or int(part) != part:
        raise ValueError(f"{part!r} is no whole number")
    return str(int(part))


def check_ranges(parameters):
    """ValueError for a number that is out of its range; what is None or absent is left open."""
    for names, fits, rule in RANGES:
        for name in names.split():
            value = parameters.get(name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} is {shortened(value)}; it must be {rule}")


def show_errors_in_a_line():
    """For the commands of make: what the suite itself says of bad input, a ValueError or OSError
    raised here or in a notebook, ends in its own sentence; any other error keeps its traceback."""
    def show(kind, error, trace):
        *_, last = traceback.extract_tb(trace)
        is_ours = last.filename == __file__ or ".ipynb, cell " in last.filename
        if is_ours and issubclass(kind, (ValueError, OSError)):
            print(error, file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = show


def one_of(name, value, allowed):
    """`value`, if it is one of `allowed` but for capitals, as it is spelled there; else a
    ValueError that lists them."""
    if value in allowed:
        return value
    for word in allowed:
        if word.lower() == str(value).lower():
            return word
    raise ValueError(f"{name} is {value!r}{did_you_mean(value, allowed)}"
                     f" Allowed: {', '.join(allowed)}")


def did_you_mean(name, known):
    """", did you mean 'sgd'?" where a known name is near, else a full stop."""
    near = difflib.get_close_matches(str(name).lower(), list(known), 1)
    return f", did you mean {near[0]!r}?" if near else "."


def counted(number, what):
    """1, "thread" -> "1 thread"; 2 -> "2 threads".  The number may be text."""
    return f"{number} {what}{'' if str(number) == '1' else 's'}"


def signed(number, form="+.2f"):
    """A number as text with its sign: "−0.16", by a true minus sign."""
    return f"{number:{form}}".replace("-", "−")


def typed_path(path):
    """An absolute path, as it was meant where the command was typed: train_job.sh leaves that
    place in VIT_CWD.  Links are not followed."""
    base = os.environ.get("VIT_CWD") or os.getcwd()
    return Path(os.path.abspath(os.path.join(base, Path(path).expanduser())))


# ---------------------------------------------------------------- devices, ranks, random numbers

def pick_device(name=None):
    """The device called `name`; None picks CUDA, then Apple's MPS, then the CPU.

    ValueError if it is not there, and RuntimeError if this job was given GPUs which PyTorch cannot
    use: a job must not train for a night on the CPU because of a driver.
    """
    name = name or default_device()
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"               # a GPU for each rank
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        way, here = "leave it open to let the suite choose", torch.cuda.device_count()
        if "LOCAL_RANK" in os.environ and here:
            way = f"it has {counted(here, 'GPU')}: start no more processes"
        raise ValueError(f"device is {name!r}, which this machine cannot use "
                         f"({first_line(error)}); {way}, or say cpu") from error
    if device.type == "mps" and "RANK" in os.environ:
        raise ValueError("several processes cannot share the GPU of an Apple machine; say -p "
                         "device cpu, or start one process")
    return device


def first_line(error):
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def default_device():
    """"cuda", "mps" or "cpu": the best that works."""
    if torch.cuda.is_available():
        return "cuda"
    given = given_gpus()
    if given:
        try:
            torch.zeros(1, device="cuda")
            said = "no error"
        except (RuntimeError, AssertionError) as error:
            said = first_line(error)
        raise RuntimeError(f"this job was given GPUs ({given}), but PyTorch {torch.__version__} "
                           f"cannot use them: {said}. Install a PyTorch that fits the driver "
                           "(nvidia-smi shows it), or say -p device cpu to train without them")
    return "mps" if torch.backends.mps.is_available() else "cpu"


def given_gpus():
    """What says that this process was given NVIDIA GPUs, or "" if nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:             # SLURM says NoDevFiles, and CUDA stops at what is no GPU
        is_gpu = re.match(r"\d|GPU-|MIG-", visible.strip())
        return f"CUDA_VISIBLE_DEVICES={visible}" if is_gpu else ""
    by_slurm = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if by_slurm:
        return f"SLURM_GPUS_ON_NODE={by_slurm}" if by_slurm != "0" else ""
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = (shown.stdout + shown.stderr).strip().splitlines()
    there = said and (said[0].startswith("GPU") or "version mismatch" in said[0])
    return f"nvidia-smi: {said[0]}" if there else ""


def available_cores():
    """How many cores this process may use: by its affinity, its SLURM task, its container."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):                    # Linux
        cores = len(os.sched_getaffinity(0))
    task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(cores, int(task) if task.isdigit() else cores, cpu_quota()))


def cpu_quota(root=Path("/sys/fs/cgroup")):
    """The CPUs' worth of time that a container has (docker run --cpus 2), rounded up; infinite if
    there is no such limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:                                                # cgroups of version 1
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return math.inf
    return math.inf if quota in ("max", "-1\n") else math.ceil(int(quota) / int(period))


def ranks():
    """(this process's rank, world size), as torchrun says; (0, 1) on its own."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


OF_NOTEBOOKS = "JPY_SESSION_NAME", "VSCODE_PID"     # set where a person opened the notebook


def someone_watches():
    """Whether a person sees the output as it comes, so that a progress bar makes sense."""
    in_a_notebook = any(name in os.environ for name in OF_NOTEBOOKS)
    return in_a_notebook or sys.stderr.isatty()


def generator(*key):
    """A CPU random generator that depends on `key` alone, say (seed, epoch, step): nothing to save
    and nothing to restore."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def to_device(values, device):
    """A CPU tensor on the device.  The copy to a GPU is not waited for."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


# ---------------------------------------------------------------- images

class ImageFiles(torch.utils.data.Dataset):
    """Image files read when they are needed: item i is a uint8 tensor (C, S, S).

    It is here since the workers of a DataLoader unpickle it, and import it by its name.
    """

    def __init__(self, paths, channels, size):
        self.paths, self.channels, self.size = paths, channels, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if isinstance(i, (list, torch.Tensor)):                     # a subset, as a tensor gives
            return ImageFiles([self.paths[j] for j in i], self.channels, self.size)
        return read_image(self.paths[i], self.channels, self.size)


def read_image(source, channels, size):
    """A path, a PIL image, an array, a tensor, a file or its bytes -> uint8 tensor (C, size, size).

    Turned as its EXIF data say, first frame of an animation, transparent parts on white, other
    ranges of values brought to 0 to 255 (see `as_bytes`), shorter side brought to `size`, centre
    kept.  channels: 1 or 3.  Raises ValueError, with the path, for what cannot be read as an image.
    """
    try:
        image = open_image(source)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        if is_deep(image):
            image = Image.fromarray(as_bytes(np.asarray(image)))
        if image.mode == "La":                                      # premultiplied, as resized
            image = image.convert("LA")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        if channels == 1 or image.mode != "RGB":
            image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image).copy())         # (S, S) or (S, S, 3)
        return pixels.view(size, size, channels).permute(2, 0, 1)   # (C, S, S)
    except Exception as error:                  # Pillow raises a dozen kinds for broken files
        is_path = isinstance(source, (str, Path))
        name = os.path.abspath(source) if is_path else type(source).__name__
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def is_deep(image):
    """Whether a PIL image has one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def open_image(source):
    """Whatever `read_image` takes as a PIL image, upright."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (str, Path)) or hasattr(source, "read"):
        image = Image.open(source)
    else:
        return image_of_array(source)
    image.load()                        # an image that is damaged in its middle is an error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:                   # of whatever kind: odd EXIF data must not cost an image
        return image


def image_of_array(values):
    """A PIL image of an array, tensor or nested list (H, W), (H, W, C) or (C, H, W) with 1 to 4
    channels.  Where both ends could be the channels, an array's are last and a tensor's first."""
    array, channels_first = to_array(values), isinstance(values, torch.Tensor)
    if array.ndim == 3:
        fits = [end for end in (0, -1) if array.shape[end] in (1, 2, 3, 4)]
        if not fits:
            raise ValueError(f"its shape is {array.shape}, in which no end is 1 to 4 channels; "
                             "many grey images are (B, H, W, 1) or (B, 1, H, W)")
        if fits[0 if channels_first else -1] == 0:
            array = array.transpose(1, 2, 0)
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim != 2 and array.ndim != 3:
        raise ValueError(f"its shape is {array.shape}; one image is (H, W), (H, W, C) or (C, H, W)")
    if array.size == 0:
        raise ValueError("it has no pixels")
    return Image.fromarray(np.ascontiguousarray(as_bytes(array)))


def to_array(values):
    """An array of an array, a tensor wherever it is, nested lists, or what numpy can make one of.
    bfloat16, which numpy does not have, becomes float32."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def as_bytes(values, top=None):
    """An array of any type as uint8, where `top` (see `top_of`) becomes 255."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    top = top or top_of(values)
    return (values.clip(0, top).astype(np.float64) / top * 255).round().astype(np.uint8)


def top_of(values):
    """The largest value of the smallest usual range that holds all values of an array.

    Whole numbers: 0 to 255, else 12, 16 or 32 bits.  Floats: 0 to 1, else as whole numbers.
    ValueError for what is in no usual range, such as an image that is normalised already, or of 0
    to 16: taken for one of 0 to 255, it would be black.
    """
    if values.dtype.kind not in "uif":
        raise ValueError(f"its values are of type {values.dtype}, no real numbers")
    tops, rounding, odd = [255, 2**12 - 1, 2**16 - 1, 2**32 - 1], 0, False
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if values.dtype.kind == "f":
        tops, rounding, odd = [1, *tops], 1e-3, 1 + 1e-3 < high <= 16
    if odd or not -rounding <= low <= high <= tops[-1]:     # nor is a value that is not a number
        raise ValueError(f"its values go from {low:g} to {high:g}; give them from 0 to 1 or from "
                         "0 to 255, not normalised")
    return next(top for top in tops if high <= top + rounding)


def normalise(images, mean, std, size=None):
    """uint8 (B, C, H, W) -> float (B, C, size, size), by a mean and a standard deviation per
    channel on a scale of 0 to 1; size None: as it is."""
    mean = to_device(torch.tensor(mean), images.device).view(1, -1, 1, 1)
    std = to_device(torch.tensor(std), images.device).view(1, -1, 1, 1)
    images = images.float() / 255
    if size and images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        images = images.clamp(0, 1)                     # as `read_image` resizes: Pillow's bicubic
    return (images - mean) / std


# ---------------------------------------------------------------- files and checkpoints

def write_atomically(path, content):
    """Write bytes to a temporary file beside `path`, flush them to the disk, rename: a kill or a
    full disk at any moment leaves the old file or the new one, never half a one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error.strerror or error}. What was there before "
                      "is whole; make room or change the permissions, and give the same command "
                      "again") from error


def write_json(path, content):
    """Plain values as an indented JSON file, written atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path):
    """The content of a JSON file; ValueError names a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def save(path, content):
    """Write a checkpoint atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path):
    """The content of a checkpoint, on the CPU, under today's names.

    Only tensors and plain values are read: a pickle with code in it is refused.  ValueError if it
    is damaged.
    """
    raw = io.BytesIO(Path(path).read_bytes())       # an OSError here: not ours to read, not damaged
    try:
        content = torch.load(raw, map_location="cpu", weights_only=True)
    except Exception as error:
        if raw.getvalue().startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a pointer to a file; `git lfs pull` fetches it") from None
        said = first_line(error).split(". ")[0]
        raise ValueError(f"{path} is damaged or no checkpoint of this suite ({said})") from error
    if not isinstance(content, dict) or not {"model", "config"} <= set(content):
        raise ValueError(f"{path} is damaged or no checkpoint of this suite: "
                         "it has no model and config")
    content["config"] = renamed_config(content["config"])
    content["model"] = renamed(content["model"])
    return content


def fill(module, values, path):
    """Give a model or an optimizer the values that were saved in `path`; ValueError if they do not
    fit it."""
    try:
        module.load_state_dict(values)
    except (RuntimeError, ValueError, KeyError) as error:
        said = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} does not fit: it was written with other settings, or by another "
                         f"version of 01_models.ipynb ({said})") from error


# What earlier versions wrote: their name of a setting, a parameter of a model, an array: today's.
OLD_NAMES = {"clip": "grad_clip", "position_std": "pos_embed_std", "positions": "pos_embed",
             "pictures": "images", "places": "indices"}
# Settings that earlier versions did not know, and what they meant by that.
NEUTRAL = {"initial_weights": None, "mix": 0.0, "ema_decay": 0.0, "schedule": "cosine",
           "merge_at": [], "stem": "patch", "class_weights": None}


def renamed(mapping):
    """The same mapping under today's names."""
    return {OLD_NAMES.get(name, name): value for name, value in mapping.items()}


def renamed_config(config):
    """A run's config under today's names, with neutral values for settings that it lacks."""
    config = {**NEUTRAL, **renamed(config)}
    config["initial_weights"] = config["initial_weights"] or None
    if "model_settings" in config:
        config["model_settings"] = renamed(config["model_settings"])
    return config


# ---------------------------------------------------------------- run folders

TAGS = {"loss/train": "train_loss", "loss/val": "val_loss", "accuracy/train": "train_accuracy",
        "accuracy/val": "val_accuracy", "lr": "lr", "images_per_second": "images_per_second"}
# What may differ between two tries of one run: it does not change what is trained.
NOT_COMPARED = {"device", "workers", "compile", "micro_batch_size", "threads", "precision", "run",
                "depth"}
DATA_FACTS = ("classes", "images", "in_channels", "num_classes", "mean", "std")


def find(run, file, kind):
    """The folder of a run below <kind>/ here or, for published runs, in the repository, that holds
    `file`.  FileNotFoundError lists near names."""
    name = bare_name(run)
    places = list(dict.fromkeys([HOME / kind, ROOT / kind]))
    for place in places:
        if (place / name / file).exists():
            return place / name
    there = [str(path.parent.relative_to(place)) for place in places for path in place.rglob(file)]
    near = difflib.get_close_matches(name, there, 3, 0.4)
    said = f"no {file} of a run {name!r} in {places[0]}"
    if kind == "saved_models" and (RUNS / name / "config.json").exists():
        said += (f"; {RUNS / name} is there, so its model was deleted or its first epoch is not "
                 "over: the same command trains on")
    others = f"near it: {', '.join(near)}" if near else "`make runs` lists those that are there"
    raise FileNotFoundError(f"{said}; {others}")


def bare_name(run):
    """The name of a run without what tab completion puts around it: "runs/pets/", the path of its
    folder or of its best.pt -> "pets"."""
    name = re.sub(r"/best\.pt$", "", os.path.normpath(str(run)))
    if os.path.isabs(name) or name.startswith(".."):
        path = typed_path(name)
        inside = [place for place in (RUNS, SAVED_MODELS, ROOT / "runs", ROOT / "saved_models")
                  if path.is_relative_to(place)]
        return str(path.relative_to(inside[0])) if inside else name
    return re.sub(r"^(runs|saved_models)/", "", name)


def find_run(run):
    """The folder runs/<run>, here or in the repository; FileNotFoundError lists near names."""
    return find(run, "config.json", "runs")


def find_checkpoint(run):
    """The file best.pt of a run by its name, here or in the repository, or by its own path."""
    if str(run).endswith(".pt") and typed_path(run).is_file():
        return typed_path(run)
    return find(run, "best.pt", "saved_models") / "best.pt"


def refuse_changes(old, new, where, only=None):
    """ValueError that names every setting in which `new` differs from the run's own: two models
    are never mixed.  Settings that an old run does not know have their neutral values.  `only`: the
    names that count, if not all do."""
    old, new = renamed_config(old), renamed_config(new)
    changed = [name for name in changed_settings(old, new) if only is None or name in only]
    if not changed:
        return
    what = "; ".join(f"{name} was {shortened(old[name])} and is now {shortened(new.get(name))}"
                     for name in changed)
    ways = "Give it another name (-p run …), go back to the old settings, or delete its folders"
    if changed == ["epochs"]:
        ways += (f"; to train longer, start another run from the best model of this one: "
                 f"-r initial_weights {new.get('run')} -r run …")
    raise ValueError(f"this run was begun with other settings ({where}): {what}. {ways}")


def changed_settings(old, new):
    """The names of the settings and facts of the data that differ."""
    names = [*(name for name in PARAMETERS if name not in NOT_COMPARED), "optimizer", *DATA_FACTS]
    if "folder" in old and "folder" in new:
        names.remove("dataset")             # the same images are the same, wherever they lie
    changed = [name for name in names
               if name in old and comparable(name, old[name]) != comparable(name, new.get(name))]
    if "epochs" in changed and "warmup_epochs" in changed:
        if all(run["warmup_epochs"] == run["epochs"] / 10 for run in (old, new)):
            changed.remove("warmup_epochs")             # nobody set it: it follows the epochs
    return changed


def comparable(name, value):
    """What a setting's value means: kinds of augmentation and merging blocks in whatever order,
    numbers as they are after JSON and another processor's rounding."""
    if name == "augment":
        return set(str(value).replace(" ", "").split(","))
    if name == "merge_at":
        return sorted(value or ())
    if isinstance(value, (list, tuple)):
        return [round(item, 6) if isinstance(item, float) else item for item in value]
    return value


def shortened(value, most=80):
    """A value as text, cut where it is long, such as a list of a hundred classes."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def read_history(run):
    """{tag: list of values, one per epoch} and the epochs' numbers under "epoch", from the
    TensorBoard log of a run.

    Where the log was deleted or damaged, what last.pt holds fills the gaps.  An epoch that lacks a
    tag, or has a loss that is no number, is left out; ValueError if all are.
    """
    folder = find_run(run)
    values = read_log(folder)
    if not is_whole(values):
        for tag, kept in kept_history(bare_name(run)).items():
            values[tag] = {**kept, **values.get(tag, {})}
    epochs = sorted(set.intersection(*map(set, values.values()))) if "loss/val" in values else []
    if not epochs:
        raise ValueError(f"the TensorBoard log of run {run} in {folder} holds no epochs, and there "
                         "is no last.pt to take them from")
    return {"epoch": epochs, **{tag: [values[tag][epoch] for epoch in epochs] for tag in values}}


def read_log(folder):
    """{tag: {epoch: value}} of the TensorBoard log in a folder; an epoch that is there twice counts
    as it was written last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logging.getLogger("tensorboard").setLevel(logging.ERROR)     # a run that went on is no news
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in TAGS if tag in events.Tags()["scalars"]]
    return {tag: {event.step: event.value for event in events.Scalars(tag)
                  if math.isfinite(event.value)} for tag in tags}


def is_whole(values):
    """Whether a log, {tag: {epoch: value}}, has all tags for all epochs from the first on."""
    epochs = [sorted(values.get(tag, {})) for tag in TAGS]
    return bool(epochs[0]) and all(each == list(range(1, len(epochs[0]) + 1)) for each in epochs)


def kept_history(run):
    """{tag: {epoch: value}} of the epochs that last.pt of a run holds; {} if there is none."""
    try:
        rows = load_checkpoint(find(run, "last.pt", "saved_models") / "last.pt")["history"]
    except (OSError, ValueError, KeyError):
        return {}
    return {tag: {row["epoch"]: row[name] for row in rows} for tag, name in TAGS.items()}


def read_run(folder):
    """One run folder as a dict with run, folder, config, history and results (None if it is not
    finished); ValueError if there is no run in it."""
    if not (folder / "config.json").exists():
        empty = not any(folder.iterdir())
        raise ValueError("it is empty" if empty else "it has no config.json, so it is no run")
    base = RUNS if folder.is_relative_to(RUNS) else ROOT / "runs"
    name = str(folder.relative_to(base))
    config = renamed_config(read_json(folder / "config.json"))
    finished = (folder / "results.json").exists()
    results = read_json(folder / "results.json") if finished else None
    return {"run": name, "folder": folder, "config": config, "history": read_history(name),
            "results": results}


def run_folders(names):
    """The folders below runs/, here and in the repository, that fit one of the patterns and are
    not hidden, sorted.  Of a run that is in both, the one here.  A folder of folders, such as
    published/, is none."""
    found = {}
    for base in (RUNS, ROOT / "runs"):
        patterns = [bare_name(name).lstrip("/") or "*" for name in names]
        patterns = ["**" if each in (".", "runs") else each for each in patterns]
        patterns = [re.sub(r"(?<=[^/])\*\*|\*\*(?=[^/])", "*", each) for each in patterns]
        for folder in (path for pattern in patterns for path in base.glob(pattern)):
            parts = folder.relative_to(base).parts
            if folder.is_dir() and parts and not any(part.startswith(".") for part in parts):
                found.setdefault(folder.relative_to(base), folder)
    once = {folder.resolve(): folder for folder in found.values()}      # links
    return sorted(folder for folder in once.values() if (folder / "config.json").exists()
                  or not any(path.is_dir() for path in folder.iterdir()))


def read_runs(names=("**",), finished=False):
    """A dict (see `read_run`) for each run folder that fits one of `names`, patterns such as
    "published/digits-*".

    What is no run, half written or, with `finished`, not finished is skipped with a line that names
    it.  FileNotFoundError for a name that fits nothing, and if no run is left.
    """
    lost = [name for name in names if name != "**" and not run_folders([name])]
    if lost:
        raise FileNotFoundError(f"no run fits {' '.join(lost)} in {RUNS}; "
                                "`make runs` lists those that are there")
    runs = []
    for folder in run_folders(names):
        try:
            run = read_run(folder)
            if finished and not run["results"]:
                epochs = f"epoch {run['history']['epoch'][-1]} of {run['config']['epochs']}"
                raise ValueError(f"it is not finished: {epochs}")
            runs.append(run)
        except (OSError, ValueError, KeyError) as error:
            print(f"skipped {folder.name}: {error}", flush=True)
    if not runs and list(names) != ["**"]:
        kind = "finished run" if finished else "run"
        raise FileNotFoundError(f"no {kind} fits {' '.join(names)} in {RUNS}; "
                                "`make runs` lists those that are there")
    return runs


def data_name(config):
    """What a run's data set is called: its name, or that of its folder."""
    return Path(config.get("folder") or config["dataset"]).name


def print_runs(names=("**",)):
    """A line for each run: what `make runs` prints."""
    runs = read_runs(names)
    if not runs:
        print(f"no runs in {RUNS}")
        return
    width = max([len(run["run"]) for run in runs] + [3])
    print(f"{'run':{width}s} {'data':14s} {'model':17s} {'recipe':8s} {'epochs':>8s} "
          f"{'val loss':>9s} {'test':>7s}")
    for run in runs:
        config, history, results = run["config"], run["history"], run["results"]
        test = f"{100 * results['test_accuracy']:.2f}%" if results else "-"
        epochs = f"{history['epoch'][-1]}/{config['epochs']}"
        print(f"{run['run']:{width}s} {data_name(config):14s} {config['model']:17s} "
              f"{config['recipe']:8s} {epochs:>8s} {min(history['loss/val']):9.4f} {test:>7s}")


def read_predictions(run):
    """What the best model of a finished run said of the test set: a dict of logits (N, classes)
    float32 and labels (N,), and of some images (M, C, H, W) uint8 with their indices (M,)."""
    path = find_run(run) / "predictions.npz"
    if not path.exists():
        raise FileNotFoundError(f"run {run} has no {path.name}: {why_no_predictions(path.parent)}")
    try:
        with np.load(path) as stored:                   # allow_pickle is off: no code is run
            arrays = renamed({name: torch.from_numpy(stored[name]) for name in stored.files})
        return {**arrays, "logits": arrays["logits"].float()}
    except Exception as error:          # numpy, zipfile and zlib raise a dozen kinds
        raise ValueError(f"{path} is damaged ({first_line(error)})") from error


def why_no_predictions(folder):
    """What to do where a run's predictions are not there."""
    if not (folder / "results.json").exists():
        return "it is not finished. Train it to its end (the same command goes on), then come back"
    if list(SAVED_MODELS.glob(f"{bare_name(folder)}/last.pt")):
        return ("it was deleted. Delete results.json beside it, too, and give the same command "
                "again: the best model is tested, and nothing is trained")
    return f"it was deleted. Bring it back, or delete {folder} and train the run again"


# ---------------------------------------------------------------- trained models

def build_model(config):
    """A freshly initialised model from `config["class"]` and `config["model_settings"]`; seeded by
    `config["seed"]`."""
    torch.manual_seed(config["seed"])
    return new_model(config)


def new_model(config):
    """A model from `config["class"]` and `config["model_settings"]`, at random."""
    return getattr(load_notebook("01_models"), config["class"])(**config["model_settings"])


IMAGE_SETTINGS = ("classes", "mean", "std", "in_channels", "image_size")    # what `predict` asks


def load_model(run, device="cpu", needed=()):
    """The best model of a run ("digits-vit-sgd-seed0", "published/…", or the path of its best.pt),
    in eval mode; its settings are `model.config`.

    needed: names that this has to have, such as IMAGE_SETTINGS; ValueError for one that it lacks.
    """
    path = find_checkpoint(run)
    content = load_checkpoint(path)
    missing = {"class", "model_settings", *needed} - set(content["config"])
    if missing:
        raise ValueError(f"the checkpoint of run {run} has no {', '.join(sorted(missing))} in its "
                         "config, so it was not written by notebook 6; train the run again")
    with torch.random.fork_rng(devices=[]):         # the caller's random numbers stay as they are
        model = new_model(content["config"])
    fill(model, {name: value.float() for name, value in content["model"].items()}, path)
    model.config = content["config"]
    return model.to(device).eval()


@torch.no_grad()
def predict(run, images, top=3, batch_size=64):
    """Classify images with the best model of `run` (a name, or a model from `load_model`).

    images: one of whatever `read_image` takes, or many: a list or a generator of them, a batch as
    an array (B, H, W, C) or a tensor (B, C, H, W), or a folder.  Of a folder, files are taken in
    the order of their names; a line says how many were no images, and which is the first of these.
    Images are read and classified in batches.  Returns a list of (class name, probability), most
    probable first, for each image; for a single image, that list alone.
    """
    model = load_model(run, needed=IMAGE_SETTINGS) if isinstance(run, (str, Path)) else run
    config, folder = model.config, folder_of(images)
    single = folder is None and is_one_image(images)
    many, skipped = [images] if single else each_image(images, folder), []
    read = read_each(many, config["in_channels"], config["image_size"], skipped if folder else None)
    answers = []
    while batch := list(itertools.islice(read, batch_size)):
        batch = torch.stack(batch).to(next(model.parameters()).device)              # (B, C, S, S)
        logits = model(normalise(batch, config["mean"], config["std"]))
        found = logits.float().softmax(1).topk(min(top, len(config["classes"])))
        for values, indices in zip(*found, strict=True):
            names = [config["classes"][index] for index in indices]
            answers.append(list(zip(names, values.tolist(), strict=True)))
    if skipped:
        print(f"{len(skipped)} of {len(skipped) + len(answers)} files skipped as no readable "
              f"images, the first: {skipped[0]}", flush=True)
    return answers[0] if single else answers


def folder_of(images):
    """The folder that `images` are, or None."""
    path = Path(images).expanduser() if isinstance(images, (str, Path)) else None
    return path if path is not None and path.is_dir() else None


def is_one_image(images):
    """Whether these are one image rather than many; ValueError if they are neither."""
    if isinstance(images, (str, Path, Image.Image, bytes, bytearray, memoryview)):
        return True
    if is_array(images):
        shape = np.shape(images)
        grey = isinstance(images, (list, tuple)) and len(shape) == 3 and shape[-1] > 4
        return len(shape) != 4 and not grey
    if hasattr(images, "read"):
        return True
    if not hasattr(images, "__iter__"):
        raise ValueError(f"{images!r} is no image; give a path, an array, or a list of them")
    return False


def is_array(images):
    """Whether these are numbers: an array, a tensor, or lists in a list, as JSON has them."""
    if isinstance(images, (list, tuple)):
        return bool(images) and isinstance(images[0], (list, tuple))
    return isinstance(images, torch.Tensor) or hasattr(images, "__array__")


def each_image(images, folder):
    """Go through many images one by one.  The range of a batch's values is that of the whole: an
    image that is dark in it stays so."""
    if folder is not None:
        files = sorted(path for path in walk_files(folder) if path.is_file())
        if not files:
            raise ValueError(f"no images in {os.path.abspath(folder)}")
        return files
    if not is_array(images):
        return images
    array = to_array(images)
    top = None if array.dtype in (np.uint8, bool) else top_of(array)
    bytes_of_each = (as_bytes(image, top) for image in array)
    return map(torch.from_numpy, bytes_of_each) if torch.is_tensor(images) else bytes_of_each


def walk_files(folder):
    """Yield the path of each file below a folder, hidden ones left out; links are followed, each
    folder once."""
    seen = set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(inside)
        if place in seen:                               # a link to what is there already
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(inside, name) for name in names if not name.startswith("."))


def read_each(images, channels, size, skipped=None):
    """Read images one by one (see `read_image`).  What cannot be read goes to the list `skipped`,
    if there is one; else it ends with an error."""
    for image in images:
        image = Path(image).expanduser() if isinstance(image, (str, Path)) else image
        try:
            yield read_image(image, channels, size)
        except ValueError:
            if skipped is None:
                raise
            skipped.append(image)


# ---------------------------------------------------------------- figures

def set_style():
    """One look for every figure: notebooks/vit.mplstyle."""
    import matplotlib.pyplot as plt
    plt.style.use(NOTEBOOKS / "vit.mplstyle")


def check_titles(figure):
    """ValueError if a figure has several axes and one of them no title; colour bars and axes that
    are switched off, as those of image grids, need none."""
    axes = [axis for axis in figure.axes if axis.axison and axis.get_label() != "<colorbar>"]
    for number, axis in enumerate(axes if len(axes) > 1 else [], 1):
        if not any(axis.get_title(loc=place) for place in ("left", "center", "right")):
            raise ValueError(f"axis {number} of {len(axes)} in this figure has no title; set one, "
                             "so that a reader knows what it shows")


def save_figure(figure, name, output=None):
    """Write the figure to <output>/<name>.png, if there is an output, without a date or version
    inside, so that an unchanged figure stays the same file.  See `check_titles`."""
    check_titles(figure)
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(output) / f"{name}.png", metadata={"Software": None})


def show_images(images, titles=None, columns=8, size=1.1, colors=None):
    """Draw images (N, C, H, W), uint8 or float, in rows of `columns`, with a title each, on one
    scale from the lowest to the highest value.  Returns the figure."""
    import matplotlib.pyplot as plt
    images = torch.as_tensor(images).detach().cpu().float()
    images = (images - images.min()) / (images.max() - images.min() + 1e-9)
    rows = -(-len(images) // columns)
    height = size + (0.25 if titles else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, height * rows),
                                squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])                  # half of the time goes into ticks unseen
        axis.set_axis_off()
    for i, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        if titles:
            color = colors[i] if colors else "black"
            axis.set_title(titles[i], fontsize=8, color=color, pad=3, parse_math=False)
    return figure


def show_predictions(run, part=slice(None), columns=8, size=1.35):
    """Sample inference of a run: 16 test images drawn at random, then up to 16 errors, the most
    confident first.  Returns the figure.

    part: which of them; None is returned where there are none.  size: of an image, in inches.  A
    title says what the model sees and its confidence; where that is wrong it is red and says what
    the image is.
    """
    classes = read_json(find_run(run) / "config.json")["classes"]
    stored = read_predictions(run)
    images, indices = stored["images"][part], stored["indices"][part]
    if len(images) == 0:
        return None
    logits, labels = (stored[name][indices] for name in ("logits", "labels"))
    confidences, guesses = logits.softmax(1).max(1)
    titles = []
    for guess, confidence, label in zip(guesses, confidences, labels, strict=True):
        title = f"{classes[guess]} {100 * confidence:.0f}%"
        if guess != label:
            title += f"\nnot {classes[label]}"
        titles.append(title.replace("/", "/ "))
    colors = ["black" if right else "#B00020" for right in guesses == labels]
    return show_images(images, titles, columns, size, colors=colors)


def markdown_table(header, rows, sides="l"):
    """A Markdown table of anything that `str` writes.  `sides`: a letter for each column from the
    first on, l for left or r for right; the others are set to the right."""
    rules = [{"l": "---", "r": "--:"}[side] for side in sides.ljust(len(header), "r")]
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def plot_spread(axis, histories, tag, label, color, **line):
    """A curve over epochs: the mean over `histories` (from `read_history`), and a band from the
    lowest to the highest.  Epochs that one of them lacks are left out."""
    curves = [dict(zip(history["epoch"], history[tag], strict=False)) for history in histories]
    steps = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])    # (runs, epochs)
    if len(steps) == 1:
        line.setdefault("marker", "o")                  # a line of one point is not seen
    axis.plot(steps, values.mean(0), label=label, color=color, **line)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(values) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def fill_markers(output, texts):
    """Put each text of {marker: text} between `<!-- marker -->` and `<!-- /marker -->`, wherever
    these stand in README.md and RESULTS.md of the folder `output`.  What has no place in either is
    appended to README.md, which is made if it is missing.  ValueError for a marker without its
    pair, before anything is written."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / "README.md", output / "RESULTS.md"]
    contents = {file: file.read_text(encoding="utf-8") for file in files if file.exists()}
    contents.setdefault(files[0], "")
    for marker, text in texts.items():
        for file, content in contents.items():
            if content.count(f"<!-- {marker} -->") != content.count(f"<!-- /{marker} -->"):
                raise ValueError(f"{file}: of <!-- {marker} --> and <!-- /{marker} --> one is "
                                 "missing; put it back, or take both out")
        block = f"<!-- {marker} -->\n{text}\n<!-- /{marker} -->"
        pattern = re.compile(f"<!-- {re.escape(marker)} -->.*?<!-- /{re.escape(marker)} -->", re.S)
        places = [file for file, content in contents.items() if pattern.search(content)]
        for file in places:
            contents[file] = pattern.sub(block.replace("\\", r"\\"), contents[file])
        if not places:
            contents[files[0]] = f"{contents[files[0]].rstrip()}\n\n{block}\n".lstrip()
    for file, content in contents.items():
        write_atomically(file, content.encode())
