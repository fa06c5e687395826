"""Faults that others met in the field, by kind: real files and processes, and the right values.

What lies in a folder is in test_data.py.
"""
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from jupyter_client import KernelManager
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from torch.utils.tensorboard import SummaryWriter

import vit_helpers
from jobs import CELLS, SCRIPT, TINY, parameters_cell, run_notebook, small_config

PUBLISHED = "published/digits-seed0-vit"
LOOP = next(cell for cell in CELLS if "train_and_validation_loop(" in cell)
NUMBERS = np.random.default_rng(0)


def interrupted_after(training, monkeypatch, epochs, **changes):
    """Run notebook 6, interrupted as the checkpoint of an epoch is about to be written."""
    def hurt(folder, state):
        if len(state.history) == epochs + 1 and state.step == 0:
            raise KeyboardInterrupt
        real(folder, state)

    real = training.save_last
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_last", hurt)
        with pytest.raises(KeyboardInterrupt):
            run_notebook(**changes)


def resolve(running, **changes):
    return running.resolve(changes)


# ---- the same thing spelled otherwise

@pytest.mark.parametrize("one, other", [
    (dict(model="ViT", recipe="SGD"), {}), (dict(dataset="Digits"), {}),
    (dict(augment="flip, crop"), dict(augment="crop,flip")),
    (dict(augment="+flip"), dict(augment="crop,flip")), (dict(augment="crop"), {}),
    (dict(merge_at="3,2"), dict(merge_at="2, 3")), (dict(merge_at="0"), dict(merge_at="")),
    (dict(dims=[48, 96]), dict(dims="48,96")), (dict(dims=(48, 96)), dict(dims="48,96")),
    (dict(epochs=20, warmup_epochs=2.0), dict(epochs=20)), (dict(warmup_epochs=4.0), {}),
    (dict(dims="48,80", depth=2), dict(depth=2)), (dict(dims="48, 64,80,112,"), {}),
    (dict(run="runs/mine/"), dict(run="mine")), (dict(run="u\u0308"), dict(run="\u00fc")),
    (dict(initial_weights=f"runs/{PUBLISHED}/"), dict(initial_weights=PUBLISHED)),
    (dict(initial_weights=str(vit_helpers.ROOT / "saved_models" / PUBLISHED / "best.pt")),
     dict(initial_weights=PUBLISHED))])
def test_what_means_the_same_is_the_same_run(running, one, other):
    assert resolve(running, **one) == resolve(running, **other)


def test_lists_of_a_plan_reach_the_script_as_text(running):
    assert running.job_options({"dims": [48, 96], "epochs": 2}) == ["-r", "dims", "48,96",
                                                                    "-p", "epochs", "2"]


def test_what_means_something_else_has_another_name(running):
    names = [resolve(running, epochs=20, **changes)["run"] for changes in (
        {}, dict(warmup_epochs=4.0), dict(depth=2), dict(dims="48,112"), dict(grad_clip=0.0),
        dict(initial_weights=PUBLISHED))]
    assert len(set(names)) == len(names)


def make_folder(folder, **counts):
    """A folder of small noisy images, with so many in each class."""
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            noise = NUMBERS.integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(noise).save(folder / label / f"{i}.png")
    return folder


def test_a_folder_that_is_spelled_otherwise_or_moved_is_the_same_data_set(
        tmp_path, training, monkeypatch):
    pets = make_folder(tmp_path / "my p\u00e8ts", cat=12, dog=12)
    (tmp_path / "link").symlink_to(pets)
    moved = tmp_path / "moved"
    small = dict(run="pets", image_size=8, patch_size=4, recipe="sgd", batch_size=8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    interrupted_after(training, monkeypatch, 1, dataset="./my p\u00e8ts", **small)
    shown = run_notebook(dataset=f"{pets}/", **small)
    assert "pets goes on" in shown and "epoch   1/3" not in shown and "epoch   3/3" in shown
    for spelled in ("~/my p\u00e8ts", "link", "link/../my p\u00e8ts//", str(pets)):
        assert "pets is done" in run_notebook(dataset=spelled, until=LOOP, **small)
    pets.rename(moved)
    assert "pets is done" in run_notebook(dataset="./moved", until=LOOP, **small)
    make_folder(moved, horse=9)
    with pytest.raises(ValueError, match="classes was .'cat', 'dog'. and is now"):
        run_notebook(dataset="./moved", **small)


def test_a_run_is_found_as_tab_completion_writes_it():
    folder = vit_helpers.ROOT / "runs" / PUBLISHED
    for name in (f"{PUBLISHED}/", f"runs/{PUBLISHED}", f"./runs/{PUBLISHED}/", folder):
        assert vit_helpers.find_run(name) == folder
    everything = vit_helpers.run_folders(["**"])
    for name in ("runs/", "./", vit_helpers.ROOT / "runs"):
        assert vit_helpers.run_folders([name]) == everything
    best = vit_helpers.ROOT / "saved_models" / PUBLISHED / "best.pt"
    for name in (folder, f"saved_models/{PUBLISHED}/best.pt", best.parent):
        assert vit_helpers.find_checkpoint(name) == best


# ---- where things are

def script(*arguments, shell="bash", cwd="/", path=SCRIPT, **environment):
    """The finished process of train_job.sh; None in the environment: not there."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    given = {name: str(value) for name, value in given.items() if value is not None}
    return subprocess.run([shell, path, *arguments], cwd=cwd, env=given, capture_output=True,
                          text=True, timeout=300)


def copied_project(place):
    """The suite without runs in a folder of its own."""
    place.mkdir(parents=True)
    for name in ("vit_helpers.py", "train_job.sh", "Makefile", "requirements.txt"):
        shutil.copy(vit_helpers.ROOT / name, place)
    shutil.copytree(vit_helpers.NOTEBOOKS, place / "notebooks",
                    ignore=shutil.ignore_patterns(".*"))
    (place / ".venv").symlink_to(vit_helpers.ROOT / ".venv")
    return place


@pytest.fixture(scope="module")
def copied():
    with tempfile.TemporaryDirectory() as place:
        yield copied_project(Path(place) / "my pr\u00f6ject")


def slim_path(place, *absent):
    """A PATH with all tools of this machine but for some."""
    place.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if not tool.name.startswith(absent) and not (place / tool.name).exists():
                (place / tool.name).symlink_to(tool)
    return str(place)


def test_one_run_where_everything_is_odd(copied, tmp_path):
    """sh, a link to a link, spaces and umlauts, a relative VIT_HOME, no HOME, CDPATH, none of git,
    nproc, getent and make, and files with the names of modules where it was typed."""
    (tmp_path / "suite").symlink_to(copied)
    (tmp_path / "train").symlink_to("suite/train_job.sh")
    for name in ("random.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('imported')")
    given = {**TINY, "model": "vit", "epochs": 1, "run": "runs/odd/"}
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    shown = script(*options, shell="sh", cwd=tmp_path, path="train", HOME=None, NPROC="2",
                   VIT_HOME="h\u00f6 me/x", CDPATH=f".:{copied}",
                   PATH=slim_path(tmp_path / "tools", "git", "nproc", "getent", "make"))
    assert shown.returncode == 0, shown.stdout + shown.stderr
    place = tmp_path / "h\u00f6 me" / "x"
    assert json.loads((place / "runs" / "odd" / "results.json").read_text())["epochs"] == 1
    config = json.loads((place / "runs" / "odd" / "config.json").read_text())
    assert (config["ranks"], config["threads"], config["git_commit"]) == (2, 1, "")
    assert shown.stdout.count("epoch   1/1") == shown.stdout.count("images to train on") == 1
    assert (place / "runs" / "odd" / "06_run.ipynb").exists()
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["odd"]


SETUP = 'echo "ROOT=$ROOT HOME=$VIT_HOME CWD=$VIT_CWD"; exit 0'     # what train_job.sh found


@pytest.mark.parametrize("shell", ["bash", "sh", "dash"])
def test_the_project_is_found_from_every_shell_by_links_and_with_a_home_in_quotes(
        shell, copied, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    (tmp_path / "setup").write_text(SETUP)
    shown = script(shell=shell, cwd=copied / "notebooks", path="../train_job.sh",
                   HOME=tmp_path, VIT_HOME="~/scratch", VIT_SETUP=tmp_path / "setup")
    home, cwd = tmp_path / "scratch", copied / "notebooks"
    assert shown.stdout.strip() == f"ROOT={copied} HOME={home} CWD={cwd}", shown.stderr


def test_a_file_to_source_must_be_there_and_sees_none_of_the_options(copied, tmp_path):
    python = Path(sys.executable).parent
    (tmp_path / "setup").write_text(f"PATH='{python}':$PATH; echo \"sees $#\"; set -- -p seed 1\n")
    path = copied / "train_job.sh"
    shown = script("vit", path=path, VIT_HOME=tmp_path, VIT_SETUP=tmp_path / "setup")
    assert "sees 0\n" in shown.stdout and "do not know 'vit'" in shown.stdout, shown.stderr
    shown = script("vit", path=path, VIT_HOME=tmp_path, VIT_SETUP=tmp_path / "none")
    assert shown.returncode == 1 and f"VIT_SETUP={tmp_path / 'none'}" in shown.stdout


FAKE_SCONTROL = """#!/bin/sh
echo "JobId=7 Power= Command={script} -p model vit -r run a WorkDir=/tmp StdErr=/tmp/x"
"""


def test_a_batch_job_finds_a_project_with_spaces_in_its_path(copied, tmp_path):
    """SLURM runs a copy; its record names the original, with the options after it."""
    shutil.copy(SCRIPT, tmp_path / "slurm_script")
    (tmp_path / "scontrol").write_text(FAKE_SCONTROL.format(script=copied / "train_job.sh"))
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "setup").write_text(SETUP)
    shown = script(path=tmp_path / "slurm_script", VIT_HOME=tmp_path, SLURM_JOB_ID="7",
                   VIT_SETUP=tmp_path / "setup", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert shown.stdout.startswith(f"ROOT={copied} HOME={tmp_path}"), shown.stdout + shown.stderr


def test_a_job_script_that_is_sourced_leaves_the_shell_alone():
    sourced = subprocess.run(["bash", "-c", f". '{SCRIPT}'; echo still here"], text=True,
                             capture_output=True)
    assert sourced.stdout.endswith("rather than source it\nstill here\n")


def test_where_the_models_cannot_be_listed_the_job_fails(copied, tmp_path):
    broken = tmp_path / "suite"
    shutil.copytree(copied, broken, symlinks=True)
    (broken / "vit_helpers.py").write_text("raise ImportError('no torch')")
    shown = script(path=broken / "train_job.sh", VIT_HOME=tmp_path)
    assert shown.returncode != 0 and "Runs are in" not in shown.stdout


@pytest.mark.parametrize("given, expected", [("scratch", "{cwd}/scratch"), ("~/x", "{home}/x"),
                                             ("/abs", "/abs"), ("", str(vit_helpers.ROOT))])
def test_a_home_is_meant_where_it_is_typed(given, expected, tmp_path, monkeypatch):
    """Not where the process that started this one was: its PWD may still say that."""
    for name, value in {"VIT_HOME": given, "HOME": "/some/home", "PWD": "/elsewhere"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)        # no kernel
    home = runpy.run_path(vit_helpers.ROOT / "vit_helpers.py")["HOME"]
    assert str(home) == expected.format(cwd=tmp_path, home="/some/home")


# ---- parameters

def checked(cell, *later):
    """The parameters as notebook 6 has them after these cells."""
    namespace, sources = {}, [f"{CELLS[0]}\n{cell}\n", *later]
    for source in sources:
        exec("\n".join(line for line in source.split("\n") if line[:1] not in "%!"), namespace)
    return vit_helpers.check_parameters({**namespace, "In": ["", *sources]})


@pytest.mark.parametrize("cell, name, value", [
    ("import numpy as np\nlearning_rate = np.float32(0.1)", "learning_rate", 0.1),
    ("import numpy as np\nepochs = np.int64(3)", "epochs", 3),
    ("import numpy as np\ndims = np.linspace(16, 48, 3)", "dims", "16,32,48"),
    ("dims = range(16, 64, 16)", "dims", "16,32,48"),
    ("augment = ['crop', 'flip']", "augment", "crop,flip"),
    ("merge_at = 2, 3", "merge_at", "2,3"), ("merge_at = ()", "merge_at", ""),
    ("import torch\ndevice = torch.device('cpu')", "device", "cpu"),
    ("from pathlib import Path\ndataset = Path('a') / 'b'", "dataset", "a/b"),
    ("for i in range(2):\n    seed = 7", "seed", 7),
    ("width, height = 8, 9\nimage_size = width", "image_size", 8),
    ("epochs = 2\nepochs += 1  # epochz = 5", "epochs", 3),
    ("learning_rate = '1e-3'", "learning_rate", 0.001),
    ("n = 3\nrun = f'try-{n}'", "run", "try-3"), ("del epochs", "epochs", None),
    ("def twice(x):\n    y = 2 * x\n    return y\n\nseed = twice(4)", "seed", 8)])
def test_any_python_in_the_parameters_cell(cell, name, value):
    assert checked(cell)[name] == value


@pytest.mark.parametrize("cell", [
    "if True:\n    epochz = 3", "for epochz in range(3):\n    pass", "%env A=1\nepochz = 3",
    "!ls\nepochz = 3", "epochz, seed = 3, 4", "# a comment, epochs = 3\nepochz: int = 3"])
def test_a_misspelt_parameter_is_found_wherever_it_stands(cell):
    with pytest.raises(ValueError, match="unknown parameter 'epochz', did you mean 'epochs'"):
        checked(cell)


def test_a_misspelt_parameter_is_found_in_a_cell_of_which_little_is_left():
    with pytest.raises(ValueError, match="'epochz'"):
        vit_helpers.check_parameters({"In": ["model = 'vit'\nseed = 1\nepochz = 3"], "seed": 1})


def test_a_line_that_is_deleted_before_the_cell_is_run_again_counts_no_more():
    without = "\n".join(line for line in CELLS[0].split("\n") if not line.startswith("epochs ="))
    assert checked("epochs = 3", without)["epochs"] is None
    assert checked("epochs = 3", without, "epochs = 5")["epochs"] == 5
    assert checked("epochs = 3", "# Parameters\nseed = 2")["epochs"] == 3


@pytest.mark.parametrize("value", [10**400, math.inf, math.nan, True, [3], "", {3}, object()])
def test_what_is_no_number_is_refused_under_its_name(value):
    with pytest.raises(ValueError, match="parameter 'epochs' is .{1,90}, but it must be int"):
        vit_helpers.as_type("epochs", value, int)


@pytest.mark.parametrize("value", [[16, 24.5], [True, 16], [None]])
def test_a_list_with_something_else_than_whole_numbers_and_words_is_refused(value):
    with pytest.raises(ValueError, match="parameter 'dims' is"):
        vit_helpers.as_type("dims", value, str)


@pytest.mark.parametrize("name, value", [("seed", 2**32), ("threads", 100_000), ("workers", -1),
                                         ("mlp_ratio", 1e-9), ("learning_rate", math.inf)])
def test_a_number_that_would_end_in_the_middle_is_refused_at_once(running, name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        resolve(running, **{name: value})


@pytest.mark.parametrize("run", ["x" * 300, "a/" + "\u00fc" * 101, "a b", ".hidden", "a/.b",
                                 "/tmp/x", "a/../../b", "a\nb"])
def test_a_run_name_that_cannot_be_a_folder_is_refused(running, run):
    with pytest.raises(ValueError, match="^run is ") as caught:
        resolve(running, run=run)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("recipe", [None, "finetune"])
def test_a_small_folder_gets_a_small_batch_by_any_recipe(running, tmp_path, recipe):
    (tmp_path / "a").mkdir()
    for number in range(40):
        (tmp_path / "a" / f"{number}.png").touch()
    assert resolve(running, dataset=str(tmp_path), recipe=recipe)["batch_size"] == 8


def test_files_that_are_not_trained_on_do_not_make_the_batch_larger(running, tmp_path):
    """A test/ without labels, larger than train/, as competitions have it."""
    for part, count in (("train/a", 20), ("train/b", 20), ("test", 2000)):
        (tmp_path / part).mkdir(parents=True)
        for number in range(count):
            (tmp_path / part / f"{number}.png").touch()
    assert resolve(running, dataset=str(tmp_path))["batch_size"] == 8


@pytest.mark.parametrize("name", [".pets", "-x", "(1) pets", "a..b", "\u65e5\u672c\u8a9e" * 25,
                                  "x" * 240, "data set"])
def test_a_default_name_is_a_folders_whatever_the_data_set_is_called(running, tmp_path, name):
    (tmp_path / name).mkdir()
    run = resolve(running, dataset=str(tmp_path / name))["run"]
    (tmp_path / "runs" / run).mkdir(parents=True)
    assert len(run.encode()) < 200


# ---- images into tensors

@pytest.fixture(scope="module")
def model():
    return vit_helpers.load_model(PUBLISHED)


def test_one_image_in_all_types_and_places_gives_one_answer(model, digits, tmp_path):
    image = digits.test.images[2]                                           # (1, 8, 8)
    array, grey = image[0].numpy(), Image.fromarray(image[0].numpy())
    grey.save(tmp_path / "a.png")
    file = tempfile.NamedTemporaryFile(suffix=".png")
    file.write((tmp_path / "a.png").read_bytes())
    same = {"bfloat16": (image / 255).bfloat16(), "float64": image.double() / 255,
            "with a gradient": (image / 255).requires_grad_(), "big-endian": array.astype(">u2"),
            "backwards": array[::-1].copy()[::-1], "columns first": np.asfortranarray(array),
            "lists, as JSON has them": array.tolist(), "rounded": array / 255 * (1 + 1e-6),
            "LA": grey.convert("LA"), "La": grey.convert("LA").convert("La"),
            "P": grey.convert("P"), "CMYK": grey.convert("CMYK"), "F": grey.convert("F"),
            "with alpha": np.stack([array, np.full_like(array, 255)], -1),
            "a temporary file": file, "an open file": open(tmp_path / "a.png", "rb"),
            "masked": np.ma.masked_array(array)}
    (name, confidence), *_ = vit_helpers.predict(model, array)
    assert name == str(digits.test.labels[2].item())
    for kind, source in same.items():
        (other, its_confidence), *_ = vit_helpers.predict(model, source)
        assert other == name, kind
        assert its_confidence == pytest.approx(confidence, abs=0.02), kind


@pytest.mark.parametrize("source, said", [
    (np.zeros((0, 8)), "it has no pixels"), (np.zeros((8, 0, 3), np.uint8), "it has no pixels"),
    (np.linspace(0, 1.02, 64).reshape(8, 8), "go from 0 to 1.02"),      # resized, beyond 1
    (np.arange(64.).reshape(8, 8) / 4, "from 0 to 1 or from 0 to 255"),     # 0 to 16, as sklearn's
    (np.linspace(-2, 2, 64).reshape(8, 8), "not normalised"),
    (np.full((8, 8), math.nan), "go from nan"), (np.zeros((8, 8), complex), "complex128"),
    (np.zeros((20, 8, 8)), "many grey images are"), (None, "no image"), (3, "no image"),
    (np.zeros(9), "its shape is"), ("nowhere.png", re.escape(os.getcwd()))])
def test_what_is_no_image_is_said_and_never_black(model, source, said):
    with pytest.raises(ValueError, match=said):
        vit_helpers.predict(model, source)


def test_an_image_that_is_dark_in_a_batch_stays_dark(model):
    batch = np.zeros((2, 8, 8, 1), np.float32)
    batch[0], batch[1, 0, 0] = 200, 1                   # alone, 1 would be white
    answers = vit_helpers.predict(model, batch)
    expected = vit_helpers.predict(model, batch.astype(np.uint8))
    for answer, other in zip(answers, expected, strict=True):
        assert [name for name, _ in answer] == [name for name, _ in other]
        assert answer[0][1] == pytest.approx(other[0][1], abs=1e-5)


def test_of_a_folder_what_is_no_image_is_skipped_and_counted(model, digits, tmp_path, capsys):
    for i in range(3):
        Image.fromarray(digits.test.images[i][0].numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("notes")
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "1.png", tmp_path / ".ipynb_checkpoints")
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (tmp_path / "2.png").rename(elsewhere / "2.png")
    (tmp_path / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path)                   # found once all the same
    answers = vit_helpers.predict(model, str(tmp_path))
    paths = [tmp_path / "0.png", tmp_path / "1.png", elsewhere / "2.png"]
    assert answers == vit_helpers.predict(model, paths)
    assert f"2 of 5 files skipped as no readable images, the first: {tmp_path}/0.txt" in (
        capsys.readouterr().out)
    with pytest.raises(ValueError, match="cut.png"):            # asked for by name
        vit_helpers.predict(model, [tmp_path / "cut.png"])


def test_images_from_a_generator_are_read_a_batch_at_a_time(model):
    alive, most = set(), []

    class Counted(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def images():
        for _ in range(100):
            image = np.zeros((8, 8), np.uint8).view(Counted)
            alive.add(id(image))
            most.append(len(alive))
            yield image

    assert len(vit_helpers.predict(model, images(), batch_size=10)) == 100
    assert max(most) < 10


# ---- in the kernel

class Kernel:
    """A kernel as JupyterLab starts it for a notebook of the suite."""

    def __enter__(self):
        for _ in range(3):                  # two that start at once may pick the same port
            self.manager = KernelManager(kernel_name="python3")
            self.manager.start_kernel(cwd=str(vit_helpers.NOTEBOOKS))
            self.client = self.manager.client()
            self.client.start_channels()
            try:
                self.client.wait_for_ready(timeout=90)
                return self
            except RuntimeError:
                self.__exit__()
        raise AssertionError("no kernel started")

    def __exit__(self, *error):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, *cells):
        """Run cells, until one ends with an error; returns what was printed and the error."""
        shown = []
        for cell in cells:
            reply = self.client.execute_interactive(
                cell, timeout=300, allow_stdin=False,
                output_hook=lambda message: shown.append(message["content"].get("text", "")))
            if reply["content"]["status"] == "error":
                return "".join(shown), reply["content"]["ename"], reply["content"]["evalue"]
        return "".join(shown), "", ""


STOP_IN = """
import os, signal
real, calls = training.{name}, []
def stop(*arguments, **options):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGINT)         # what JupyterLab's square sends
    return real(*arguments, **options)
training.{name} = stop
"""


def test_interrupted_run_again_and_changed_in_one_kernel():
    before_loop = CELLS[1:CELLS.index(LOOP)]
    with Kernel() as kernel:
        assert kernel.run(parameters_cell(run="first"), *before_loop)[1:] == ("", "")
        for name, call in (("train_step", 3), ("evaluate", 2), ("train_step", 30)):
            kernel.run(STOP_IN.format(name=name, call=call))
            assert kernel.run(LOOP)[1] == "KeyboardInterrupt"
            kernel.run(f"training.{name} = real")
        early = kernel.run(*CELLS[CELLS.index(LOOP) + 1:])
        assert early[1] == "ValueError" and "run first is not finished" in early[2]
        lock = vit_helpers.SAVED_MODELS / "first"
        running = vit_helpers.load_notebook("06_run")
        with pytest.raises(RuntimeError, match="is being trained by another process"):
            running.lock_run(lock)
        other = kernel.run(parameters_cell(run="second", seed=1), *CELLS[1:])   # Run All
        assert other[1:] == ("", "") and "epoch   1/3" in other[0]
        running.lock_run(lock)                          # the kernel has let it go
        running.let_go(lock)
        again = kernel.run(parameters_cell(run="second", seed=1), *before_loop)
        assert again[1:] == ("", "") and "second is done" in again[0]
        back = kernel.run(parameters_cell(run="first"), *CELLS[1:])
        assert back[1:] == ("", "") and "first goes on" in back[0]
    for run in ("first", "second"):
        assert vit_helpers.read_history(run)["epoch"] == [1, 2, 3]
    assert vit_helpers.read_run(vit_helpers.find_run("second"))["config"]["seed"] == 1


def steps(reader):
    """The epochs of the validation loss that an open reader of a log shows now."""
    reader.Reload()
    if hasattr(reader, "Scalars"):
        return [event.step for event in reader.Scalars("loss/val")]
    return [event.step for event in reader.Tensors("loss/val")]


def test_the_log_that_is_open_in_tensorboard_shows_each_epoch_once(training, monkeypatch):
    """The reader of scripts, and the one of TensorBoard itself where it has no data server."""
    run, folder = dict(run="open-log"), vit_helpers.RUNS / "open-log"
    interrupted_after(training, monkeypatch, 2, **run)
    readers = [event_accumulator.EventAccumulator(str(folder)),
               plugin_event_accumulator.EventAccumulator(str(folder))]
    assert [steps(reader) for reader in readers] == [[1, 2]] * 2
    time.sleep(1)                                       # logs are named by the second
    run_notebook(**run)
    assert [steps(reader) for reader in readers] == [[1, 2, 3]] * 2
    assert vit_helpers.read_history("open-log")["epoch"] == [1, 2, 3]
    shutil.rmtree(vit_helpers.SAVED_MODELS / "open-log")
    (folder / "results.json").unlink()
    time.sleep(1)
    interrupted_after(training, monkeypatch, 1, **run)          # from its beginning
    assert [steps(reader) for reader in readers] == [[1]] * 2


def written_log(name, rows, **results):
    """A run folder with this log, rows of (epoch, validation loss), and no checkpoint."""
    folder = vit_helpers.RUNS / name
    folder.mkdir(parents=True)
    vit_helpers.write_json(folder / "config.json", small_config(epochs=4, run=name))
    with SummaryWriter(folder) as writer:
        for epoch, loss in rows:
            for tag in vit_helpers.TAGS:
                writer.add_scalar(tag, loss, epoch)
    return name


@pytest.mark.parametrize("rows, expected", [
    ([(1, 4.), (2, 3.), (2, 2.5), (1, 3.5), (3, 2.)], {1: 3.5, 2: 2.5, 3: 2.}),     # twice
    ([(1, 4.), (4, 1.)], {1: 4., 4: 1.}), ([(1, 4.), (2, math.nan), (3, 2.)], {1: 4., 3: 2.})])
def test_a_log_that_is_not_as_it_should_be_gives_what_it_has(rows, expected):
    run = written_log(f"odd-log-{len(rows)}-{len(expected)}", rows)
    history = vit_helpers.read_history(run)
    assert dict(zip(history["epoch"], history["loss/val"], strict=True)) == expected


def test_curves_of_logs_with_gaps_are_averaged_epoch_by_epoch():
    histories = [{"epoch": [1, 2, 3, 4], "loss/val": [8., 6., 4., 2.]},
                 {"epoch": [1, 3, 4, 5], "loss/val": [6., 2., 0., 9.]}]
    axis = plt.figure().subplots()
    vit_helpers.plot_spread(axis, histories, "loss/val", "val", "black")
    plt.close("all")
    assert axis.lines[0].get_xdata().tolist() == [1, 3, 4]
    assert axis.lines[0].get_ydata().tolist() == [7, 3, 1]


# ---- serving

SERVE = """
import sys, torch
network = torch.jit.load(sys.argv[1])
images, logits = torch.load(sys.argv[2])
torch.testing.assert_close(network(images), logits)
print(type(network).__name__, len(images))
"""


@pytest.mark.filterwarnings("ignore")                       # torch.jit is deprecated, and warns
@pytest.mark.parametrize("settings", [dict(merge_at=(2,), pool="mean"),
                                      dict(stem="conv", image_size=16, patch_size=4)])
def test_a_traced_model_is_saved_and_served_without_the_suite(settings, models, tmp_path):
    shape = dict(image_size=8, patch_size=2, dims=(16, 32), head_dim=8)
    network = models.ViT(**{**shape, **settings}).eval()
    images = torch.randn(5, *network.image_shape)
    torch.jit.save(torch.jit.trace(network, images[:2]), tmp_path / "model.ts")
    torch.save((images, network(images).detach()), tmp_path / "expected.pt")
    shown = subprocess.run([sys.executable, "-c", SERVE, tmp_path / "model.ts",
                            tmp_path / "expected.pt"], cwd="/", capture_output=True, text=True)
    assert shown.stdout.endswith(" 5\n"), shown.stderr


# ---- resources

@pytest.mark.parametrize("environment, threads", [
    ({"OMP_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "4,2"}, 4), ({"MKL_NUM_THREADS": "2"}, 2),
    ({"OMP_NUM_THREADS": "some"}, 6), ({"OMP_NUM_THREADS": ""}, 6), ({}, 6),
    ({"SLURM_CPUS_PER_TASK": "4"}, 4), ({"SLURM_CPUS_PER_TASK": "64"}, 6),
    ({"LOCAL_WORLD_SIZE": "2"}, 3), ({"LOCAL_WORLD_SIZE": "8"}, 1),
    ({"SLURM_CPUS_PER_TASK": "4", "LOCAL_WORLD_SIZE": "2"}, 2)])
def test_threads_are_what_the_environment_says(monkeypatch, environment, threads):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    monkeypatch.setattr(vit_helpers, "cpu_quota", lambda: math.inf)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert vit_helpers.load_notebook("04_training").usual_threads() == threads


@pytest.mark.parametrize("files, cpus", [
    ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "max 100000\n"}, math.inf), ({}, math.inf),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf)])
def test_the_quota_of_a_container_is_known(tmp_path, files, cpus):
    """docker run --cpus 2 on a machine of 64 cores."""
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert vit_helpers.cpu_quota(tmp_path) == cpus


THREADS = """
import torch, vit_helpers
vit_helpers.load_notebook("04_training").start_processes({"device": "cpu"})
print(torch.get_num_threads())
"""


@pytest.mark.skipif(not shutil.which("taskset"), reason="needs taskset")
def test_a_process_on_one_core_has_one_thread():
    given = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    pinned = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    shown = subprocess.run([*pinned, sys.executable, "-c", THREADS], capture_output=True, text=True,
                           env=given, cwd=vit_helpers.ROOT)
    assert shown.stdout.strip() == "1", shown.stderr


@pytest.mark.parametrize("environment, given", [
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, True), ({"CUDA_VISIBLE_DEVICES": "GPU-8f"}, True),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, False), ({"CUDA_VISIBLE_DEVICES": "-1,0"}, False),
    ({"SLURM_GPUS_ON_NODE": "2"}, True), ({"SLURM_GPUS_ON_NODE": "0"}, False), ({}, False),
    ({"nvidia-smi": "echo GPU 0: NVIDIA H100"}, True),
    ({"nvidia-smi": "echo Failed to initialize NVML: Driver/library version mismatch"}, True),
    ({"nvidia-smi": "echo No devices were found"}, False)])
def test_which_gpus_a_job_was_given(monkeypatch, tmp_path, environment, given):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool = environment.pop("nvidia-smi", "exit 9")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{tool}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert bool(vit_helpers.given_gpus()) == given


# ---- leftovers: half of a run

def half_of(run, name, *gone):
    """A copy of a run in which these files were deleted."""
    for base in (vit_helpers.RUNS, vit_helpers.SAVED_MODELS):
        shutil.copytree(base / run, base / name)
    for pattern in gone:
        for path in vit_helpers.HOME.glob(pattern.format(name)):
            path.unlink()
    return name


@pytest.fixture(scope="module")
def finished():
    run_notebook(run="finished")
    return "finished"


@pytest.fixture(scope="module")
def begun():
    training = vit_helpers.load_notebook("04_training")
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(training, patch, 2, run="begun")
    return "begun"


@pytest.mark.parametrize("gone, said", [
    (["runs/{}/config.json"], "config.json is written again, out of"),
    (["runs/{}/events*"], "nothing is trained again"),
    (["runs/{}/events*", "saved_models/{}/*.pt"], "there is no last.pt to take them from"),
    (["runs/{}/predictions.npz"], "or results.json alone, and the best model is tested again"),
    (["runs/{}/predictions.npz", "runs/{}/results.json"], "goes on from its last checkpoint"),
    (["saved_models/{}/best.pt"], "best.pt is gone; what is there can still be used")])
def test_what_is_left_of_a_finished_run_is_used_and_what_is_missing_said(finished, gone, said):
    name = half_of(finished, f"half-{abs(hash(said)) % 10**6}", *gone)
    shown = run_notebook(run=name)
    assert said in shown and "epoch   1/3" not in shown
    config = vit_helpers.read_json(vit_helpers.RUNS / name / "config.json")
    assert config["dims"] == [16, 32]
    if "results.json" in gone[-1]:
        assert (vit_helpers.RUNS / name / "predictions.npz").exists()


def test_nothing_says_what_was_trained(finished):
    name = half_of(finished, "half-unknown", "runs/{}/config.json", "saved_models/{}/*.pt")
    with pytest.raises(ValueError, match="neither config.json nor a checkpoint .* delete it"):
        run_notebook(run=name)


@pytest.mark.parametrize("gone, epochs", [
    (["runs/{}/*"], [3]), (["saved_models/{}/last.pt"], [2, 3]),
    (["saved_models/{}/*"], [1, 2, 3])])
def test_what_is_left_of_a_run_that_was_begun_goes_on(begun, finished, gone, epochs):
    name = half_of(begun, f"rest-{len(epochs)}", *gone)
    shown = run_notebook(run=name)
    assert [int(epoch) for epoch in re.findall(r"epoch +(\d+)/3", shown)] == epochs
    assert ("begins anew" in shown) == (epochs[0] == 1)
    losses = [vit_helpers.read_history(run)["loss/val"] for run in (name, finished)]
    assert losses[0] == losses[1]


def test_a_run_whose_best_model_is_gone_does_not_go_on(begun):
    name = half_of(begun, "rest-without-best", "saved_models/{}/best.pt")
    last = vit_helpers.SAVED_MODELS / name / "last.pt"
    content = vit_helpers.load_checkpoint(last)
    content["history"][-1]["val_loss"] = math.inf           # so it does not hold the best model
    vit_helpers.save(last, content)
    with pytest.raises(ValueError, match="best.pt, the best model so far, is gone. .*last.pt"):
        run_notebook(run=name)


def test_a_refused_command_changes_nothing(begun, finished, tmp_path, monkeypatch):
    """The run's folder is deleted, its checkpoints are not; other settings, then the old ones.
    train_job.sh does not hear of the run: its notebook stays as it is."""
    name = half_of(begun, "rest-refused", "runs/{}/*")
    monkeypatch.setenv("VIT_JOB", str(tmp_path))
    for run, changed, said in ((name, {"momentum": 0.5}, "last.pt.: momentum was 0.9"),
                               (finished, {"epochs": 4}, "config.json.: epochs was 3")):
        with pytest.raises(ValueError, match=f"begun with other settings .*{said}"):
            run_notebook(run=run, **changed)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("VIT_JOB")
    assert "epoch   3/3" in run_notebook(run=name)
    losses = [vit_helpers.read_history(run)["loss/val"] for run in (name, finished)]
    assert losses[0] == losses[1]


def test_a_plan_with_other_settings_under_the_name_of_a_finished_run_is_refused(running, finished,
                                                                                capsys):
    entry = {**TINY, "model": "vit", "run": finished}
    running.train_plan([entry])
    assert "0 of 1 runs to train" in capsys.readouterr().out
    with pytest.raises(ValueError, match="config.json.: epochs was 3 and is now 2; dims was"):
        running.train_plan([{**entry, "epochs": 2, "dims": "16,16"}])
    with pytest.raises(ValueError, match="dataset was 'digits' and is now 'mnist'"):
        running.train_plan([{**entry, "dataset": "mnist"}])


def test_an_entry_of_a_plan_without_a_model_is_one_run_of_the_default_model(running, monkeypatch):
    def run(command, **options):
        given.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    given = []
    monkeypatch.setattr(running.subprocess, "run", run)
    running.STOP.clear()
    for entry in ({}, {"model": None}, {"model": "towervit"}):
        running.train_by_script({"run": "one", **entry})
    assert [re.search(r"-r model (\S+)", command)[1] for command in given] == ["vit", "vit",
                                                                              "towervit"]


def test_a_finished_run_without_its_log_is_read_from_its_checkpoint(finished, capsys):
    name = half_of(finished, "half-no-log", "runs/{}/events*")
    found, there = (vit_helpers.read_history(run)["loss/val"] for run in (name, finished))
    assert found == pytest.approx(there, rel=1e-6)
    vit_helpers.print_runs([name])
    assert "3/3" in capsys.readouterr().out


def test_predictions_that_were_deleted_or_damaged_are_said_so(finished):
    name = half_of(finished, "half-no-predictions", "runs/{}/predictions.npz")
    with pytest.raises(FileNotFoundError, match="was deleted. Delete results.json beside it"):
        vit_helpers.read_predictions(name)
    for left in (b"PK", b""):
        (vit_helpers.RUNS / name / "predictions.npz").write_bytes(left)
        with pytest.raises(ValueError, match="predictions.npz is damaged"):
            vit_helpers.read_predictions(name)
    shutil.rmtree(vit_helpers.SAVED_MODELS / name)
    with pytest.raises(FileNotFoundError, match=f"runs/{name} is there, so its model was deleted"):
        vit_helpers.load_model(name)


# ---- train longer

def test_a_finished_run_is_trained_longer_under_another_name(finished):
    with pytest.raises(ValueError, match="-r initial_weights finished -r run") as caught:
        run_notebook(run="finished", epochs=6)
    assert "epochs was 3 and is now 6" in str(caught.value)
    assert "warmup_epochs" not in str(caught.value)
    shown = run_notebook(run="longer", initial_weights="finished/", dims=None, head_dim=None)
    assert "epoch   3/3" in shown
    runs = [vit_helpers.RUNS / run for run in ("longer", "finished")]
    longer, before = map(vit_helpers.read_run, runs)
    assert longer["config"]["recipe"] == before["config"]["recipe"]
    assert longer["config"]["initial_weights"] == "finished"
    assert longer["history"]["loss/val"][0] < before["history"]["loss/val"][0]


def test_a_run_goes_on_after_the_weights_that_it_began_with_are_gone(
        finished, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_CWD", str(tmp_path))
    weights = tmp_path / "weights.pt"
    shutil.copy(vit_helpers.SAVED_MODELS / finished / "best.pt", weights)
    given = dict(run="orphan", initial_weights="weights.pt", dims=None, head_dim=None)
    run_notebook(**given)
    before = vit_helpers.read_history("orphan")
    weights.unlink()
    (vit_helpers.RUNS / "orphan" / "results.json").unlink()     # as if killed before its end
    run_notebook(**given)
    assert (vit_helpers.RUNS / "orphan" / "results.json").exists()
    assert vit_helpers.read_history("orphan")["loss/val"] == before["loss/val"]
    with pytest.raises(FileNotFoundError, match="weights.pt"):
        run_notebook(**{**given, "run": "another"})
