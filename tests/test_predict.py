"""scripts/predict.py: what it writes, what it says, and how it ends."""
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import vit_helpers

SCRIPT = vit_helpers.ROOT / "scripts" / "predict.py"
RUN = "published/digits-seed0-vit"


def load_script(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


predict = load_script(SCRIPT)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 digits in folders named like classes, one image that is in none, one that is hidden, and
    a file that is no image."""
    folder, digits = tmp_path_factory.mktemp("some photos"), load_digits()
    for i, label in enumerate(digits.target[:40]):
        place = folder / "test" / str(label) / ("deeper" if i % 3 else ".")
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * (255 / 16)).astype("uint8"))
        image.save(place / f"no {i}.png")
    for name in ("new/-odd.png", "new/.hidden.png"):
        (folder / "new").mkdir(exist_ok=True)
        image.save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_the_table_says_what_the_model_says(photos, tmp_path, capfd):
    path = tmp_path / "found.csv"
    code = predict.main([RUN, str(photos), "--top", "3", "--batch-size", "7", "--output",
                         str(path)])
    out, said = capfd.readouterr()
    rows = list(csv.reader(path.open(newline="")))
    assert (code, out, os.listdir(tmp_path)) == (0, "", ["found.csv"])
    assert rows.pop(0) == ["path", "class", "probability", "runner_up", "runner_up_probability",
                           "class_3", "probability_3", "label"]
    assert len(rows) == 41 and not any("hidden" in row[0] for row in rows)
    wanted = vit_helpers.predict(RUN, [row[0] for row in rows], top=3)
    for row, answer in zip(rows, wanted, strict=True):
        assert row[1:7:2] == [name for name, _ in answer]
        assert [float(cell) for cell in row[2:7:2]] == pytest.approx([p for _, p in answer],
                                                                     abs=1e-5)
        assert row[7] == (re.search(r"/test/(\d)/", row[0]) or ["", ""])[1]
    right = sum(row[1] == row[7] for row in rows)
    assert f"top-1 accuracy {100 * right / 40:.2f}%, {right} of 40 (95% interval" in said
    assert "named like a class left out: 1" in said and "1 hidden file left out" in said
    of_5 = [row[1] == "5" for row in rows if row[7] == "5"]
    assert f"  5  {100 * sum(of_5) / len(of_5):6.2f}% of {len(of_5)}" in said
    assert "notes.txt cannot be read as an image" in said
    assert "1 of 42 files cannot be read as images" in said


def test_a_link_has_the_label_of_its_own_folder(photos, tmp_path, capfd):
    image = next((photos / "test" / "3").rglob("*.png"))
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "link.png").symlink_to(image)
    for name in ("7", "7/link.png"):
        assert predict.main([RUN, str(tmp_path / name), "--output", "-"]) == 0
        assert capfd.readouterr().out.endswith(",7\n")


def test_as_a_shell_expects_it(photos):
    """Only the table on standard output, names from another command, - as the first letter of a
    name, and a named file that cannot be read: code 1, the others are done."""
    command = (f"find . -name '*.png' -not -name '.*' | '{sys.executable}' '{SCRIPT}' {RUN} - "
               "notes.txt -- -odd.png")
    shutil.copy(photos / "new" / "-odd.png", photos / "new" / "other one.png")
    (photos / "new" / "notes.txt").write_text("no image")
    done = subprocess.run(command, shell=True, cwd=photos / "new", capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["path", "class", "probability", "runner_up",
                                "runner_up_probability"]
    assert sorted(line.split("  ")[0] for line in lines[1:]) == ["-odd.png", "./-odd.png",
                                                                "./other one.png"]
    assert all(line.startswith("predict: ") for line in done.stderr.splitlines())


def test_no_more_than_two_batches_are_in_memory(monkeypatch):
    waiting, most = 0, 0

    def read(path, config):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return path

    monkeypatch.setattr(predict, "read", read)
    for batch, images in predict.read_batches([predict.Item(i, None, False) for i in range(1000)],
                                              {}, 10):
        assert [item.path for item in batch] == images
        waiting -= len(images)
    assert (waiting, most <= 20) == (0, True)


def checkpoint_without(name):
    """A run whose config lacks `name`."""
    content = vit_helpers.load_checkpoint(vit_helpers.find_checkpoint(RUN))
    del content["config"][name]
    path = vit_helpers.SAVED_MODELS / f"without-{name}" / "best.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path.parent.name


BAD = [     # what is typed after the run's name, and what it ends with
    ("no such run", "published/digits-seed0-vitt", ["."],
     "no best.pt of a run .*near it: published/digits-seed0-vit"),
    ("a run without classes", lambda: checkpoint_without("classes"), ["."],
     "has no classes in its config, so it was not written by notebook 6"),
    ("a run without a model's class", lambda: checkpoint_without("class"), ["."],
     "has no class in its config"),
    ("a run that is like no other", "zzz", ["."], "`make runs` lists those that are there"),
    ("no such folder", RUN, ["nowhere"], "no images in nowhere"),
    ("an empty folder", RUN, ["empty"], "no images in empty"),
    ("all unreadable", RUN, ["bad"], "none of 2 files can be read as an image"),
    ("a device that there is not", RUN, ["bad", "--device", "tpu"], "device is 'tpu'"),
    ("an output in no folder", RUN, ["bad", "--output", "nowhere/x.csv"],
     "there is no folder .*nowhere"),
    ("a folder as output", RUN, ["bad", "--output", "empty"], "is a folder; name a file"),
    ("an image as output", RUN, ["bad/1.jpg", "--output", "bad/1.jpg"], "would be overwritten"),
    ("an image of a folder", RUN, ["good", "--output", "good/1.png"], "would be overwritten"),
]


@pytest.mark.parametrize("name, run, arguments, said", BAD, ids=[row[0] for row in BAD])
def test_what_cannot_work_ends_in_a_sentence(name, run, arguments, said, tmp_path, monkeypatch,
                                             capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    for i in (0, 1):
        (tmp_path / "bad" / f"{i}.jpg").write_text("no image")
    (tmp_path / "good").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "good" / "1.png")
    before = sorted(tmp_path.rglob("*"))
    code = predict.main([run() if callable(run) else run, *arguments])
    out, err = capfd.readouterr()
    print(f"{name}: {err.splitlines()[-1]}")
    assert (code, out) == (1, "") and re.search(said, err.splitlines()[-1])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_earlier_output(photos, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of 8 kB can be mounted by root only")
    try:
        (disk / "found.csv").write_text("earlier\n" + "x" * 6000)
        assert predict.main([RUN, str(photos), "--output", str(disk / "found.csv")]) == 1
        assert "found.csv: No space left on device" in capfd.readouterr().err.splitlines()[-1]
        assert os.listdir(disk) == ["found.csv"]
        assert (disk / "found.csv").read_text().startswith("earlier\n")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folders_without_permission(photos, tmp_path):
    """Named where they are met, in one sentence; an output in one is refused before any work."""
    closed = tmp_path / "closed"
    shutil.copytree(photos / "new", closed / "in")
    closed.chmod(0)
    command = [sys.executable, SCRIPT]
    if not os.geteuid():                                # root may read all, unless it gives that up
        if not shutil.which("setpriv"):
            pytest.skip("root may read all, and there is no setpriv to give that up")
        given_up = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={given_up}", f"--inh-caps={given_up}", *command]
    locked = shutil.copy(vit_helpers.find_checkpoint(RUN), tmp_path / "best.pt")
    locked.chmod(0)
    try:
        for run, arguments, said in [
                (RUN, [closed], "no images in"), (locked, [photos], "cannot read .*best.pt: Perm"),
                (RUN, [photos, "--output", closed / "x.csv"], "may not be written")]:
            done = subprocess.run([*command, run, *arguments], capture_output=True, text=True)
            assert done.returncode == 1 and re.search(said, done.stderr.splitlines()[-1])
            assert "Traceback" not in done.stderr and done.stdout == ""
    finally:
        closed.chmod(0o755)
