"""The table of faults: what goes wrong, and the one clear sentence that it ends with.  `pytest -s tests/test_faults.py` prints them."""
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vit_helpers
from jobs import small_config
from PIL import Image

RANDOM = np.random.default_rng(0)


def pictures(place, **counts):
    """A folder `data` in `place` with so many pictures in each class."""
    for label, count in counts.items():
        for i in range(count):
            path = place / "data" / label.replace("__", "/") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(RANDOM.integers(0, 255, (9, 9), np.uint8)).save(path)
    return str(place / "data")


def load(place, dataset=None, **counts):
    return vit_helpers.load_data(dataset or pictures(place, **counts), image_size=8)


def resolved(**changes):
    return vit_helpers.resolve({**vit_helpers.default_parameters(), **changes})


def train(place, **changes):
    settings = small_config(epochs=1, **changes)
    return vit_helpers.train_and_validation_loop(vit_helpers.build_model(settings), vit_helpers.load_data("digits"), settings, 1, torch.device("cpu"), folder=place)


def after_training(place, change):
    """Train, let `change` do its harm to the folder, and train again."""
    train(place)
    change(place)
    train(place)


def published(place, change):
    """A copy of a published run in the tests' own runs/, harmed, then read."""
    shutil.rmtree(vit_helpers.RUNS / "harmed", ignore_errors=True)
    shutil.copytree(vit_helpers.ROOT / "runs" / "published" / "digits-seed0-vit", vit_helpers.RUNS / "harmed")
    change(vit_helpers.RUNS / "harmed")
    return vit_helpers.read_run(vit_helpers.RUNS / "harmed")


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def model_of(place, content):
    (vit_helpers.SAVED_MODELS / "fault").mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else vit_helpers.save(vit_helpers.SAVED_MODELS / "fault" / "best.pt", content)
    if content:
        (vit_helpers.SAVED_MODELS / "fault" / "best.pt").write_bytes(content)
    return vit_helpers.load_model("fault")


def predict(images):
    return vit_helpers.predict("published/digits-seed0-vit", images)


def offline(place):
    """A network that is not there: a proxy at a port where nobody listens."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        vit_helpers.load_data("cifar10")


def broken_notebook(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_helpers, "NOTEBOOKS", place)
        cells = [{"cell_type": "code", "source": ["#| export\n", "def f(:\n"], "metadata": {}}]
        (place / "05_mine.ipynb").write_text(json.dumps({"cells": cells}))
        vit_helpers.load_notebook("05_mine")


def no_memory(place):
    """Too little address space for the step: a real refusal by the system, in a process of its own."""
    code = ("import resource, sys, torch; sys.path[:0] = sys.argv[1:3]; import test_faults, vit_helpers, pathlib; "
            "vit_helpers.load_data('digits'); test_faults.small_config(); import torch._dynamo; used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
            "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1)); "
            "test_faults.train(pathlib.Path(sys.argv[3]), batch_size=1024, mlp_ratio=2000)")
    raise_last_line(subprocess.run([sys.executable, "-c", code, vit_helpers.ROOT, vit_helpers.ROOT / "tests", place], capture_output=True, text=True))


def raise_last_line(shown):
    """Raise here what ended another process."""
    kind, _, said = shown.stderr.strip().splitlines()[-1].partition(": ")
    raise {"MemoryError": MemoryError, "RuntimeError": RuntimeError}.get(kind, AssertionError)(said)


# fault: (what is done in an empty folder, the error, what it says)
FAULTS = {
    "no such folder of images": (lambda p: load(p, "./nowhere/at/all"), FileNotFoundError, "no folder .*nowhere/at/all; a data set is a folder of images or one of"),
    "a file instead of a folder": (lambda p: (p / "x.png").write_text("") or load(p, str(p / "x.png")), FileNotFoundError, "no folder .*x.png"),
    "an empty folder": (lambda p: load(p, str(p)), ValueError, "should hold a folder of images for each of at least 2 classes; it has 0 folders"),
    "a folder of images without classes": (lambda p: load(p, pictures(p, only=3) + "/only"), ValueError, "at least 2 classes; it has 0 folders"),
    "one class": (lambda p: load(p, cat=9), ValueError, "at least 2 classes; it has 1 folders"),
    "a class without images": (lambda p: (p / "data" / "dog").mkdir(parents=True) or load(p, cat=9), ValueError, "of which dog hold no images"),
    "a class with one image": (lambda p: load(p, cat=9, dog=1), ValueError, "class 'dog' has 1 image"),
    "a class of broken images": (lambda p: [cut(path, 0.3) for path in Path(pictures(p, cat=9, dog=2)).glob("dog/*")] and load(p, str(p / "data")), ValueError,
                                 "no image of its class could be read; the first is .*dog/0.png"),
    "test/ without train/": (lambda p: load(p, test__cat=3, test__dog=3), ValueError, "has test but no train/; put the training images in"),
    "other classes in test/ than in train/": (lambda p: load(p, train__cat=9, train__dog=9, test__cat=3, test__dgo=3), ValueError,
                                              r"classes in test/ differ from those in train/: \['dgo', 'dog'\]"),
    "a name that is no data set": (lambda p: load(p, "fashionmnist"), ValueError, "dataset is 'fashionmnist', did you mean 'fashion-mnist'.* Allowed: digits"),
    "no network for a data set that needs one": (offline, FileNotFoundError, "could not be downloaded .*run `make data DATASET=cifar10` and copy data/ here"),
    "a model that there is not": (lambda p: resolved(model="resnet"), ValueError, "model is 'resnet'.*Allowed: vit, towervit"),
    "a misspelt recipe": (lambda p: resolved(recipe="sdg"), ValueError, "did you mean 'sgd'"),
    "a negative number of epochs": (lambda p: resolved(epochs=-3), ValueError, "epochs is -3; it must be 1 or more"),
    "a negative batch size": (lambda p: resolved(batch_size=-1), ValueError, "batch_size is -1; it must be 1 or more"),
    "a negative seed": (lambda p: resolved(seed=-1), ValueError, "seed is -1; it must be 0 or more"),
    "a learning rate that is not a number": (lambda p: resolved(learning_rate=float("nan")), ValueError, "learning_rate is nan; it must be a finite number"),
    "a momentum of 1": (lambda p: resolved(momentum=1.0), ValueError, "momentum is 1.0; it must be at least 0 and below 1"),
    "label smoothing above 1": (lambda p: resolved(label_smoothing=1.5), ValueError, "label_smoothing is 1.5"),
    "dropout of 1": (lambda p: resolved(dropout=1.0), ValueError, "dropout is 1.0; it is a share and must be at least 0 and below 1"),
    "all data for validation": (lambda p: resolved(val_fraction=1.0), ValueError, "val_fraction is 1.0"),
    "an augmentation that there is not": (lambda p: resolved(augment="cutout"), ValueError, "augment is 'cutout'.* Allowed: none, crop, flip"),
    "a precision that there is not": (lambda p: resolved(precision="fp8"), ValueError, "precision is 'fp8'"),
    "a pool that there is not": (lambda p: resolved(pool="max"), ValueError, "pool is 'max'"),
    "a patch size that does not divide the image": (lambda p: resolved(patch_size=3), ValueError, r"image_size 8 is not divisible by patch_size 3; patch sizes that fit: \[1, 2, 4, 8\]"),
    "a width that its heads do not divide": (lambda p: resolved(dims="48,50"), ValueError, "dim 50 is not divisible by head_dim 16; the nearest width that is: 48"),
    "widths that are no numbers": (lambda p: resolved(dims="64;64"), ValueError, "dims is '64;64'; write whole numbers with commas"),
    "a negative depth": (lambda p: resolved(depth=-1), ValueError, "depth is -1; a model needs at least 1 block"),
    "a run name that leaves the folder": (lambda p: resolved(run="../../etc"), ValueError, "run is '../../etc'; a run's name is letters"),
    "a word for a number": (lambda p: vit_helpers.as_type("epochs", "many", 0), ValueError, "parameter 'epochs' is 'many', but it must be int"),
    "a misspelt parameter": (lambda p: vit_helpers.check_parameters({"In": ["# Parameters\nepochz = 3"]}), ValueError, "unknown parameter 'epochz', did you mean 'epochs'"),
    "initial weights for a growing ViT": (lambda p: resolved(initial_weights="vit_b_16"), ValueError, "add -p model towervit"),
    "a GPU where there is none": (lambda p: vit_helpers.pick_device("cuda:7"), ValueError, "device is 'cuda:7', which this machine cannot use .*leave it empty"),
    "a device that there is not": (lambda p: vit_helpers.pick_device("gpu"), ValueError, "device is 'gpu', which this machine cannot use"),
    "resumed with another learning rate": (lambda p: (train(p), train(p, learning_rate=0.2)), ValueError, "learning_rate was 0.1 and is now 0.2.* Give it another name"),
    "resumed with another model": (lambda p: (train(p), train(p, model="towervit")), ValueError, "model was 'vit' and is now 'towervit'"),
    "resumed with another recipe": (lambda p: (train(p), train(p, recipe="adamw")), ValueError, "optimizer was 'sgd' and is now 'adamw'"),
    "more classes in the data than in the checkpoint": (lambda p: vit_helpers.refuse_changes({"num_classes": 10}, {"num_classes": 12}, p), ValueError, "num_classes was 10 and is now 12"),
    "all checkpoints cut off": (lambda p: after_training(p, lambda folder: [cut(path) for path in folder.glob("*.pt")]), ValueError, "last.pt is damaged.*No earlier checkpoint is readable.*delete"),
    "a checkpoint without the state of its training": (lambda p: after_training(p, lambda folder: shutil.copy(folder / "best.pt", folder / "last.pt")), ValueError, "holds no state of its training"),
    "a model that is no checkpoint": (lambda p: model_of(p, b"hello"), ValueError, "best.pt is damaged or no checkpoint of this suite"),
    "a model of another version": (lambda p: model_of(p, {"model": {"x": torch.zeros(3)}, "config": small_config()}), ValueError, "best.pt does not fit: .*another version of 01_models"),
    "a run that there is not": (lambda p: vit_helpers.load_model("published/digits-sed0-vit"), FileNotFoundError, "no checkpoint .*published/digits-sed0-vit"),
    "a learning rate so large that the loss is not finite": (lambda p: train(p, learning_rate=1e30, clip=0.0, warmup_epochs=0.0), FloatingPointError,
                                                             "training loss is (nan|inf) in epoch 1, step .*, at learning rate .* Try a lower learning_rate"),
    "too little memory": (no_memory, MemoryError, "out of memory with 1024 pictures at a time.*-p micro_batch_size 512, which gives the same model"),
    "a TensorBoard log without epochs": (lambda p: published(p, lambda run: [cut(path, 0.02) for path in run.glob("events*")]), ValueError, "holds no epochs"),
    "a run folder without config.json": (lambda p: published(p, lambda run: (run / "config.json").unlink()), ValueError, "it has no config.json, so it is no run"),
    "a config.json cut off": (lambda p: published(p, lambda run: cut(run / "config.json")), ValueError, "config.json is damaged .(Unterminated|Expecting|Invalid)"),
    "an exported cell that does not compile": (broken_notebook, SyntaxError, "05_mine.ipynb, cell 1"),
    "a notebook that there is not": (lambda p: vit_helpers.load_notebook("09_none"), FileNotFoundError, "no notebook .*09_none.ipynb; there are"),
    "a text file named .png, to classify": (lambda p: (p / "a.png").write_text("hello") and predict(p / "a.png"), ValueError, "a.png cannot be read as a picture"),
    "a picture that is not there, to classify": (lambda p: predict(p / "b.png"), ValueError, "b.png cannot be read as a picture: .*No such file"),
    "an array that is no picture, to classify": (lambda p: predict(np.zeros((2, 3, 4, 5))), ValueError, "ndarray cannot be read as a picture"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_with_one_clear_sentence(fault, tmp_path):
    harm, error, said = FAULTS[fault]
    with pytest.raises(error, match=said) as caught:
        harm(tmp_path)
    print(f"{fault} -> {caught.type.__name__}: {' '.join(str(caught.value).replace(str(tmp_path), '…').split())[:230]}")


def test_without_a_compiler_training_goes_on_uncompiled(tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_faults, pathlib; test_faults.train(pathlib.Path(sys.argv[3]), compile=True)"
    shown = subprocess.run([sys.executable, "-c", code, vit_helpers.ROOT, vit_helpers.ROOT / "tests", tmp_path], capture_output=True, text=True,
                           env={**os.environ, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert shown.returncode == 0 and shown.stderr.count("UserWarning: torch.compile failed") == 1 and "training goes on uncompiled" in shown.stderr, shown.stderr


# Odd pictures: read as they should be, or passed over and counted.

def jpeg(mode, **options):
    return lambda path: Image.fromarray(RANDOM.integers(0, 255, (20, 30, 3), np.uint8)).convert(mode).save(path.with_suffix(".jpg"), **options)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # turn by 90 degrees to see it upright
    Image.fromarray(np.pad(np.full((10, 30), 255, np.uint8), ((20, 0), (0, 0)))).save(path.with_suffix(".jpg"), exif=exif)


def animated(path):
    frames = [Image.new("L", (9, 9), value) for value in (200, 10)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])


def bomb(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        Image.new("1", (20_000, 10_000)).save(path)


READ = {"CMYK": jpeg("CMYK"), "grey JPEG": jpeg("L"), "rotated by EXIF": rotated, "animated": animated,
        "16 bits": lambda path: Image.fromarray(RANDOM.integers(0, 65535, (9, 9), np.uint16)).save(path),
        "palette": lambda path: Image.fromarray(RANDOM.integers(0, 255, (9, 9, 3), np.uint8)).quantize(8).save(path),
        "transparent": lambda path: Image.new("RGBA", (9, 9), (9, 9, 9, 0)).save(path), "one bit": lambda path: Image.new("1", (9, 9)).save(path)}
PASSED_OVER = {"zero bytes": lambda path: path.write_bytes(b""), "cut off": lambda path: (Image.new("RGB", (99, 99)).save(path), cut(path, 0.3)),
               "text named .png": lambda path: path.write_text("hello"), "a picture of 200 million pixels": bomb,
               "another ending": lambda path: path.with_suffix(".txt").write_text("notes")}


@pytest.mark.parametrize("kind", [*READ, *PASSED_OVER])
def test_odd_pictures_are_read_or_passed_over_and_counted(kind, tmp_path):
    folder = Path(pictures(tmp_path, cat=9, dog=9))
    {**READ, **PASSED_OVER}[kind](folder / "dog" / "odd.png")
    data = vit_helpers.load_data(str(folder), image_size=8, channels=1)
    assert len(data.train) + len(data.val) + len(data.test) == 18 + (kind in READ)
    assert bool(data.notes) == (kind in PASSED_OVER) and all("1 files passed over" in note and "dog/odd" in note for note in data.notes)


def test_an_exif_rotation_is_obeyed_and_transparency_is_white(tmp_path):
    READ["rotated by EXIF"](tmp_path / "a.png")
    READ["transparent"](tmp_path / "b.png")
    turned = vit_helpers.read_picture(tmp_path / "a.jpg", 1, 30)[0].float()
    assert turned[:, :8].mean() > 240 and turned[:, 12:].mean() < 15                       # the white rows at the bottom are on the left
    assert (vit_helpers.read_picture(tmp_path / "b.png", 3, 9) == 255).all()


# No way in.

class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_files_is_refused_and_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    for content in ({"model": {}, "config": Payload(ran)}, Payload(ran)):
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(ValueError, match="last.pt is damaged or no checkpoint of this suite"):
            train(tmp_path)
        assert not ran.exists()
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match="x.pt is damaged or no checkpoint"):
        vit_helpers.load_checkpoint(tmp_path / "x.pt")
    run = vit_helpers.RUNS / "malicious"
    shutil.copytree(vit_helpers.ROOT / "runs" / "published" / "digits-seed0-vit", run)
    with np.load(run / "predictions.npz") as stored:
        np.savez(run / "predictions.npz", **{**stored, "logits": np.array([Payload(ran)], dtype=object)})
    assert not ran.exists()
    with pytest.raises(ValueError, match="allow_pickle=False"):
        vit_helpers.show_predictions("malicious")
    with pytest.raises(pickle.UnpicklingError):
        vit_helpers.load_notebook("06_run").torchvision_weights(str(tmp_path / "x.pt"))
    assert not ran.exists()
    torch.load(tmp_path / "last.pt", weights_only=False)                # the payload does work where somebody lets it
    assert ran.exists()


def test_a_log_cut_off_in_the_middle_gives_the_epochs_before_it():
    run = published(None, lambda run: [cut(path, 0.08) for path in run.glob("events*")])
    assert 1 <= len(run["history"]["epoch"]) < 40


def test_a_read_only_place_is_named(tmp_path):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", tmp_path])
        with pytest.raises(OSError, match=f"could not write {tmp_path}/.*Read-only file system"):
            train(tmp_path)
