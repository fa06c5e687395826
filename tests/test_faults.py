"""The table of faults: what goes wrong, and the one clear sentence that it ends with.

`pytest -s tests/test_faults.py` prints them.
"""
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import jobs
import vit_helpers
from jobs import small_config

TESTS = vit_helpers.ROOT / "tests"
NUMBERS = np.random.default_rng(0)
DATA = vit_helpers.load_notebook("02_data")
TRAINING = vit_helpers.load_notebook("04_training")
FINETUNING = vit_helpers.load_notebook("05_finetuning")
RUNNING = vit_helpers.load_notebook("06_run")
PUBLISHED = "published/digits-seed0-vit"
FAULTS = {}


def fault(name, error, said):
    """Enter a function that does harm in an empty folder, the error that it must end with, and
    what that says."""
    def enter(harm):
        FAULTS[name] = (harm, error, said)
        return harm
    return enter


def cut(path, fraction=0.5):
    """Leave only the first part of a file."""
    path.write_bytes(path.read_bytes()[:int(fraction * path.stat().st_size)])


# ---- settings that cannot be: (fault, parameters, what the ValueError says)

SETTINGS = [
    ("a model that there is not", dict(model="resnet"), "model is 'resnet'.*Allowed: vit, tower"),
    ("a misspelt recipe", dict(recipe="sdg"), "did you mean 'sgd'"),
    ("a schedule that there is not", dict(schedule="linear"), "schedule is 'linear'.*Allowed: cos"),
    ("a negative number of epochs", dict(epochs=-3), "epochs is -3; it must be 1 or more"),
    ("no epochs", dict(epochs=0), "epochs is 0; it must be 1 or more"),
    ("a negative batch size", dict(batch_size=-1), "batch_size is -1; it must be 1 or more"),
    ("no threads", dict(threads=0), "threads is 0; it must be from 1 to 1024"),
    ("a negative seed", dict(seed=-1), "seed is -1; it must be from 0 to 4294967295"),
    ("a learning rate that is not a number", dict(learning_rate=float("nan")),
     "learning_rate is nan; it must be a finite number"),
    ("a momentum of 1", dict(momentum=1.0), "momentum is 1.0; it must be at least 0 and below 1"),
    ("label smoothing above 1", dict(label_smoothing=1.5), "label_smoothing is 1.5"),
    ("class weights that there are not", dict(class_weights="equal"),
     "class_weights is 'equal'.*Allowed: balanced"),
    ("dropout of 1", dict(dropout=1.0), "dropout is 1.0; it must be at least 0 and below 1"),
    ("all data for validation", dict(val_fraction=1.0), "val_fraction is 1.0"),
    ("an augmentation that there is not", dict(augment="cut"),
     "augment is 'cut'.* Allowed: none, crop, flip"),
    ("a precision that there is not", dict(precision="fp8"), "precision is 'fp8'"),
    ("a pool that there is not", dict(pool="max"), "pool is 'max'"),
    ("a stem that there is not", dict(stem="resnet"), "stem is 'resnet'"),
    ("a convolutional stem with small patches", dict(stem="conv"), "patch_size"),
    ("tokens merged where their grid is odd", dict(merge_at="2,3,4"), "grid"),
    ("tokens merged before a block that there is not", dict(merge_at="9"), "merge_at"),
    ("a patch size that does not divide the image", dict(patch_size=3),
     r"image_size 8 is not divisible by patch_size 3; patch sizes that fit: \[1, 2, 4, 8\]"),
    ("a width that its heads do not divide", dict(dims="48,50"),
     "dim 50 is not divisible by head_dim 16; the nearest width that is: 48"),
    ("widths that are no numbers", dict(dims="64;64"), "dims is '64;64'; write whole numbers with"),
    ("a negative depth", dict(depth=-1), "depth is -1; it must be 1 or more"),
    ("a run name that leaves the folder", dict(run="../../etc"),
     "run is '../../etc'; a run's name is letters"),
    ("a run name of 300 characters", dict(run="x" * 300), "a name of 300 bytes; it may have 200"),
    ("a seed that is too large", dict(seed=2**32), "seed is 4294967296; it must be from 0 to 4294"),
    ("more threads than there are cores", dict(threads=100_000), "threads is 100000; it must be"),
    ("a name that is no data set", dict(dataset="fashionmnist"), "did you mean 'fashion-mnist'"),
    ("a folder that there is not", dict(dataset="photoz"),
     "dataset is 'photoz'.*, or a folder of images; there is no folder /.*/photoz"),
    ("an empty name of a data set", dict(dataset=""), "dataset is empty; give the name"),
    ("a misspelt parameter in a plan", dict(learnig_rate=0.2),
     "unknown parameter 'learnig_rate', did you mean 'learning_rate'"),
    ("half an epoch in a plan", dict(epochs=2.5), "parameter 'epochs' is 2.5, but it must be int"),
    ("a word for blocks to merge before", dict(merge_at="third"),
     "merge_at is 'third'; write whole numbers .* like 3,5 .or 0 for no merging."),
    ("a warm-up that does not end", dict(epochs=10, warmup_epochs=50.0),
     "warmup_epochs is 50; it must be at most epochs, which is 10"),
]


def enter_settings(name, parameters, said):
    @fault(name, ValueError, said)
    def harm(place):
        RUNNING.resolve(parameters)


for row in SETTINGS:
    enter_settings(*row)


@fault("a plan without names", ValueError, "an entry of the plan has no `run`.*: {'epochs': 1}")
def plan_without_names(place):
    RUNNING.train_plan([{"epochs": 1}])


@fault("a word for a number", ValueError, "parameter 'epochs' is 'many', but it must be int")
def word_for_a_number(place):
    vit_helpers.check_parameters({"epochs": "many"})


@fault("a number of infinite size", ValueError, "parameter 'epochs' is inf, but it must be int")
def infinite_number(place):
    vit_helpers.check_parameters({"epochs": float("inf")})


@fault("a list of widths with half a number", ValueError, "parameter 'dims' is .16, 24.5., but")
def half_a_width(place):
    vit_helpers.check_parameters({"dims": [16, 24.5]})


@fault("a parameter misspelt in a condition, below a magic", ValueError,
       "unknown parameter 'epochz', did you mean 'epochs'")
def misspelt_in_a_condition(place):
    vit_helpers.check_parameters({"In": ["%matplotlib inline\nseed = 1\nif seed:\n    epochz = 3"]})


@fault("a misspelt parameter", ValueError, "unknown parameter 'epochz', did you mean 'epochs'")
def misspelt_parameter(place):
    vit_helpers.check_parameters({"In": ["# Parameters\nepochz = 3"]})


# ---- folders of images

def images(place, **counts):
    """A folder `data` in `place` with so many images in each class; a__b is the folder a/b."""
    for label, count in counts.items():
        for i in range(count):
            path = place / "data" / label.replace("__", "/") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(NUMBERS.integers(0, 255, (9, 9), np.uint8)).save(path)
    return place / "data"


def load(folder):
    return DATA.load_data(str(folder), image_size=8)


@fault("no such folder of images", FileNotFoundError, "no folder /.*nowhere/at/all")
def no_folder(place):
    load("./nowhere/at/all")


@fault("a file instead of a folder", FileNotFoundError, "x.png")
def a_file(place):
    (place / "x.png").write_text("")
    load(place / "x.png")


@fault("an empty folder", ValueError, "a folder of images for each of at least 2 classes")
def an_empty_folder(place):
    load(place)


@fault("a folder of images without classes", ValueError, "at least 2 classes")
def no_classes(place):
    load(images(place, only=3) / "only")


@fault("one class", ValueError, "at least 2 classes")
def one_class(place):
    load(images(place, cat=9))


@fault("a class without images", ValueError, "dog")
def no_images(place):
    (place / "data" / "dog").mkdir(parents=True)
    load(images(place, cat=9))


@fault("a class with one image", ValueError, "class 'dog' has 1 image")
def one_image(place):
    load(images(place, cat=9, dog=1))


@fault("a class of broken images", ValueError, "no image of its class could be read; the first is")
def broken_images(place):
    folder = images(place, cat=9, dog=2)
    for path in (folder / "dog").iterdir():
        cut(path, 0.3)
    load(folder)


@fault("test/ without train/", ValueError, "has test but no train/; put the training images in")
def no_train(place):
    load(images(place, test__cat=3, test__dog=3))


@fault("other classes in test/ than in train/", ValueError,
       r"classes in test/ differ from those in train/: .*'dgo', 'dog'")
def other_classes(place):
    load(images(place, train__cat=9, train__dog=9, test__cat=3, test__dgo=3))


@fault("a validation fraction that leaves nothing to train on", ValueError, "val_fraction is 0.99")
def large_fraction(place):
    DATA.load_data("digits", val_fraction=0.999)


@fault("no network for a data set that needs one", FileNotFoundError,
       "could not be downloaded .*run `make data DATASET=cifar10` and copy data/ here")
def offline(place):
    with pytest.MonkeyPatch.context() as patch:         # a proxy at a port where nobody listens
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        DATA.load_data("cifar10")


# ---- devices

@fault("a GPU where there is none", ValueError,
       "device is 'cuda:99', which this machine cannot use .*leave it open")
def no_such_gpu(place):
    vit_helpers.pick_device("cuda:99")


@fault("a device that there is not", ValueError, "device is 'gpu', which this machine cannot use")
def no_such_device(place):
    vit_helpers.pick_device("gpu")


@fault("GPUs that PyTorch cannot use", RuntimeError,
       r"was given GPUs \(CUDA_VISIBLE_DEVICES=0\), but PyTorch .* cannot use them.*-p device cpu")
def useless_gpus(place):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU that works")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        vit_helpers.pick_device()


@pytest.mark.parametrize("visible", ["", "-1"])
def test_no_visible_gpus_means_no_gpus(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert vit_helpers.given_gpus() == ""


# ---- the script

def script(place, path=jobs.SCRIPT, **environment):
    """train_job.sh with this environment; raises what it said last as an OSError."""
    shown = subprocess.run(["bash", path], capture_output=True, text=True,
                           env={**os.environ, **environment})
    assert shown.returncode != 0
    raise OSError((shown.stdout + shown.stderr).strip().splitlines()[-1])


@fault("a VIT_HOME that cannot be written", OSError,
       "cannot write to .*file/runs: set VIT_HOME to a folder that you may write to")
def no_home(place):
    (place / "file").write_text("")
    script(place, VIT_HOME=str(place / "file"))


@fault("train_job.sh without its project", OSError, "there is no vit_helpers.py beside .*alone.sh")
def alone(place):
    script(place, shutil.copy(jobs.SCRIPT, place / "alone.sh"))


@fault("no environment to train in", OSError,
       "no papermill in .*: run `make setup` in .* without make: python3 -m venv .venv &&")
def no_environment(place):
    (place / "setup").write_text("python() { return 1; }")
    script(place, VIT_SETUP=str(place / "setup"))


# ---- runs that go on

def train(place, **changes):
    config, data = small_config(**{"epochs": 1, **changes}), DATA.load_data("digits")
    return TRAINING.train_and_validation_loop(vit_helpers.build_model(config), data, config, place)


@fault("resumed with another learning rate", ValueError,
       "learning_rate was 0.1 and is now 0.2.* Give it another name")
def other_rate(place):
    train(place)
    train(place, learning_rate=0.2)


@fault("resumed with another model", ValueError, "model was 'vit' and is now 'towervit'")
def other_model(place):
    train(place)
    train(place, model="towervit")


@fault("resumed with another recipe", ValueError, "recipe was 'sgd' and is now 'adamw'")
def other_recipe(place):
    train(place)
    train(place, recipe="adamw")


@fault("resumed for more epochs", ValueError,
       "epochs was 1 and is now 2. .*to train longer, .*-r initial_weights digits-vit-sgd")
def more_epochs(place):
    train(place)
    train(place, epochs=2)


@fault("more classes in the data than in the checkpoint", ValueError,
       "num_classes was 10 and is now 12")
def more_classes(place):
    vit_helpers.refuse_changes({"num_classes": 10}, {"num_classes": 12}, place)


@fault("all checkpoints cut off", ValueError,
       "last.pt is damaged.*No earlier checkpoint is readable.*delete")
def all_cut(place):
    train(place)
    for path in place.glob("*.pt"):
        cut(path)
    train(place)


@fault("a checkpoint without the state of its training", ValueError,
       "holds no state of its training")
def no_state(place):
    train(place)
    shutil.copy(place / "best.pt", place / "last.pt")
    train(place)


@fault("a learning rate so large that the loss is not finite", FloatingPointError,
       "training loss is (nan|inf) in epoch 1, step .*, at learning rate .* Try a lower learning")
def not_finite(place):
    train(place, learning_rate=1e30, grad_clip=0.0, warmup_epochs=0.0)


TOO_LITTLE = """
import pathlib, resource, sys
sys.path[:0] = sys.argv[1:3]
import torch._dynamo, test_faults
used = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1))
test_faults.train(pathlib.Path(sys.argv[3]), batch_size=1024, mlp_ratio=2000)
"""


@fault("too little memory", MemoryError,
       "out of memory with 1024 images at a time.*-p micro_batch_size 512, which gives the same")
def no_memory(place):
    """Too little address space for the step: a real refusal, in a process of its own."""
    command = [sys.executable, "-c", TOO_LITTLE, vit_helpers.ROOT, TESTS, place]
    shown = subprocess.run(command, capture_output=True, text=True)
    kind, _, said = shown.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "MemoryError", shown.stderr
    raise MemoryError(said)


# ---- trained models and finished runs

def load_fault(content):
    """`load_model` of a run whose best.pt has this content: bytes, or what torch saves."""
    path = vit_helpers.SAVED_MODELS / "fault" / "best.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        vit_helpers.save(path, content)
    return vit_helpers.load_model("fault")


@fault("a model that is no checkpoint", ValueError, "best.pt is damaged or no checkpoint of this")
def no_checkpoint(place):
    load_fault(b"hello")


@fault("a model of another version", ValueError,
       "best.pt does not fit: .*another version of 01_models")
def other_version(place):
    load_fault({"model": {"x": torch.zeros(3)}, "config": small_config()})


@fault("a run that there is not", FileNotFoundError,
       f"no best.pt of a run 'published/digits-sed0-vit' .*near it: .*{PUBLISHED}")
def no_run(place):
    vit_helpers.load_model("published/digits-sed0-vit")


def harmed_run(change):
    """A copy of a published run in the tests' own runs/, harmed, then read."""
    folder = vit_helpers.RUNS / "harmed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(vit_helpers.ROOT / "runs" / PUBLISHED, folder)
    change(folder)
    return vit_helpers.read_run(folder)


def cut_log(fraction):
    """A change that cuts a run's TensorBoard log."""
    return lambda folder: [cut(path, fraction) for path in folder.glob("events*")]


@fault("a TensorBoard log without epochs", ValueError, "holds no epochs")
def empty_log(place):
    harmed_run(cut_log(0.02))


@fault("a run folder without config.json", ValueError, "it has no config.json, so it is no run")
def no_config(place):
    harmed_run(lambda folder: (folder / "config.json").unlink())


@fault("a config.json cut off", ValueError, "config.json is damaged .(Unterminated|Expecting|Inv)")
def cut_config(place):
    harmed_run(lambda folder: cut(folder / "config.json"))


@fault("a run that is not finished, to be looked into", FileNotFoundError,
       "has no predictions.npz: it is not finished. Train it to its end")
def not_finished(place):
    def harm(folder):
        (folder / "predictions.npz").unlink()
        (folder / "results.json").unlink()

    harmed_run(harm)
    vit_helpers.read_predictions("harmed")


@fault("predictions that were deleted", FileNotFoundError,
       "has no predictions.npz: it was deleted. Bring it back, or delete .*harmed and train")
def no_predictions(place):
    harmed_run(lambda folder: (folder / "predictions.npz").unlink())
    vit_helpers.read_predictions("harmed")


@fault("predictions that are damaged", ValueError, "predictions.npz is damaged")
def cut_predictions(place):
    harmed_run(lambda folder: cut(folder / "predictions.npz"))
    vit_helpers.read_predictions("harmed")


@fault("a run whose model was deleted", FileNotFoundError,
       "no best.pt of a run 'harmed' in .*harmed is there, so its model was deleted or")
def no_model(place):
    harmed_run(lambda folder: None)
    vit_helpers.load_model("harmed")


def half_a_run(config, *kept):
    """`open_run` of a finished run whose folders hold these files alone."""
    folders = [base / config["run"] for base in (vit_helpers.RUNS, vit_helpers.SAVED_MODELS)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    train(folders[1], run=config["run"])
    folders[0].mkdir(parents=True)
    vit_helpers.write_json(folders[0] / "results.json", {})
    for folder in folders:
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()
    try:
        RUNNING.open_run(config)
    finally:
        RUNNING.let_go(folders[1])


@fault("results without config.json and checkpoints", ValueError,
       "neither config.json nor a checkpoint in .* that say what was trained; delete it to train")
def results_alone(place):
    half_a_run(small_config(epochs=1, run="half"), "results.json")


@fault("a test of a run that was interrupted", ValueError,
       "run half is not finished, so it is not tested; run the cell that trains it again")
def interrupted_test(place):
    RUNNING.test_best_model(place, small_config(run="half"), None, [])


@fault("a run that is trained already, by another process", RuntimeError,
       "is being trained by another process, which holds .*lock; wait for it, or give this one")
def locked(place):
    with FileLock(place / ".lock"):
        RUNNING.lock_run(place)


@fault("initial weights that are nowhere", FileNotFoundError, "nothing.pth")
def no_weights(place):
    FINETUNING.read_weights(str(place / "nothing.pth"))


# ---- notebooks and figures

@fault("an exported cell that does not compile", SyntaxError, "05_mine.ipynb, cell 1")
def broken_notebook(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_helpers, "NOTEBOOKS", place)
        cell = {"cell_type": "code", "source": ["#| export\n", "def f(:\n"], "metadata": {}}
        (place / "05_mine.ipynb").write_text(json.dumps({"cells": [cell]}))
        vit_helpers.load_notebook("05_mine")


@fault("a notebook that there is not", FileNotFoundError, "no notebook .*12_none.ipynb; there are")
def no_notebook(place):
    vit_helpers.load_notebook("12_none")


@fault("a figure whose second axis has no title", ValueError, "axis 2 of 2 in this figure has no")
def no_title(place):
    from matplotlib.figure import Figure
    figure = Figure()
    axes = figure.subplots(1, 2)
    axes[0].set_title("loss")
    vit_helpers.save_figure(figure, "untitled", place)


# ---- images to classify

def predict(source):
    return vit_helpers.predict(PUBLISHED, source)


@fault("a text file named .png, to classify", ValueError, "a.png cannot be read as an image")
def text_file(place):
    (place / "a.png").write_text("hello")
    predict(place / "a.png")


@fault("an image that is not there, to classify", ValueError,
       "b.png cannot be read as an image: .*No such file")
def no_file(place):
    predict(place / "b.png")


@fault("an array that is no image, to classify", ValueError, r"its shape is \(7, 8, 9\)")
def no_image(place):
    predict(np.zeros((7, 8, 9)))


@fault("a batch of grey images without channels, to classify", ValueError,
       "in which no end is 1 to 4 channels; many grey images are .B, H, W, 1.")
def grey_batch(place):
    predict(np.zeros((9, 8, 8)))


@fault("an image without pixels, to classify", ValueError, "it has no pixels")
def empty_image(place):
    predict(np.zeros((0, 8)))


@fault("an image that resizing brought beyond 1, to classify", ValueError,
       "its values go from 0 to 1.02; give them from 0 to 1 or from 0 to 255")
def beyond_one(place):
    predict(np.linspace(0, 1.02, 64).reshape(8, 8))


@fault("nothing, to classify", ValueError, "None is no image; give a path, an array, or a list")
def nothing(place):
    predict(None)


@fault("an image that is normalised already, to classify", ValueError,
       "its values go from -.* to .*; give them from 0 to 1 or from 0 to 255, not normalised")
def normalised(place):
    predict(torch.randn(1, 8, 8))


# ---- the table

@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_ends_with_one_clear_sentence(name, tmp_path):
    harm, error, said = FAULTS[name]
    with pytest.raises(error, match=said) as caught:
        harm(tmp_path)
    text = " ".join(str(caught.value).replace(str(tmp_path), "…").split())
    print(f"{name} -> {caught.type.__name__}: {text[:230]}")


COMPILE = """
import pathlib, sys
sys.path[:0] = sys.argv[1:3]
import test_faults
test_faults.train(pathlib.Path(sys.argv[3]), compile=True)
"""


def test_without_a_compiler_training_goes_on_uncompiled(tmp_path):
    command = [sys.executable, "-c", COMPILE, vit_helpers.ROOT, TESTS, tmp_path]
    environment = {**os.environ, "CXX": "/no/compiler",
                   "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.count("UserWarning: torch.compile failed") == 1
    assert "training goes on uncompiled" in shown.stderr


# ---- images of any type and shape

def test_the_same_image_gives_the_same_answer_in_whatever_type_and_shape(digits):
    image = digits.test.images[2]                                       # (1, 8, 8)
    array, model = image[0].numpy(), vit_helpers.load_model(PUBLISHED)
    expected = vit_helpers.predict(model, array)
    assert expected[0][0] == str(digits.test.labels[2].item())
    same = {"int32": array.astype(np.int32), "uint16": array.astype(np.uint16),
            "int64 (1, H, W)": array[None].astype(np.int64), "(H, W, 1)": array[..., None],
            "(H, W, 3)": np.stack([array] * 3, -1), "mode I": Image.fromarray(array).convert("I"),
            "floats from 0 to 1": array / 255.0, "floats from 0 to 255": array.astype(np.float32),
            "float tensor (3, H, W)": (image.float() / 255).expand(3, -1, -1), "tensor": image[0]}
    for kind, source in same.items():
        answer = vit_helpers.predict(model, source)
        assert answer[0][0] == expected[0][0], kind
        assert answer[0][1] == pytest.approx(expected[0][1], abs=1e-4), kind


def test_predict_takes_one_image_or_many_files_bytes_and_folders(digits, tmp_path):
    array, model = digits.test.images[0][0].numpy(), vit_helpers.load_model(PUBLISHED)
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = vit_helpers.predict(model, array)
    raw = (tmp_path / "a.png").read_bytes()
    for one in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), raw):
        assert vit_helpers.predict(model, one) == expected
    batch = digits.test.images[:1].repeat(2, 1, 1, 1)                   # (2, 1, 8, 8)
    many = ([array, tmp_path / "a.png"], batch, batch.permute(0, 2, 3, 1).numpy())
    for two in many:
        for answer in vit_helpers.predict(model, two):
            assert [name for name, _ in answer] == [name for name, _ in expected]
            assert answer[0][1] == pytest.approx(expected[0][1], abs=1e-5)
    assert vit_helpers.predict(model, tmp_path) == [expected]           # a folder of one file
    assert vit_helpers.predict(model, []) == []


def test_twelve_bits_and_large_floats_are_not_flat(tmp_path):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for name, values in (("12", (ramp * 4095).astype(np.uint16)), ("float", ramp * 65535)):
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        assert vit_helpers.read_image(tmp_path / f"{name}.tif", 1, 16).unique().numel() > 200


# ---- no way in

class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_checkpoints_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    for content in ({"model": {}, "config": Payload(ran)}, Payload(ran)):
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="last.pt is damaged or no checkpoint of this suite"):
            train(tmp_path)
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match="x.pt is damaged or no checkpoint"):
        vit_helpers.load_checkpoint(tmp_path / "x.pt")
    with contextlib.suppress(ValueError, pickle.UnpicklingError):
        FINETUNING.read_weights(str(tmp_path / "x.pt"))
    assert not ran.exists()
    torch.load(tmp_path / "last.pt", weights_only=False)    # it does work where somebody lets it
    assert ran.exists()


def test_code_in_predictions_is_refused_and_not_run(tmp_path):
    ran, run = tmp_path / "ran", vit_helpers.RUNS / "malicious"
    shutil.copytree(vit_helpers.ROOT / "runs" / PUBLISHED, run)
    with np.load(run / "predictions.npz") as stored:
        arrays = {**stored, "logits": np.array([Payload(ran)], dtype=object)}
    np.savez(run / "predictions.npz", **arrays)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        vit_helpers.show_predictions("malicious")
    assert not ran.exists()


def test_a_log_cut_off_in_the_middle_gives_the_epochs_before_it():
    run = harmed_run(cut_log(0.08))
    assert 1 <= len(run["history"]["epoch"]) < 40


def test_a_read_only_place_is_named(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", tmp_path])
        with pytest.raises(OSError, match=f"could not write {tmp_path}/.*Read-only file system"):
            train(tmp_path)
