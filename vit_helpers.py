"""The helper module of the notebook suite: what more than one notebook needs, and nothing else.

Read it top to bottom: notebooks as modules · presets and recipes · data · training · checkpoints · run folders ·
trained models · pictures.  The models themselves are in `notebooks/01_models.ipynb`, augmentation in `03_augmentation.ipynb`, folders of pictures
in `02_data.ipynb`.
"""
import ast
import bisect
import contextlib
import difflib
import gzip
import hashlib
import io
import json
import linecache
import math
import os
import re
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn     # now, for DDP imports it once there is a group; its functions' defaults then keep that alive to the very end
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageOps
from torch import nn
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent
HOME = Path(os.environ.get("VIT_HOME", ROOT))       # another place for data, runs and checkpoints: a cluster's scratch disk
DATA, RUNS, SAVED_MODELS = HOME / "data", HOME / "runs", HOME / "saved_models"
NOTEBOOKS, IMG = ROOT / "notebooks", ROOT / "img"


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
    """The code cells of notebooks/<name>.ipynb that begin with `#| export`, as (cell number, source) pairs."""
    path = NOTEBOOKS / f"{name}.ipynb"
    if not path.exists():
        raise FileNotFoundError(f"no notebook {path}; there are {sorted(p.stem for p in NOTEBOOKS.glob('*.ipynb'))}")
    cells = notebook_cells(path)
    sources = [(number, "".join(cell["source"])) for number, cell in enumerate(cells, 1) if cell["cell_type"] == "code"]
    return [(number, source) for number, source in sources if source.startswith("#| export")]


def code_hash(name="01_models"):
    """A short hash of the exported cells: a run records it, so that two versions of a model are never mixed."""
    return hashlib.sha256("\n".join(source for _, source in exported_cells(name)).encode()).hexdigest()[:12]


def load_notebook(name):
    """The exported cells of notebooks/<name>.ipynb as a module.

    The module enters `sys.modules` before its code runs (dataclasses and pickle look it up there) and each cell's source
    enters `linecache`, so a traceback shows the line and names the cell.  Loaded again only if an exported cell changed.
    """
    digest = code_hash(name)
    if getattr(sys.modules.get(name), "__code_hash__", None) == digest:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__code_hash__, module.__file__ = digest, str(NOTEBOOKS / f"{name}.ipynb")
    earlier, sys.modules[name] = sys.modules.get(name), module
    try:
        for number, source in exported_cells(name):
            where = f"{name}.ipynb, cell {number}"
            linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)
            exec(compile(source, where, "exec"), module.__dict__)
    except BaseException:
        sys.modules.pop(name)
        if earlier is not None:
            sys.modules[name] = earlier
        raise
    return module


# ---------------------------------------------------------------- presets and recipes

CONTESTANTS = ("vit", "towervit", "towervit-wide", "towervit-matched")

# What an empty or zero parameter means.  A data set's preset is a model and a schedule that suit it and two CPU cores.
PRESETS = {
    "digits": dict(image_size=8, patch_size=2, dims="48,64,80,112", head_dim=16, epochs=40, batch_size=32, augment="crop"),
    "mnist": dict(image_size=28, patch_size=7, dims="48,64,80,112", head_dim=16, epochs=20, batch_size=128, augment="none"),
    "fashion-mnist": dict(image_size=28, patch_size=7, dims="48,64,80,112", head_dim=16, epochs=20, batch_size=128, augment="flip"),
    "cifar10": dict(image_size=32, patch_size=4, dims="64,64,96,96,128,128,192,192", head_dim=32, epochs=100, batch_size=128,
                    augment="crop,flip"),
    "svhn": dict(image_size=32, patch_size=4, dims="64,64,96,96,128,128,192,192", head_dim=32, epochs=50, batch_size=128,
                 augment="crop"),
}
DATASETS = [*PRESETS, "cifar100"]
PRESETS["cifar100"] = PRESETS["folder"] = PRESETS["cifar10"]
COMMON = dict(mlp_ratio=2, pool="cls", dropout=0.0, drop_path=0.0, label_smoothing=0.1, clip=1.0, val_fraction=0.1,
              position_std=0.5, mix=0.0, ema_decay=0.0)

# `sgd` is SGD with momentum from the first step on, the choice of the project that inspired this one.  The ViT paper does
# not do that: it pre-trains with Adam (section 4.1) and uses SGD with momentum .9 and clipping at 1 to fine-tune (B.1.1).
RECIPES = {
    "sgd": dict(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw": dict(optimizer="adamw", learning_rate=2e-3, momentum=0.9, weight_decay=0.05),
    # After the best plain ViTs on small images (Lee et al. 2021, arXiv:2112.13492, and its code): MixUp or CutMix in half of the
    # pictures, label smoothing; the average of the weights (EMA) is what is judged and kept.  For 100 epochs and
    # more they add random erasing and drop path (augment="+erase", drop_path=0.1); in short runs these only slow the learning.
    "modern": dict(optimizer="adamw", learning_rate=2e-3, momentum=0.9, weight_decay=0.05, mix=0.5, ema_decay=0.99),
    # The paper's fine-tuning (B.1.1, table 4: learning rates from .001 to .06), the default where there are initial_weights.
    "finetune": dict(optimizer="sgd", learning_rate=0.01, momentum=0.9, weight_decay=0.0, batch_size=512, label_smoothing=0.0),
}

ZERO_COUNTS = {"warmup_epochs", "weight_decay", "momentum", "clip", "label_smoothing", "position_std", "dropout", "drop_path", "mix",
               "ema_decay"}


def left_open(name, value):
    """Whether a parameter leaves the choice to the preset: "" or 0, but -1 where 0 is a value of its own."""
    return value == "" or value == (-1 if name in ZERO_COUNTS else 0)


def default_parameters(notebook="06_run"):
    """The names and values of the cell tagged `parameters`: the one place where they are written."""
    cells = notebook_cells(NOTEBOOKS / f"{notebook}.ipynb")
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


def check_parameters(namespace, notebook="06_run"):
    """The notebook's parameters out of its `globals()`, each checked for its name and type.

    Call it after the parameters cell.  ValueError names a parameter that the notebook does not know (papermill only warns
    of one), in the cell that papermill injected or in an edited parameters cell, or a value of the wrong type.
    """
    known = default_parameters(notebook)
    cells = [assigned_names(source) for source in namespace["In"] if source.startswith("# Parameters")][-1:]
    cells += [names for names in map(assigned_names, namespace["In"]) if {"model", "dataset"} <= names][-1:]
    for name in sorted(set().union(*cells) - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"unknown parameter {name!r}{f', did you mean {near[0]!r}?' if near else '.'} "
                         f"The parameters of {notebook} are: {', '.join(known)}")
    return {name: as_type(name, namespace.get(name, default), default) for name, default in known.items()}


def assigned_names(source):
    """The names that a cell's plain assignments give values to."""
    with contextlib.suppress(SyntaxError):
        return {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign)
                for target in node.targets if isinstance(target, ast.Name)}
    return set()


def as_type(name, value, default):
    """`value` as the type of `default`: papermill's -p makes 7 of 007, 'true' of true and 2e5 a float."""
    if isinstance(default, bool):
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif isinstance(default, str):
        if isinstance(value, (str, int, float, os.PathLike)) and not isinstance(value, bool):
            return str(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(default, float) or float(value).is_integer():
            return type(default)(value)
    raise ValueError(f"parameter {name!r} is {value!r}, but it must be {type(default).__name__}, like {default!r}")


def one_of(name, value, allowed):
    """`value`, if it is one of `allowed`; else a ValueError that lists them."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        raise ValueError(f"{name} is {value!r}{f', did you mean {near[0]!r}?' if near else '.'} Allowed: {', '.join(allowed)}")
    return value


def resolve(parameters):
    """Parameters -> the full settings of a run: what was left open becomes the preset's and the recipe's value.

    Raises ValueError for a value that is not allowed, before any work is done.
    """
    one_of("model", parameters["model"], CONTESTANTS)
    if parameters["initial_weights"] and parameters["model"] != "towervit":
        raise ValueError(f"model is {parameters['model']!r}, but initial_weights are those of a TowerViT; add -p model towervit")
    parameters = {**parameters, "recipe": parameters["recipe"] or ("finetune" if parameters["initial_weights"] else "sgd")}
    recipe = RECIPES[one_of("recipe", parameters["recipe"], list(RECIPES))]
    kind = "folder" if is_path(parameters["dataset"]) else one_of("dataset", parameters["dataset"], DATASETS)
    given = {name: value for name, value in parameters.items() if not left_open(name, value)}
    settings = {**parameters, **COMMON, **PRESETS[kind], **recipe, **given}
    settings["dims"] = parse_dims(settings["dims"])
    if settings["depth"]:
        settings["dims"] = stretch(settings["dims"], settings["depth"])
    settings["depth"] = len(settings["dims"])
    if settings["augment"].startswith("+"):                 # what the data set allows, and more
        settings["augment"] = PRESETS[kind]["augment"].replace("none", "") + settings["augment"].replace("+", ",")
        settings["augment"] = settings["augment"].strip(",")
    if settings["warmup_epochs"] < 0:
        settings["warmup_epochs"] = settings["epochs"] / 10
    settings["run"] = settings["run"] or run_name(parameters, kind)
    check_settings(settings)
    return settings


RANGES = [("epochs batch_size", lambda value: value >= 1, "1 or more"), ("micro_batch_size seed workers", lambda value: value >= 0, "0 or more"),
          ("learning_rate clip warmup_epochs weight_decay", lambda value: 0 <= value < math.inf, "a finite number, 0 or more"),
          ("momentum label_smoothing ema_decay", lambda value: 0 <= value < 1, "at least 0 and below 1"), ("mix", lambda value: 0 <= value <= 1, "from 0 to 1"),
          ("val_fraction", lambda value: 0 < value < 1, "above 0 and below 1: the best epoch is chosen on these data")]


def check_settings(settings):
    """ValueError for a setting out of its range; what only concerns the model, the model checks itself."""
    for names, fits, rule in RANGES:
        for name in names.split():
            if not fits(settings[name]):
                raise ValueError(f"{name} is {settings[name]}; it must be {rule}")
    one_of("precision", settings["precision"] or "fp32", ("fp32", "bf16"))
    one_of("pool", settings["pool"], ("cls", "mean"))
    for part in settings["augment"].split(","):
        one_of("augment", part, load_notebook("03_augmentation").KINDS)
    with torch.device("meta"):                              # the model's own checks, before any data are read
        name, arguments = model_settings({**settings, "in_channels": 1, "num_classes": 2})
        getattr(load_notebook("01_models"), name)(**arguments)
    if not re.fullmatch(r"[\w][\w.,+=/-]*", settings["run"]) or ".." in settings["run"]:
        raise ValueError(f"run is {settings['run']!r}; a run's name is letters, digits and . , _ + = - (and / for folders)")


def parse_dims(text):
    """"64,64,96" -> [64, 64, 96]."""
    try:
        return [int(part) for part in str(text).split(",")]
    except ValueError:
        raise ValueError(f"dims is {text!r}; write whole numbers with commas between them, like 64,64,96") from None


def stretch(dims, depth):
    """`dims` drawn out or thinned to `depth` blocks: the same widths in the same order, as evenly as they go."""
    if depth < 1:
        raise ValueError(f"depth is {depth}; a model needs at least 1 block")
    return [dims[i * len(dims) // depth] for i in range(depth)]


def run_name(parameters, kind):
    """A folder name made of what was asked for: digits-vit-sgd-seed0, digits-vit-sgd-epochs2-seed0, …"""
    said = {"model", "dataset", "recipe", "seed", "run", "device", "workers", "compile"}
    parameters = {**parameters, "initial_weights": Path(parameters["initial_weights"]).stem}
    extra = [f"{name}{value}" for name, value in parameters.items() if name not in said and not left_open(name, value)]
    dataset = typed_path(parameters["dataset"]).resolve().name if kind == "folder" else parameters["dataset"]
    name = "-".join([dataset, parameters["model"], parameters["recipe"], *extra, f"seed{parameters['seed']}"])
    return re.sub(r"[^\w.,+=-]", "_", name)


def model_settings(settings):
    """The class name ("ViT" or "TowerViT") and the keyword arguments of the contestant `settings["model"]`.

    `towervit` has the ViT's first width throughout, `towervit-wide` its last, and `towervit-matched` the multiple of
    head_dim whose parameter count comes nearest to the ViT's.
    """
    names = ("image_size", "patch_size", "in_channels", "num_classes", "head_dim", "mlp_ratio", "pool", "dropout", "drop_path",
             "position_std")
    shared = {name: settings[name] for name in names}
    dims = settings["dims"]
    if settings["model"] == "vit":
        return "ViT", {**shared, "dims": dims}
    if settings["model"] == "towervit-matched":
        models, depth = load_notebook("01_models"), len(dims)
        with torch.device("meta"):                      # counting parameters needs their shapes, not their values
            wanted = count_parameters(models.ViT(**shared, dims=dims))
            count = lambda dim: count_parameters(models.TowerViT(**shared, dim=dim, depth=depth))
            widths = range(settings["head_dim"], max(dims) + 1, settings["head_dim"])
            place = bisect.bisect_left(widths, wanted, key=count)                       # the first with as many, or the end
            dim = min(widths[max(place - 1, 0):place + 1], key=lambda dim: abs(count(dim) - wanted))
        return "TowerViT", {**shared, "dim": dim, "depth": depth}
    return "TowerViT", {**shared, "dim": dims[0] if settings["model"] == "towervit" else dims[-1], "depth": len(dims)}


def configure(settings, in_channels, num_classes):
    """The settings and what they come to with such data: class and arguments of the model, as `build_model` takes them."""
    config = {**settings, "in_channels": in_channels, "num_classes": num_classes}
    config["class"], config["model_settings"] = model_settings(config)
    return config


def build_model(config):
    """A freshly initialised model from `config["class"]` and `config["model_settings"]`; seeded by `config["seed"]`."""
    torch.manual_seed(config["seed"])
    return getattr(load_notebook("01_models"), config["class"])(**config["model_settings"])


def count_parameters(model):
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model, image_shape):
    """Floating point operations of one image (C, H, W) going forward: two a multiply-add, matrix products only."""
    from torch.utils.flop_counter import FlopCounterMode
    was_training, parameter = model.training, next(model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    model.train(was_training)
    return counter.get_total_flops()


# ---------------------------------------------------------------- data

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")    # from the package dataset-fashion-mnist
IN_MEMORY = 4 * 2**30       # bytes of pictures that are kept as one tensor on the device; more than that is read as needed


class Files(torch.utils.data.Dataset):
    """Image files read when they are needed: item i is picture i as a uint8 tensor (C, S, S)."""

    def __init__(self, paths, channels, size):
        self.paths, self.channels, self.size = paths, channels, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if isinstance(i, (list, torch.Tensor)):                     # a subset, as a tensor gives
            return Files([self.paths[j] for j in i], self.channels, self.size)
        return read_picture(self.paths[i], self.channels, self.size)


class Split:
    """Pictures and labels of one part of a data set.

    pictures: uint8 tensor (N, C, H, W) on the training device, or `Files`.  labels: int64 tensor (N,) on that device.
    """

    def __init__(self, pictures, labels, device="cpu"):
        self.pictures = pictures if isinstance(pictures, Files) else pictures.to(device)
        self.labels = labels.to(device)

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        """The pictures at these places, in this order."""
        return Split(self.pictures[indices], self.labels[indices], self.labels.device)

    def batches(self, indices, workers=0):
        """Yield (pictures uint8 (B, C, H, W), labels (B,)) on the device for each index tensor of a list."""
        if isinstance(self.pictures, torch.Tensor):
            for index in indices:
                index = send(index, self.labels.device)
                yield self.pictures[index], self.labels[index]
        else:
            loader = torch.utils.data.DataLoader(self.pictures, batch_sampler=[index.tolist() for index in indices],
                                                 num_workers=workers, pin_memory=self.labels.is_cuda)
            for index, pictures in zip(indices, loader):
                yield pictures.to(self.labels.device, non_blocking=True), self.labels[index.to(self.labels.device)]


class Data:
    """A data set: `train`, `val` and `test` Splits, `classes` (names), `mean` and `std` (a value a channel), `notes` (lines)."""

    def __init__(self, train, val, test, classes, notes=(), image_size=0):
        self.train, self.val, self.test, self.classes, self.notes = train, val, test, list(classes), list(notes)
        self.image_size = image_size                            # what `normalise` brings pictures to; 0: as they are
        self.mean, self.std = channel_statistics(train)         # of the training part alone
        self.augmentation = load_notebook("03_augmentation")    # as it is now: an edit does not change a training on its way

    def prepare(self, pictures, labels, settings, draws, share):
        """What a training step learns from: augmented, normalised images and labels or, if images are mixed, shares of classes."""
        images = self.normalise(self.augmentation.augment(pictures, settings["augment"], draws, share)).contiguous()     # one layout, compiled once
        return self.augmentation.mix(images, labels, len(self.classes), settings["mix"], draws, share) if settings["mix"] else (images, labels)

    def normalise(self, pictures):
        """uint8 (B, C, H, W) -> float (B, C, S, S), each channel with mean 0 and sd 1 over the training pictures."""
        return normalise(pictures, self.mean, self.std, self.image_size)


def send(values, device):
    """A CPU tensor on the device; a GPU takes it when it gets there, and nobody waits for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def normalise(pictures, mean, std, size=0):
    """uint8 (B, C, H, W) -> float (B, C, size, size), by a mean and an sd a channel on a scale of 0 to 1; size 0: as it is."""
    mean, std = (send(torch.tensor(values), pictures.device).view(1, -1, 1, 1) for values in (mean, std))
    pictures = pictures.float() / 255
    if size and pictures.shape[-1] != size:
        pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    return (pictures - mean) / std


def channel_statistics(split, most=10_000):
    """Mean and standard deviation of each channel, on a scale of 0 to 1, over at most `most` pictures spread evenly."""
    index = torch.linspace(0, len(split) - 1, min(len(split), most)).long()
    number, total, squares = 0, 0, 0
    for batch, _ in split.batches(index.split(100)):
        values = batch.cpu().transpose(0, 1).flatten(1).double() / 255       # (C, B * H * W)
        number, total, squares = number + values.shape[1], total + values.sum(1), squares + values.square().sum(1)
    mean = total / number
    return mean.tolist(), (squares / number - mean ** 2).clamp_min(1e-6).sqrt().tolist()


def is_path(dataset):
    """Whether `dataset` means a folder of images rather than a data set known by name."""
    return dataset not in PRESETS and (os.sep in dataset or typed_path(dataset).is_dir())


def typed_path(path):
    """A path as it was meant where the command was typed: train_job.sh leaves that place in VIT_CWD."""
    return Path(os.environ.get("VIT_CWD", ".")) / Path(path).expanduser()


def load_data(dataset="digits", image_size=0, seed=0, val_fraction=0.1, device="cpu", channels=0):
    """A data set by name ("digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "svhn") or by the path of a folder.

    A folder holds <class>/<image>, or train|val|test/<class>/<image>.  Validation data, and in a folder without test/ the
    test data too, are drawn from the training data, stratified: validation by `seed`, test always the same.
    image_size: the side that pictures are brought to (those of a folder at once, others by `Data.normalise`); 0 means the
    preset's.  channels: 1 or 3; 0 means the data's own.
    Raises ValueError or FileNotFoundError, saying what is wrong and what to do.
    """
    if is_path(dataset):
        load_folder = load_notebook("02_data").load_folder
        train, val, test, classes, notes = load_folder(typed_path(dataset), image_size or PRESETS["folder"]["image_size"], channels)
    else:
        train, test, classes = load_named(dataset)
        (train, test), val, notes = [(as_channels(pictures, channels), labels) for pictures, labels in (train, test)], None, []
        image_size = image_size or PRESETS[dataset]["image_size"]
    if test is None:
        rest, test = split_indices(train[1], 0.1, 0, classes)
        test, train = take(train, test), take(train, rest)
    if val is None:
        rest, val = split_indices(train[1], val_fraction, seed, classes)
        val, train = take(train, val), take(train, rest)
    return Data(*(Split(*part, device) for part in (train, val, test)), classes, notes, image_size)


def load_data_of(config, device="cpu"):
    """The data set that a run was trained on, split as it was, by the run's config."""
    dataset = str(ROOT / config["folder"]) if config.get("folder") else config["dataset"]
    return load_data(dataset, config["image_size"], config["seed"], config["val_fraction"], device, config["in_channels"])


def take(part, indices):
    """The (pictures, labels) at these places."""
    return part[0][indices], part[1][indices]


def split_indices(labels, fraction, seed, classes=range(1000)):
    """Two lists of places in `labels`: the rest, and a stratified `fraction` drawn by `seed`."""
    from sklearn.model_selection import train_test_split
    counts = torch.bincount(labels)
    size = max(round(fraction * len(labels)), len(counts))          # at least one of each class
    if counts.min() < 2 or size > len(labels) - len(counts):
        raise ValueError(f"class {classes[counts.argmin().item()]!r} has {counts.min().item()} image(s) to draw training, validation "
                         "and test data from; give each class some more, or bring val/ and test/ folders")
    rest, drawn = train_test_split(range(len(labels)), test_size=size, stratify=labels, random_state=seed)
    return sorted(rest), sorted(drawn)


def as_channels(pictures, channels):
    """uint8 (N, C, H, W) with 1 or 3 channels; 0: as it is."""
    if channels in (0, pictures.shape[1]):
        return pictures
    from torchvision.transforms.v2 import functional
    return functional.rgb_to_grayscale(pictures) if channels == 1 else functional.grayscale_to_rgb(pictures)


def load_named(dataset):
    """(train, test, class names) of a data set known by name; train and test are (pictures uint8, labels)."""
    one_of("dataset", dataset, DATASETS)
    if dataset == "digits":
        from sklearn.datasets import load_digits
        digits = load_digits()
        pictures = torch.from_numpy(digits.images * (255 / 16)).round().byte()[:, None]
        labels = torch.from_numpy(digits.target).long()
        rest, test = split_indices(labels, 0.2, 0)
        train, test, classes = take((pictures, labels), rest), take((pictures, labels), test), [str(i) for i in range(10)]
    elif dataset == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        from torchvision.datasets import FashionMNIST
        train, test = ((read_idx(f"{part}-images-idx3")[:, None], read_idx(f"{part}-labels-idx1").long())
                       for part in ("train", "t10k"))
        classes = FashionMNIST.classes
    else:
        train, test, classes = load_torchvision(dataset)
    return train, test, classes


def read_idx(name):
    """One of the package's gzipped files as a uint8 tensor (format: http://yann.lecun.com/exdb/mnist)."""
    raw = gzip.decompress((DEBIAN_FASHION_MNIST / f"{name}-ubyte.gz").read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape.tolist()).copy())


def load_torchvision(dataset):
    """(train, test, class names) from torchvision, downloaded to data/ the first time."""
    import torchvision
    make = getattr(torchvision.datasets, TORCHVISION[dataset])
    parts = []
    for is_train in (True, False):
        where = dict(split="train" if is_train else "test") if dataset == "svhn" else dict(train=is_train)
        try:
            DATA.mkdir(parents=True, exist_ok=True)
            with FileLock(DATA / f".{dataset}.lock"), contextlib.redirect_stdout(io.StringIO()):     # one rank downloads
                part = make(DATA, download=True, **where)
        except Exception as error:
            raise FileNotFoundError(f"{dataset} is not in {DATA} and could not be downloaded ({error}). On a machine with a network "
                                    f"run `make data DATASET={dataset}` and copy {DATA.name}/ here") from error
        pictures = torch.as_tensor(np.asarray(part.data))
        pictures = pictures[:, None] if pictures.ndim == 3 else pictures
        pictures = pictures.permute(0, 3, 1, 2) if pictures.shape[-1] == 3 else pictures
        labels = torch.as_tensor(np.asarray(part.labels if dataset == "svhn" else part.targets)).long()
        parts.append((pictures.contiguous(), labels))
    return *parts, getattr(part, "classes", [str(i) for i in range(10)])


def read_picture(source, channels, size):
    """A path, a PIL image or an array of any mode and size -> uint8 tensor (channels, size, size).

    Turned as its EXIF data say, first frame of an animation, transparent parts on white, 16 bits scaled to 8 (floats: from 0
    to 1, or to 255 if there are larger ones), shorter side brought to `size`, centre kept.
    Raises ValueError, with the path, for what cannot be read as a picture.
    """
    try:
        image = source if isinstance(source, Image.Image) else \
            Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = np.asarray(image, dtype=np.float32)
            scale = 65535 if image.mode != "F" else 255 if values.max() > 1 else 1
            image = Image.fromarray((values / scale * 255).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        if channels == 1 or image.mode != "RGB":
            image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(image).copy()).view(size, size, channels).permute(2, 0, 1)
    except Exception as error:                  # Pillow raises a dozen kinds for broken files
        raise ValueError(f"{source if isinstance(source, (str, Path)) else type(source).__name__} "
                         f"cannot be read as a picture: {error}") from error


def generator(*key):
    """A CPU random generator that depends on `key` alone, say (seed, epoch, step): nothing to save, nothing to restore."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


# ---------------------------------------------------------------- device and processes

def pick_device(name=""):
    """The device called `name`; an empty name picks CUDA, then Apple's MPS, then the CPU.  ValueError if it is not there."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"               # a GPU for each rank
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {name!r}, which this machine cannot use ({str(error).splitlines()[0]}); "
                         "leave it empty to let the suite choose, or say cpu") from error
    return device


def ranks():
    """(this process's rank, how many there are), as torchrun says; (0, 1) on its own."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sum_over_ranks(values):
    """The numbers added up over all ranks, as a list of floats."""
    values = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        values = values.cuda() if dist.get_backend() == "nccl" else values     # NCCL moves GPU memory only
        dist.all_reduce(values)
    return values.tolist()


def someone_watches():
    """Whether a person sees the output as it comes (JupyterLab, VS Code, a terminal), so that a progress bar makes sense."""
    return "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ or sys.stderr.isatty()


# ---------------------------------------------------------------- training

def make_optimizer(model, settings):
    """SGD with momentum or AdamW.  Norms, biases, tokens and position embeddings are not decayed: only matrices are."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=settings["learning_rate"], momentum=settings["momentum"])
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=(settings["momentum"], 0.999))


def make_average(model, settings):
    """The exponential moving average of the weights with decay `ema_decay` a step, or None.  Polyak & Juditsky 1992."""
    if not settings["ema_decay"]:
        return None
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(settings["ema_decay"]))


def learning_rate_at(progress, settings, epochs):
    """The learning rate after `progress` epochs (a fraction counts): linear warm-up, then half a cosine down to zero."""
    warmup = settings["warmup_epochs"]
    if progress < warmup:
        return settings["learning_rate"] * progress / warmup
    return settings["learning_rate"] * (1 + math.cos(math.pi * (progress - warmup) / max(epochs - warmup, 1e-9))) / 2


def autocast(device, settings):
    """bf16 arithmetic where `settings` ask for it; weights, optimizer and softmax sums stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16) if settings["precision"] == "bf16" else contextlib.nullcontext()


def train_and_validation_loop(model, data, settings, epochs, device, writer=None, folder=None, on_epoch=None):
    """Train `model` for `epochs` passes over `data.train`, validate it after each, keep the best.  Returns the history.

    model: an nn.Module that maps float images (B, C, H, W) to logits (B, classes).  data: a `Data`.
    settings: optimizer, learning_rate, momentum, weight_decay, warmup_epochs, clip, label_smoothing, batch_size (of all
    ranks together), micro_batch_size (0: no gradient accumulation), augment, mix, ema_decay (0: none; else validation and
    best.pt are of the average of the weights), precision, seed, workers, compile.
    writer: a TensorBoard SummaryWriter or None.  folder: where best.pt (lowest validation loss), last.pt and previous.pt go,
    or None to keep nothing; training goes on from last.pt if there is one.  on_epoch: called with (history, epochs) after each.
    History: a dict an epoch with epoch, loss and accuracy of train (as trained: augmented, smoothed) and val, lr, seconds, …
    Under torchrun every rank calls it alike; rank 0 alone logs and saves.  Raises FloatingPointError when the loss is not
    finite, MemoryError when a step does not fit, `Stopped` when train_job.sh asks for it (by a file $VIT_JOB/stop): then last.pt holds the very step.
    """
    model.to(device)
    optimizer, average = make_optimizer(model, settings), make_average(model, settings)
    state = {"epoch": 0, "step": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0, "history": []}
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state.update(resume(folder, model, optimizer, average, settings))
    network = parallel_and_compiled(model, data, settings)
    log(writer, state["history"])
    save_now = lambda: folder and save_last(folder, model, optimizer, average, state, settings)
    judged = average.module if average else model
    while state["epoch"] < epochs:
        with explained(settings):
            train_one_epoch(network, optimizer, data, settings, epochs, state, average, save_now)
            row = finish_epoch(judged, optimizer, data, settings, state)
        if ranks()[0] == 0:
            if folder and row["val_loss"] <= min(past["val_loss"] for past in state["history"]):
                save(folder / "best.pt", {"model": judged.state_dict(), "config": settings, "epoch": row["epoch"]})
            save_now()
            log(writer, [row])
            if on_epoch:
                on_epoch(state["history"], epochs)
    return state["history"]


def parallel_and_compiled(model, data, settings):
    """What the steps go through: the model itself, DistributedDataParallel of it if there are other ranks, compiled if that is wanted and works."""
    compiles = settings["compile"] and can_compile(model, data, settings)
    network = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    return torch.compile(network) if compiles else network


@contextlib.contextmanager
def explained(settings):
    """Errors of PyTorch that another setting avoids, said in words that name the setting."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in first or "can't allocate memory" in first:
            pictures = settings["micro_batch_size"] or max(1, settings["batch_size"] // ranks()[1])
            raise MemoryError(f"out of memory with {pictures} pictures at a time ({first}). Give the same command with -p micro_batch_size "
                              f"{max(1, pictures // 2)}, which gives the same model, or less; what was saved is whole") from error
        raise


def can_compile(model, data, settings):
    """Whether torch.compile works on all ranks, tried on one batch; a warning says why not."""
    if ranks()[0] == 0:
        print("compiling the model, which takes about a minute", flush=True)
    share = min(settings["batch_size"], len(data.train)) // ranks()[1]
    pictures, labels = next(data.train.batches([torch.arange(min(settings["micro_batch_size"] or share, share))]))
    images, failed = data.normalise(pictures).to(next(model.parameters()).dtype), 0.0
    try:
        with explained(settings), autocast(labels.device, settings):
            torch.compile(model)(images).sum().backward()
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        failed = 1.0
        warnings.warn(f"torch.compile failed ({str(error).splitlines()[0]}): training goes on uncompiled. It needs a C++ compiler, such as g++")
    model.zero_grad(set_to_none=True)
    return not sum_over_ranks([failed])[0]


class Stopped(Exception):
    """Training was asked to stop and did, after saving; the same command goes on from there."""


def train_one_epoch(network, optimizer, data, settings, epochs, state, average=None, save_now=lambda: None):
    """The rest of epoch `state["epoch"]`, from step `state["step"]` on; `state` is updated in place, step by step.

    What happens in a step depends on (seed, epoch, step) alone: the order of the pictures, the augmentation and dropout.
    """
    rank, world = ranks()
    size = min(settings["batch_size"], len(data.train))
    if size < world:
        raise ValueError(f"a batch of {size} pictures cannot be shared by {world} ranks; use fewer, or a larger batch_size")
    order = torch.randperm(len(data.train), generator=generator(settings["seed"], state["epoch"]))
    steps = order.split(size)[:len(order) // size]                      # the last, smaller batch is left out
    shares = [indices[rank::world] for indices in steps[state["step"]:]]
    network.train()
    started, pending = time.perf_counter(), []
    bar = tqdm(total=len(steps), initial=state["step"], desc=f"epoch {state['epoch'] + 1}/{epochs}", leave=False,
               disable=rank > 0 or not someone_watches())
    for pictures, labels in data.train.batches(shares, settings["workers"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(state["epoch"] + state["step"] / len(steps), settings, epochs)
        pending.append(train_step(network, optimizer, pictures, labels, data, settings, state, size))
        if average:
            average.update_parameters(network)
        state["step"] += 1
        bar.update()
        if labels.device.type == "cpu" or len(pending) == 20 or state["step"] == len(steps):    # a GPU is not kept waiting
            count_in(pending, state, optimizer)
            state["seconds"], started = state["seconds"] + time.perf_counter() - started, time.perf_counter()
            stop_if_asked(state, save_now)
    bar.close()


def count_in(pending, state, optimizer):
    """Add the totals of the steps that are `pending` to the epoch's sums and forget them; FloatingPointError if the loss is not finite."""
    totals = (torch.stack(pending).cpu().double() * 2**20).round().sum(0) / 2**20        # exact, in whatever order
    state["sums"] = (torch.tensor(state["sums"], dtype=torch.float64) + totals).tolist()
    pending.clear()
    check_finite("training", state["sums"][0], state, optimizer)


def train_step(network, optimizer, pictures, labels, data, settings, state, size):
    """One step on this rank's share of a global batch of `size`.  Returns a tensor: summed loss, number right, number."""
    rank, world = ranks()
    key = (settings["seed"], state["epoch"], state["step"])
    torch.manual_seed(generator(*key, rank).initial_seed())             # for dropout and drop path
    images, targets = data.prepare(pictures, labels, settings, generator(*key), slice(rank, size, world))
    images = images.to(next(network.parameters()).dtype)
    optimizer.zero_grad(set_to_none=True)
    parts = range(0, len(labels), settings["micro_batch_size"] or max(1, len(labels)))
    totals = torch.zeros(3, device=labels.device, dtype=images.dtype)
    for start in parts:
        part = slice(start, start + (settings["micro_batch_size"] or len(labels)))
        last = start == parts[-1]
        with contextlib.nullcontext() if last or world == 1 else network.no_sync():
            with autocast(labels.device, settings):
                logits = network(images[part])
                loss = F.cross_entropy(logits, targets[part], label_smoothing=settings["label_smoothing"], reduction="sum")
            (loss * world / size).backward()                            # DDP takes the mean over ranks: together, the batch's mean
        right = (logits.argmax(1) == labels[part]).sum()
        totals += torch.stack([loss.detach(), right, torch.full_like(right, len(logits))])
    if settings["clip"]:
        nn.utils.clip_grad_norm_(network.parameters(), settings["clip"])
    optimizer.step()
    return totals


def check_finite(kind, loss, state, optimizer):
    """FloatingPointError if the loss is not a number any more, with where and what to try."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {kind} loss is {loss} in epoch {state['epoch'] + 1}, step {state['step']}, at learning rate "
                                 f"{optimizer.param_groups[0]['lr']:.3g}. The checkpoints of the epochs before are kept. Try a lower "
                                 "learning_rate, more warmup_epochs or clip 1, under another run name")


def finish_epoch(model, optimizer, data, settings, state):
    """Validate, add the epoch's row to `state["history"]` and go to the next epoch.  Returns the row."""
    started = time.perf_counter()
    loss, right, count = sum_over_ranks(state["sums"])
    row = {"epoch": state["epoch"] + 1, "train_loss": loss / count, "train_accuracy": right / count,
           **evaluate(model, data, data.val, settings, "val_"), "lr": optimizer.param_groups[0]["lr"], "images": int(count),
           "images_per_second": count / state["seconds"], "seconds": state["seconds"] + time.perf_counter() - started,
           "time": time.time()}
    check_finite("validation", row["val_loss"], state, optimizer)
    state["history"].append(row)
    state.update(epoch=state["epoch"] + 1, step=0, sums=[0.0, 0.0, 0.0], seconds=0.0)
    return row


@torch.no_grad()
def predict_split(model, data, split, settings, alone=False):
    """(logits float32, labels) on the CPU, in order: of this rank's share of a split or, if `alone`, of all of it."""
    rank, world = (0, 1) if alone else ranks()
    was_training = model.training
    model.eval()
    logits, labels = [], []
    device, dtype = split.labels.device, next(model.parameters()).dtype
    share = torch.arange(len(split))[rank::world].split(settings["micro_batch_size"] or max(1, settings["batch_size"] // ranks()[1]))
    for pictures, truth in split.batches(share, settings["workers"]):
        with autocast(device, settings):
            logits.append(model(data.normalise(pictures).to(dtype)).float().cpu())
        labels.append(truth.cpu())
    model.train(was_training)
    return torch.cat(logits), torch.cat(labels)


def evaluate(model, data, split, settings, prefix=""):
    """{"loss", "accuracy"} of a split, over all ranks; every picture counts once."""
    logits, labels = predict_split(model, data, split, settings)
    loss = F.cross_entropy(logits.double(), labels, reduction="sum").item()
    loss, right, count = sum_over_ranks([loss, (logits.argmax(1) == labels).sum().item(), len(labels)])
    return {f"{prefix}loss": loss / count, f"{prefix}accuracy": right / count}


# ---------------------------------------------------------------- checkpoints

def save(path, content):
    """Write a checkpoint so that a kill or a full disk at any moment leaves the old file or the new one, never half a one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def write_atomically(path, content):
    """Write bytes to a temporary file beside `path`, flush them to the disk, rename."""
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
        raise OSError(f"could not write {path}: {error.strerror or error}. What was there before is whole; "
                      "make room or change the permissions, and give the same command again") from error


def save_last(folder, model, optimizer, average, state, settings):
    """last.pt: all that a resume needs.  The one before stays as previous.pt."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": settings, **state}
    content["average"] = average.state_dict() if average else {}
    fresh = folder / "fresh.pt"
    save(fresh, content)
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(fresh, folder / "last.pt")


def load_checkpoint(path):
    """The content of a checkpoint, on the CPU.  Only tensors and plain values are read: a pickle with code in it is refused."""
    raw = io.BytesIO(Path(path).read_bytes())           # an OSError here: not there, or not ours to read, but not damaged
    try:
        content = torch.load(raw, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or no checkpoint of this suite ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or not {"model", "config"} <= set(content):
        raise ValueError(f"{path} is damaged or no checkpoint of this suite: it has no model and config")
    return content


def fill(module, values, path):
    """Give a model or an optimizer the values that were saved in `path`; ValueError if they do not fit it."""
    try:
        module.load_state_dict(values)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not fit: it was written with other settings, or by another version of 01_models.ipynb "
                         f"({str(error).splitlines()[-1].strip()})") from error


def resume(folder, model, optimizer, average, settings):
    """Put model, optimizer and the weights' average (or None) into the state of last.pt (or, if that is damaged, previous.pt); returns the loop's state."""
    path, content, damaged = read_last(folder)
    place = [content["epoch"], content["step"]] if content else [-1, -1]
    rank, world = ranks()
    if sum_over_ranks(place) != [world * number for number in place]:
        raise RuntimeError(f"the ranks read different checkpoints from {folder}; is it on a disk that all nodes share?")
    if not content:
        return {}
    for bad, error in damaged if rank == 0 else []:
        print(f"warning: {error}; going on from {path.name}", flush=True)
        bad.unlink(missing_ok=True)                     # or it would replace the good one at the next save
    refuse_changes(content["config"], settings, path)
    fill(model, content["model"], path)
    fill(optimizer, content["optimizer"], path)
    if average:
        fill(average, content["average"], path)
    return {"epoch": content["epoch"], "step": content["step"], "history": content["history"], "seconds": content["seconds"],
            "sums": content["sums"] if rank == 0 else [0.0, 0.0, 0.0]}


def read_last(folder):
    """(path, content, damaged) of the newest checkpoint that can be read, or (None, None, []); damaged: (path, error) of newer ones that cannot."""
    damaged = []
    for path in (folder / "last.pt", folder / "fresh.pt", folder / "previous.pt"):
        try:
            content = load_checkpoint(path) if path.exists() else None
        except ValueError as error:
            damaged.append((path, error))
            continue
        if content and not {"optimizer", "epoch", "step", "history", "seconds", "sums"} <= set(content):
            raise ValueError(f"{path} is a model, but holds no state of its training to go on from")
        if content:
            return path, content, damaged
    if damaged:
        raise ValueError("; ".join(str(error) for _, error in damaged) + f". No earlier checkpoint is readable; to train from the start, delete {folder}")
    return None, None, []


def stop_if_asked(state, save_now):
    """If train_job.sh has left a file `stop` in its job folder, save and raise `Stopped`, on all ranks after the same step."""
    job = os.environ.get("VIT_JOB")
    if not job or not sum_over_ranks([float(ranks()[0] == 0 and os.path.exists(f"{job}/stop"))])[0]:
        return
    state["sums"] = sum_over_ranks(state["sums"])
    if ranks()[0] == 0:
        save_now()
        Path(job, "saved").touch()                              # tells the script that this try made progress: it may requeue
    sum_over_ranks([0.0])                                       # nobody leaves before it is saved: torchrun would end all
    raise Stopped(f"asked to stop: saved in epoch {state['epoch'] + 1} after step {state['step']}; the same command goes on from there")


# ---------------------------------------------------------------- run folders

NOT_COMPARED = {"device", "device_name", "cores", "threads", "ranks", "versions", "git_commit", "workers", "compile", "micro_batch_size",
                "run", "started"}
ADDED = {"initial_weights": "", "mix": 0.0, "ema_decay": 0.0}         # parameters that older runs do not know, and what they meant before


def refuse_changes(old, new, where):
    """ValueError that names every setting in which `new` differs from the run's own: two models are never mixed."""
    old = {**{name: value for name, value in ADDED.items() if name in new}, **old}
    changed = [name for name in sorted({*old, *new} - NOT_COMPARED) if old.get(name) != new.get(name)]
    if changed:
        what = "; ".join("the exported code of 01_models.ipynb has changed" if name == "code_hash" else
                         f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in changed)
        raise ValueError(f"this run was begun with other settings ({where}): {what}. Give it another name (-p run …), "
                         "go back to the old settings, or delete the run's folders")


def run_folder(run):
    """The folder of a run by name, here or, for published/…, in the repository.  FileNotFoundError lists near names."""
    for base in (RUNS, ROOT / "runs"):
        if (base / run / "config.json").exists():
            return base / run
    names = [str(path.parent.relative_to(RUNS)) for path in RUNS.rglob("config.json")]
    near = difflib.get_close_matches(str(run), names, 3, 0.4)
    raise FileNotFoundError(f"no run {run!r} in {RUNS}" + (f"; near it: {', '.join(near)}" if near else ""))


def write_json(path, content):
    """Plain values as an indented JSON file, written atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path):
    """The content of a JSON file; ValueError names a damaged one."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


TAGS = {"loss/train": "train_loss", "loss/val": "val_loss", "accuracy/train": "train_accuracy", "accuracy/val": "val_accuracy",
        "lr": "lr", "images_per_second": "images_per_second"}


def log(writer, history):
    """Write rows of the history to TensorBoard, one step an epoch."""
    if writer:
        for row in history:
            for tag, name in TAGS.items():
                writer.add_scalar(tag, row[name], row["epoch"], walltime=row["time"])
        writer.flush()


def read_history(run):
    """{tag: list of values, one an epoch} and the epochs' numbers under "epoch", from the TensorBoard log of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run_folder(run)), size_guidance={"scalars": 0})
    events.Reload()
    history = {tag: [event.value for event in events.Scalars(tag)] for tag in TAGS if tag in events.Tags()["scalars"]}
    if "loss/val" not in history:
        raise ValueError(f"the TensorBoard log of run {run} holds no epochs")
    return {"epoch": [event.step for event in events.Scalars("loss/val")], **history}


def read_runs(names=("**",), finished=False):
    """A dict for each run folder that fits one of `names` (patterns such as "published/digits-*"), sorted by name.

    Keys: run, folder, config, history (see `read_history`), results (None if it is not finished).  What is no run, half
    written or, with `finished`, not finished is passed over with a line that names it.  FileNotFoundError if nothing fits.
    """
    found = {path.resolve(): path for base in (RUNS, ROOT / "runs") for name in names for path in base.glob(name) if path.is_dir()}
    runs = []
    for folder in sorted(found.values()):
        if any(part.startswith(".") for part in folder.parts[len(RUNS.parts):]) or folder in (RUNS, ROOT / "runs") or (
                not (folder / "config.json").exists() and any(path.is_dir() for path in folder.iterdir())):
            continue                                            # a folder of folders, such as published/
        try:
            run = read_run(folder)
            if finished and not run["results"]:
                raise ValueError(f"it is not finished: epoch {run['history']['epoch'][-1]} of {run['config']['epochs']}")
            runs.append(run)
        except (OSError, ValueError, KeyError) as error:
            print(f"passed over {folder.name}: {error}", flush=True)
    if not runs and list(names) != ["**"]:
        raise FileNotFoundError(f"no run fits {' '.join(names)} in {RUNS}; `make runs` lists those that are there")
    return runs


def print_runs(names=("**",)):
    """A line for each run: what `make runs` prints."""
    print(f"{'run':44s} {'data':14s} {'model':17s} {'recipe':7s} {'epochs':>8s} {'val loss':>9s} {'test':>7s}")
    for run in read_runs(names):
        config, history, results = run["config"], run["history"], run["results"]
        test = f"{100 * results['test_accuracy']:.2f}%" if results else "-"
        print(f"{run['run']:44s} {Path(config['dataset']).name:14s} {config['model']:17s} {config['recipe']:7s} "
              f"{history['epoch'][-1]:>4d}/{config['epochs']:<3d} {min(history['loss/val']):9.4f} {test:>7s}")


def read_run(folder):
    """One run folder as a dict with run, config, history, results; ValueError if there is no run in it."""
    if not (folder / "config.json").exists():
        raise ValueError("it has no config.json, so it is no run" if any(folder.iterdir()) else "it is empty")
    name = str(folder.relative_to(RUNS if folder.is_relative_to(RUNS) else ROOT / "runs"))
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else None
    config = {**ADDED, **read_json(folder / "config.json")}
    return {"run": name, "folder": folder, "config": config, "history": read_history(name), "results": results}


# ---------------------------------------------------------------- trained models

def load_model(run, device="cpu"):
    """The best model of a run ("digits-vit-sgd-seed0", "published/…"), in eval mode; its settings are `model.config`."""
    bases = [base for base in (SAVED_MODELS, ROOT / "saved_models") if (base / run / "best.pt").exists()]
    if not bases:
        have = [str(path.parent.relative_to(SAVED_MODELS)) for path in SAVED_MODELS.rglob("best.pt")]
        near = difflib.get_close_matches(str(run), have, 3, 0.4)
        raise FileNotFoundError(f"no checkpoint {SAVED_MODELS / run / 'best.pt'}" + (f"; near it: {', '.join(near)}" if near else ""))
    content = load_checkpoint(bases[0] / run / "best.pt")
    model = build_model(content["config"])
    fill(model, {name: value.float() for name, value in content["model"].items()}, bases[0] / run / "best.pt")
    model.config = content["config"]
    return model.to(device).eval()


@torch.no_grad()
def predict(run, images, top=3):
    """Classify pictures with the best model of `run` (a name, or a model from `load_model`).

    images: one or a list of paths, PIL images or uint8 arrays (H, W) or (H, W, 3), of any mode and size; or a uint8 tensor
    (C, H, W) or (B, C, H, W).  Returns a list of (class name, probability), most probable first, for each picture;
    for a single picture, that list alone.
    """
    model = load_model(run) if isinstance(run, (str, Path)) else run
    config, device = model.config, next(model.parameters()).device
    if isinstance(images, torch.Tensor):
        one, images = images.ndim == 3, images[None] if images.ndim == 3 else images
        images = [picture.permute(1, 2, 0).squeeze(-1).cpu().numpy() for picture in images]
    else:
        one = isinstance(images, (str, Path, Image.Image, np.ndarray))
        images = [images] if one else list(images)
    if not len(images):
        return []
    pictures = torch.stack([read_picture(image, config["in_channels"], config["image_size"]) for image in images]).to(device)
    logits = model(normalise(pictures, config["mean"], config["std"]))
    probabilities, classes = logits.softmax(1).topk(min(top, len(config["classes"])))
    answers = [[(config["classes"][c], p) for p, c in zip(*row)] for row in zip(probabilities.tolist(), classes.tolist())]
    return answers[0] if one else answers


# ---------------------------------------------------------------- pictures

COLORS = {"vit": "#0072B2", "towervit": "#E69F00", "towervit-wide": "#009E73", "towervit-matched": "#CC79A7"}    # Okabe and Ito
NAMES = {"vit": "ViT", "towervit": "TowerViT", "towervit-wide": "TowerViT wide", "towervit-matched": "TowerViT matched"}


def set_style():
    """One look for every picture: notebooks/vit.mplstyle."""
    import matplotlib.pyplot as plt
    plt.style.use(NOTEBOOKS / "vit.mplstyle")


def save_figure(figure, name, output):
    """Write the figure to <output>/<name>.png, without a date or version inside, so that an unchanged picture stays the same file."""
    if output:
        Path(output).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(output) / f"{name}.png", metadata={"Software": None})


def show_pictures(pictures, titles=None, columns=8, size=1.1, colors=None):
    """Draw pictures (N, C, H, W), uint8 or float, in rows of `columns`, with a title each.  Returns the figure."""
    import matplotlib.pyplot as plt
    pictures = torch.as_tensor(pictures).detach().cpu().float()
    pictures = (pictures - pictures.min()) / (pictures.max() - pictures.min() + 1e-9)
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.25 * bool(titles)) * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (axis, picture) in enumerate(zip(axes.flat, pictures)):
        axis.imshow(picture.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=1)
        if titles:
            axis.set_title(titles[i], fontsize=8, color=colors[i] if colors else "black", pad=3)
    return figure


def show_predictions(run):
    """Sample inference of a run: 16 test pictures drawn at random, then up to 16 mistakes, those of which the model was surest.

    A title says what the model sees and how sure it is; where that is wrong it is red and says what the picture is.
    """
    folder, classes = run_folder(run), read_json(run_folder(run) / "config.json")["classes"]
    with np.load(folder / "predictions.npz") as stored:
        pictures, places, labels, logits = (stored[name] for name in ("pictures", "places", "labels", "logits"))
    sureness, guesses = torch.from_numpy(logits[places]).float().softmax(1).max(1)
    right = [guess == label for guess, label in zip(guesses.tolist(), labels[places])]
    titles = [f"{classes[guess]} {100 * sure:.0f}%" + ("" if ok else f"\nnot {classes[label]}")
              for guess, sure, ok, label in zip(guesses.tolist(), sureness.tolist(), right, labels[places])]
    return show_pictures(pictures, [title.replace("/", "/ ") for title in titles], size=1.35,
                         colors=["black" if ok else "#B00020" for ok in right])


def plot_spread(axis, histories, tag, label, color, **line):
    """A curve over epochs: the mean over `histories` (from `read_history`), and a band from the lowest to the highest."""
    epochs = min(len(history[tag]) for history in histories)
    values = np.array([history[tag][:epochs] for history in histories])
    steps = histories[0]["epoch"][:epochs]
    axis.plot(steps, values.mean(0), label=label, color=color, **line)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(values) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
