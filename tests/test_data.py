"""Notebook 2: draws, data sets by name, and folders of images with all that lies about in them.

The images made here are of one value each: 10 times the number of their class, plus 1, so that
every test can see whether an image has its own label.
"""
import contextlib
import hashlib
import io
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from sklearn.model_selection import train_test_split

import vit_helpers

RANDOM = np.random.default_rng(0)
hypothesis_settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis_settings.load_profile("suite")


def make(folder, mode="L", **counts):
    """A folder with so many 8 x 8 images in each; a__b is the folder a/b.  The value of an image
    tells its class: 10 k + 1 for the k-th class name in order."""
    classes = sorted({name.split("__")[-1] for name in counts})
    for name, count in counts.items():
        place = Path(folder, *name.split("__"))
        place.mkdir(parents=True, exist_ok=True)
        value = 10 * classes.index(name.split("__")[-1]) + 1
        for i in range(count):
            Image.new("L", (8, 8), value).convert(mode).save(place / f"{i:04d}.png")
    return Path(folder)


@pytest.fixture
def load(datasets):
    """Loads a folder at 8 px and checks that every image has the label of its class."""
    def run(folder, check=True, **options):
        data = datasets.load_data(str(folder), image_size=8, **options)
        for split in (data.train, data.val, data.test):
            assert len(split) == len(split.labels) > 0
            if check:
                images, labels = next(split.batches([torch.arange(len(split))]))
                assert torch.equal(images[:, 0, 4, 4], (10 * labels + 1).byte())
        return data
    return run


def sizes(data):
    return len(data.train), len(data.val), len(data.test)


# ---- three parts

def test_splits_are_apart_seeded_and_stratified(datasets, digits):
    again, other = datasets.load_data("digits"), datasets.load_data("digits", seed=1)
    assert torch.equal(digits.val.images, again.val.images)
    assert not torch.equal(digits.val.images, other.val.images)
    assert torch.equal(digits.test.images, other.test.images)
    parts = (digits.train, digits.val, digits.test)
    seen = [{image.numpy().tobytes() for image in split.images} for split in parts]
    assert sum(sizes(digits)) == 1797
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert torch.bincount(digits.val.labels).min() >= 13


def test_the_digits_are_drawn_as_ever(digits):
    """Published runs were trained and tested on these very images, in this order."""
    content = hashlib.sha256()
    for split in (digits.train, digits.val, digits.test):
        content.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
    assert content.hexdigest()[:16] == "32a0f1b7a7b1a938"
    assert digits.mean == [0.3053575893263024] and digits.std == [0.37595608181071727]


@pytest.mark.parametrize("fraction, seed", [(0.1, 0), (0.1, 3), (0.25, 1), (0.9, 2)])
def test_where_no_class_is_rare_the_draw_is_that_of_sklearn(datasets, fraction, seed):
    labels = torch.arange(600) % 7
    rest, drawn = datasets.split_indices(labels, fraction, seed)
    wanted = train_test_split(range(600), test_size=round(600 * fraction), stratify=labels,
                              random_state=seed)
    assert [rest, drawn] == [sorted(part) for part in wanted]


@pytest.mark.parametrize("rare, often", [(3, 600), (4, 800), (3, 100), (3, 3), (5, 5000)])
def test_every_class_is_in_every_part(datasets, load, tmp_path, rare, often):
    labels = torch.tensor([0] * often + [1] * rare)
    rest, test = datasets.split_indices(labels, 0.1, 0, keep=2)
    train, val = datasets.split_indices(labels[rest], 0.1, 5)
    assert torch.bincount(labels[test], minlength=2).min() >= 1
    assert torch.bincount(labels[rest][val], minlength=2).min() >= 1
    assert torch.bincount(labels[rest][train], minlength=2).min() >= 1
    assert sorted(rest + test) == list(range(rare + often))
    if often <= 100:
        data = load(make(tmp_path, rare=rare, often=often))
        for split in (data.train, data.val, data.test):
            assert split.labels.unique().tolist() == [0, 1]


def test_any_counts_and_fraction_are_drawn_or_refused(datasets):
    outcomes = Counter()

    @given(st.lists(st.integers(2, 60), min_size=1, max_size=6), st.floats(0.001, 0.999),
           st.integers(0, 9), st.sampled_from([1, 2]))
    @hypothesis_settings(max_examples=150)
    def check(counts, fraction, seed, keep):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        try:
            rest, drawn = datasets.split_indices(labels, fraction, seed, keep=keep)
        except ValueError as error:
            outcomes["refused"] += 1
            assert min(counts) <= keep or "val_fraction is" in str(error)
            return
        outcomes["accepted"] += 1
        assert sorted(rest + drawn) == list(range(len(labels)))
        assert torch.bincount(labels[drawn], minlength=len(counts)).min() >= 1
        assert torch.bincount(labels[rest], minlength=len(counts)).min() >= keep
        assert (rest, drawn) == datasets.split_indices(labels, fraction, seed, keep=keep)
        rarest_moved = 2 * len(counts)
        assert abs(len(drawn) - fraction * len(labels)) <= rarest_moved + 1

    check()
    assert outcomes["accepted"] > outcomes.total() / 3, outcomes


@pytest.mark.parametrize("counts", [{"cat": 9, "dog": 1}, {"cat": 9, "dog": 2}])
def test_a_class_that_cannot_be_in_every_part_is_named(load, tmp_path, counts):
    with pytest.raises(ValueError, match=f"class 'dog' has {counts['dog']} image"):
        load(make(tmp_path, **counts))


def test_a_class_may_be_too_small_because_files_are_skipped_and_the_error_says_so(load, tmp_path):
    folder = make(tmp_path, cat=9, dog=4)
    for i in range(2):
        (folder / "dog" / f"{i:04d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="'dog' has 2 images.*2 files skipped.*dog/0000.png"):
        load(folder)


@pytest.mark.parametrize("counts, needed", [({"train__cat": 2, "train__dog": 2, "val__cat": 1,
                                              "val__dog": 1}, (2, 2, 2)),
                                            ({"train__cat": 2, "train__dog": 2, "test__cat": 1,
                                              "test__dog": 1}, (2, 2, 2))])
def test_with_one_part_given_two_images_per_class_are_enough(load, tmp_path, counts, needed):
    assert sizes(load(make(tmp_path, **counts))) == needed


@pytest.mark.parametrize("dataset", ["digits", "folder"])
def test_a_val_fraction_that_leaves_nothing_is_named_with_what_it_may_be(datasets, tmp_path,
                                                                         dataset):
    if dataset == "folder":
        dataset = str(make(tmp_path, cat=30, dog=3))
    with pytest.raises(ValueError, match="val_fraction is 0.9999,.* at most 0") as caught:
        datasets.load_data(dataset, image_size=8, val_fraction=0.9999)
    most = float(re.search(r"at most ([\d.]+)", str(caught.value))[1])
    data = datasets.load_data(dataset, image_size=8, val_fraction=most)
    assert torch.bincount(data.train.labels).min() >= 1
    with pytest.raises(ValueError, match="val_fraction"):
        datasets.load_data(dataset, image_size=8, val_fraction=most + 0.05)


@pytest.mark.parametrize("name, value", [("image_size", 0), ("image_size", -3), ("seed", -1),
                                         ("val_fraction", 0), ("val_fraction", 1),
                                         ("val_fraction", float("nan")), ("channels", 2)])
def test_a_number_out_of_range_is_refused_under_its_own_name(datasets, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be "):
        datasets.load_data("digits", **{name: value})


# ---- by name

def test_named_images_are_brought_to_the_size_and_channels_asked_for(datasets, digits):
    data = datasets.load_data("digits", image_size=16, channels=3)
    assert data.train.images.shape[1:] == (3, 8, 8)     # kept small, enlarged batch by batch
    images = data.normalise(data.test.images)
    assert images.shape == (359, 3, 16, 16) and torch.equal(images[:, 0], images[:, 2])
    found = images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    read = torch.stack([vit_helpers.read_image(image, 3, 16) for image in data.test.images])
    assert (255 * found - read).abs().mean() < 1        # `predict` sees what was trained on
    small = torch.nn.functional.avg_pool2d(images[:, :1], 2).flatten()
    wanted = digits.normalise(digits.test.images).flatten()
    assert torch.corrcoef(torch.stack([small, wanted]))[0, 1] > 0.95


def test_the_training_part_alone_is_normalised_to_mean_0_and_deviation_1(digits):
    images = digits.normalise(digits.train.images).double()
    torch.testing.assert_close(images.mean().item(), 0.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(images.std(correction=0).item(), 1.0, atol=1e-6, rtol=0)
    assert abs(digits.normalise(digits.test.images).mean()) > 1e-4


def test_presets_and_titles_speak_of_the_same_data_sets(datasets):
    assert datasets.DATASETS == ["digits", "mnist", "fashion-mnist", "cifar10", "svhn", "cifar100"]
    assert {*datasets.PRESETS} == {*datasets.DATASETS, "folder"}
    assert {*datasets.DATASETS} < {*datasets.TITLES}
    assert {*datasets.TORCHVISION} == {*datasets.DATASETS} - {"digits"}


@pytest.mark.parametrize("shape, labels", [((4, 28, 28), "targets"), ((4, 32, 32, 3), "targets"),
                                           ((4, 3, 32, 32), "labels")])
def test_what_torchvision_gives_becomes_channels_first(datasets, shape, labels):
    values = RANDOM.integers(0, 255, shape, np.uint8)
    part = type("Part", (), {"data": values, labels: [3, 1, 0, 2]})
    images, numbers = datasets.as_tensors(part)
    wanted = {3: values[:, None], 4: values.transpose(0, 3, 1, 2) if shape[-1] == 3 else values}
    assert images.is_contiguous() and np.array_equal(images.numpy(), wanted[len(shape)])
    assert numbers.tolist() == [3, 1, 0, 2]


def test_a_run_finds_its_data_again(datasets, tmp_path):
    folder = make(tmp_path / "d", cat=9, dog=9)
    config = {"dataset": "./d", "folder": str(folder), "image_size": 4, "seed": 3,
              "val_fraction": 0.2, "in_channels": 3}
    data = datasets.load_data_of(config)
    wanted = datasets.load_data(folder, 4, 3, 0.2, channels=3)
    assert sizes(data) == sizes(wanted) and data.train.images.shape[1:] == (3, 4, 4)
    assert torch.equal(data.val.labels, wanted.val.labels)
    then = {**config, "classes": data.classes, "images": sizes(data)}
    assert sizes(datasets.load_data_of(then)) == sizes(data)
    make(tmp_path / "d", owl=9)
    with pytest.raises(ValueError, match=r"d has changed since the run: then .* of 2 classes, now "
                                         r".* of 3 classes"):
        datasets.load_data_of(then)


# ---- where things are

def test_a_missing_folder_is_named_in_full(datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/none; .*digits, mnist"):
        datasets.load_data("./none")
    with pytest.raises(ValueError, match=f"dataset is 'none'.*no folder {tmp_path}/none"):
        datasets.load_data("none")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/a.zip.*this is a file"):
        datasets.load_data("./a.zip")


def test_a_folder_in_the_root_is_proposed_where_a_notebook_does_not_find_it(datasets, monkeypatch):
    monkeypatch.chdir(vit_helpers.NOTEBOOKS)
    near = vit_helpers.ROOT / "tests"
    with pytest.raises(FileNotFoundError, match=f"notebooks/tests;.*did you mean {near}\\?"):
        datasets.load_data("./tests")


def test_a_path_is_taken_from_where_the_command_was_typed(datasets, load, tmp_path, monkeypatch):
    make(tmp_path / "data", cat=9, dog=9)
    make(tmp_path / "digits", cat=9, dog=9)
    monkeypatch.setenv("VIT_CWD", str(tmp_path))
    for spelled in ("data", "./data", "data/", str(tmp_path / "data")):
        assert datasets.is_folder(spelled) and sum(sizes(load(spelled))) == 18
    data = datasets.load_data("digits")
    assert sum(sizes(data)) == 1797 and f"{tmp_path}/digits" not in data.notes
    assert data.notes == ["digits is the data set of that name; for the folder say ./digits"]
    assert sum(sizes(load("./digits"))) == 18


# ---- what lies in a folder

@pytest.fixture(params=["in memory", "as needed", "as needed, many"])
def memory(datasets, monkeypatch, request):
    """A part as one tensor, or in its files, of which few or many are looked at as a whole."""
    if request.param != "in memory":
        monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    if request.param.endswith("many"):
        monkeypatch.setattr(datasets, "READ_FIRST", 0)
    return request.param


def test_a_folder_of_images_of_several_modes_and_sizes(datasets, digits, memory, tmp_path):
    for i in range(90):
        image = digits.train.images[digits.train.labels == i % 3][i // 3][0].numpy()
        path = tmp_path / f"digit {i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(image).resize((8 + i % 5, 9))
        image.convert(["L", "RGB", "P", "RGBA", "1"][i % 5]).save(path)
    (path.parent / "notes.txt").write_text("no image")
    (path.parent / "broken.png").write_bytes(b"\x89PNG broken")
    data = datasets.load_data(tmp_path, image_size=8, val_fraction=0.2, channels=1)
    assert data.classes == ["digit 0", "digit 1", "digit 2"] and sum(sizes(data)) == 90
    assert isinstance(data.train.images, torch.Tensor) == (memory == "in memory")
    assert data.notes == ["train: 2 files skipped as no readable images, the first: "
                          "digit 2/broken.png",
                          "train: 54 images in colour read as grey, the first: digit 0/003.png"]
    images, labels = next(data.train.batches([torch.arange(len(data.train))], workers=1))
    centres = torch.stack([images[labels == k].float().mean(0) for k in range(3)])
    nearest = (images[:, None].float() - centres).flatten(2).norm(dim=2).argmin(1)
    assert (nearest == labels).float().mean() > 0.8     # images and labels belong together


def test_from_memory_and_from_files_come_the_same_images(datasets, tmp_path, monkeypatch):
    folder = make(tmp_path, "RGB", cat=20, dog=20)
    whole = datasets.load_data(folder, image_size=5)
    monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    later = datasets.load_data(folder, image_size=5)
    for a, b in zip((whole.train, whole.val, whole.test), (later.train, later.val, later.test),
                    strict=True):
        index = torch.randperm(len(a))
        (x, labels), (y, others) = next(a.batches([index])), next(b.batches([index]))
        assert torch.equal(x, y) and torch.equal(labels, others)
    assert (whole.mean, whole.std) == (later.mean, later.std)


def test_classes_of_unlike_size_are_noted(load, tmp_path):
    """From less than a tenth of the largest one's training images on."""
    others = dict(val__a=1, val__b=1, test__a=1, test__b=1)
    assert load(make(tmp_path / "tenth", train__a=2, train__b=20, **others)).notes == []
    assert load(make(tmp_path / "less", train__a=2, train__b=21, **others)).notes == [
        "classes are of unlike size: 2 images of a to train on, 21 of b; see class_weights"]


def formats():
    """The formats that Pillow both writes and reads here, by writing and reading one image."""
    Image.init()
    found = []
    for name in sorted(set(Image.SAVE) & set(Image.OPEN)):
        file = io.BytesIO()
        with contextlib.suppress(Exception):
            Image.new("RGB", (32, 32), (110, 90, 70)).save(file, name)
            Image.open(io.BytesIO(file.getvalue())).load()
            found.append((name, file.getvalue()))
    return found


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
@pytest.mark.parametrize("ending", ["", ".jfif", ".DAT", ".txt", ".png"])
def test_any_format_is_read_whatever_its_ending(datasets, tmp_path, ending):
    known = formats()
    assert len(known) > 15
    folder = make(tmp_path, "RGB", cat=9, dog=9)
    for name, content in known:
        (folder / "dog" / f"{name}{ending}").write_bytes(content)
    data = datasets.load_data(folder, image_size=8)
    assert sum(sizes(data)) == 18 + len(known) and data.notes == []


def enormous(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        Image.new("1", (20_000, 10_000)).save(path)


def long_text(path):
    information = PngImagePlugin.PngInfo()
    information.add_text("x", "a" * 5_000_000, zip=True)
    Image.new("L", (16, 16)).save(path, pnginfo=information)


def cut_off(path, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, (40, 40, 3), np.uint8)).save(file, kind)
    path.write_bytes(file.getvalue()[:len(file.getvalue()) // 2])


UNREADABLE = {
    "no bytes": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"\xff"),
    "text": lambda path: path.write_text("hello"),
    "a pointer of git-lfs": lambda path: path.write_text("version https://git-lfs.github.com/spec"),
    "a PNG cut off": cut_off,
    "a JPEG cut off": lambda path: cut_off(path, "JPEG"),
    "a TIFF cut off": lambda path: cut_off(path, "TIFF"),
    "a GIF cut off": lambda path: cut_off(path, "GIF"),
    "HDF5, known by name only": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)),
    "200 million pixels": enormous,
    "a text in it that is too long": long_text,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", ["cat/0000.png", "dog/9.png"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_costs_one_file_only(load, memory, tmp_path, mode, name, kind):
    folder = make(tmp_path, mode, cat=9, dog=9)
    (folder / name).unlink(missing_ok=True)
    UNREADABLE[kind](folder / name)
    data = load(folder)
    assert sum(sizes(data)) == (18 if name == "dog/9.png" else 17)
    assert data.train.images[0].shape[0] == (1 if mode == "L" else 3)
    assert data.notes == [f"train: 1 file skipped as no readable image, the first: {name}"]


def test_deep_images_of_different_ranges_are_named_as_text(load, tmp_path):
    folder = make(tmp_path, cat=9, dog=9)
    for name, brightest in ((b"dim\xff.png", 4000), (b"bright\n.png", 40000)):
        image = np.full((8, 8), brightest, np.uint16)
        Image.fromarray(image).save(folder / "cat" / os.fsdecode(name))
    [note] = load(folder, check=False).notes
    assert "cat/dim\ufffd.png as 0 to 4095, cat/bright\ufffd.png as 0 to 65535" in note
    assert note.isprintable()


@pytest.mark.parametrize("damage", ["IDAT", "checksum", "a later chunk"])
def test_a_file_damaged_in_the_middle_is_skipped_unless_there_are_many(load, datasets, tmp_path,
                                                                      damage, monkeypatch):
    folder = make(tmp_path, cat=9, dog=9)
    file = io.BytesIO()
    side = 300 if damage == "a later chunk" else 40
    Image.fromarray(RANDOM.integers(0, 255, (side, side), np.uint8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    start = content.index(b"IDAT") + (4 if damage == "IDAT" else 900)
    if damage == "a later chunk":
        start = content.rindex(b"IDAT") - 4
    content[start:start + 8] = bytes(8)
    (folder / "dog" / "9.png").write_bytes(content)
    for in_memory in (datasets.IN_MEMORY, 0):
        monkeypatch.setattr(datasets, "IN_MEMORY", in_memory)
        assert load(folder).notes[0].endswith("no readable image, the first: dog/9.png")


def test_a_class_of_which_nothing_can_be_read_is_an_error(load, tmp_path):
    folder = make(tmp_path, cat=9, dog=2)
    for path in folder.glob("dog/*"):
        cut_off(path)
    with pytest.raises(ValueError, match="'dog': no image of its class.* first is .*dog/0000.png"):
        load(folder)


@contextlib.contextmanager
def as_nobody():
    """Without root's right to open everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_and_folders_that_may_not_be_opened_are_counted(load):
    with tempfile.TemporaryDirectory() as place:            # pytest's own folders are root's alone
        folder = make(place, cat=9, dog=9, dog__secret=5)
        for path in (folder / "cat", folder / "dog", folder):
            path.chmod(0o755)
        (folder / "cat" / "0003.png").chmod(0)
        (folder / "dog" / "secret").chmod(0)
        try:
            with as_nobody():
                data = load(folder, check=False)
            assert sum(sizes(data)) == 17
            assert data.notes == ["1 folder skipped that may not be opened, the first: dog/secret",
                                  "train: 1 file skipped as no readable image, the first: "
                                  "cat/0003.png"]
            (folder / "cat").chmod(0)
            with as_nobody(), pytest.raises(ValueError, match="cat hold no images; .*first: cat"):
                load(folder)
            folder.chmod(0)
            with as_nobody(), pytest.raises(PermissionError, match=str(folder)):
                load(folder)
        finally:
            for path in (folder, folder / "cat", folder / "dog" / "secret"):
                path.chmod(0o755)


def test_hidden_files_and_folders_are_left_out_and_counted(load, tmp_path):
    folder = make(tmp_path / ".cache" / "d", cat=9, dog=9)      # hidden above the folder: all right
    copy = (folder / "cat" / "0000.png").read_bytes()
    hidden = ["__MACOSX/cat/._0000.png", "cat/.ipynb_checkpoints/0000-checkpoint.png",
              "cat/Thumbs.db", "dog/.a/b/c.png", "dog/._0000.png", "dog/@eaDir/x.png",
              "dog/desktop.ini", ".DS_Store", ".git/objects/x"]
    for name in hidden:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(copy)
    (folder / "dog" / ".empty").mkdir()
    data = load(folder)
    assert sum(sizes(data)) == 18 and data.classes == ["cat", "dog"]
    assert data.notes == ["9 hidden files left out, the first: .DS_Store"]


def test_the_same_file_counts_once_under_its_own_name(load, tmp_path):
    folder = make(tmp_path, cat=9, dog=9)
    make(folder / "dog", cat=0, deep=3)                     # cat before it: deep has dog's value
    (folder / "dog" / "cat").rmdir()
    (folder / "cat" / "a-link.png").symlink_to("../dog/0000.png")
    (folder / "cat" / "all").symlink_to(folder)
    (folder / "cat" / "above").symlink_to(folder.parent)
    (folder / "dog" / "a").symlink_to("deep")
    os.link(folder / "dog" / "0001.png", folder / "dog" / "again.png")
    data = load(folder)
    assert sum(sizes(data)) == 9 + 9 + 3
    assert data.notes == ["5 links to what is there already, used once, the first: cat/a-link.png"]


def test_links_to_what_lies_elsewhere_are_followed(load, tmp_path):
    make(tmp_path / "disk", cat=9, dog=9)
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "cat").symlink_to(tmp_path / "disk" / "cat")
    (folder / "dog").mkdir()
    for path in (tmp_path / "disk" / "dog").iterdir():
        (folder / "dog" / path.name).symlink_to(path)
    data = load(folder)
    assert sum(sizes(data)) == 18 and data.notes == []
    (folder / "dogs").symlink_to(folder / "dog")            # a class twice
    data = load(folder)
    assert data.classes == ["cat", "dog"] and sum(sizes(data)) == 18
    assert data.notes == ["1 link to what is there already, used once, the first: dogs"]


def test_a_part_that_is_a_link_to_another_is_not_used_twice(load, tmp_path):
    folder = make(tmp_path, train__cat=9, train__dog=9)
    (folder / "val").symlink_to("train")
    data = load(folder)
    assert sum(sizes(data)) == 18
    assert data.notes == ["1 link to what is there already, used once, the first: val"]


def test_pipes_are_not_waited_for(load, tmp_path):
    folder = make(tmp_path, cat=9, dog=9)
    os.mkfifo(folder / "cat" / "pipe.png")
    assert load(folder).notes == ["1 pipe or device skipped, the first: cat/pipe.png"]


def test_names_that_are_no_text_can_be_printed(load, tmp_path):
    folder = make(tmp_path, cat=9, dog=9)
    Path(os.fsdecode(os.fsencode(folder / "cat") + b"/caf\xe9\n.png")).write_bytes(b"")
    (folder / "dog").rename(os.fsdecode(os.fsencode(folder) + b"/h\xfcnd"))
    data = load(folder)
    assert data.classes == ["cat", "h\N{REPLACEMENT CHARACTER}nd"] and len(data.notes) == 1
    assert data.notes[0].endswith("the first: cat/caf\ufffd\ufffd.png")
    "\n".join([*data.notes, *data.classes]).encode()        # as print does


def test_a_colour_image_in_a_grey_folder_is_counted_and_text_between_does_not_fool(load, tmp_path):
    folder = make(tmp_path / "a", cat=90, dog=120)
    Image.new("RGB", (8, 8), (11, 11, 11)).save(folder / "dog" / "0117.png")
    data = load(folder)
    assert data.train.images.shape[1] == 1
    assert data.notes == ["train: 1 image in colour read as grey, the first: dog/0117.png"]
    folder = make(tmp_path / "b", "RGB", cat=200, dog=200)
    for path in [*folder.rglob("*.png")]:
        path.with_suffix(".json").write_text("{}")          # before each image, in order
    data = load(folder)
    assert data.train.images.shape[1] == 3 and "400 files skipped" in data.notes[0]


def test_colour_is_dropped_with_a_note_only(load, datasets, tmp_path, monkeypatch):
    folder = make(tmp_path, "RGB", train__cat=9, train__dog=9, test__cat=2, test__dog=2)
    assert load(folder, channels=1).notes == [
        "train: 18 images in colour read as grey, the first: train/cat/0000.png",
        "test: 4 images in colour read as grey, the first: test/cat/0000.png"]
    assert load(folder, channels=3).notes == load(folder).notes == []
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    part = images, torch.arange(40) % 2
    monkeypatch.setattr(datasets, "load_named", lambda name: (part, part, ["a", "b"]))
    assert datasets.load_data("cifar10", channels=1).notes == ["cifar10: images in colour read as "
                                                              "grey"]


# ---- parts and classes

COUNTS = {"train": 10, "val": 7, "test": 5}


@pytest.mark.parametrize("names", [
    ("train", "val", "test"), ("train", "valid", "test"), ("train", "validation", "test"),
    ("Train", "Val", "Test"), ("Training", "Validation", "Testing"), ("TRAIN", "dev", "TEST"),
    ("training_set", "val-set", "test set"), ("train2017", "val2017", "test2017"),
    ("trainset", "VALID", "test_data")])
def test_the_usual_names_of_parts_are_understood(load, tmp_path, names):
    folders = {f"{name}__{label}": COUNTS[part] for part, name in zip(COUNTS, names, strict=True)
               for label in ("cat", "dog")}
    data = load(make(tmp_path, **folders))
    assert sizes(data) == (20, 14, 10) and data.classes == ["cat", "dog"] and data.notes == []


def test_a_part_that_is_missing_is_drawn_from_train(load, tmp_path):
    folder = make(tmp_path / "a", train__cat=20, train__dog=20, dev__cat=3, dev__dog=3)
    assert sizes(load(folder)) == (36, 6, 4)
    folder = make(tmp_path / "b", train__cat=20, train__dog=20, Test__cat=3, Test__dog=3)
    assert sizes(load(folder)) == (36, 4, 6)


@pytest.mark.parametrize("counts, said", [
    ({"train__a": 5, "train__b": 5, "val__a": 5, "val__b": 5, "valid__a": 5, "valid__b": 5},
     "val/ and valid/ in .* mean the same part"),
    ({"Train__a": 5, "Train__b": 5, "train__a": 5, "train__b": 5},
     "Train/ and train/ .* mean the same"),
    ({"test__a": 3, "test__b": 3}, "has test but no train/; put the training images in"),
    ({"train": 9, "test": 9}, "has test, train without a folder for each class inside"),
    ({"train__a": 9, "train__b": 9, "test__a": 3, "test__c": 3},
     r"classes in test/ differ from those in train/: \['b', 'c'\]"),
    ({"Train__a": 9, "Train__b": 9, "dev__a": 3}, r"classes in dev/ differ .* \['b'\]"),
    ({"train__Cat": 9, "train__dog": 9, "val__cat": 3, "val__dog": 3}, r"\['Cat', 'cat'\]"),
    ({"train__a": 9, "train__b": 9, "val__a": 3, "val__b": 0}, "val .* of which b hold no images"),
    ({"train__a": 9, "bus": 9}, "has 1 folders; 9 files unused, .*in train, the first: bus/0000"),
    ({"only": 9}, "at least 2 classes; it has 1 folders"),
    ({"pets__cat": 9, "pets__dog": 9}, "it has 1 folders; did you mean pets/ in it"),
    ({}, "it has 0 folders"),
    ({"cat": 9, "dog": 0}, "of which dog hold no images")])
def test_what_cannot_be_parts_and_classes_is_one_clear_error(load, tmp_path, counts, said):
    with pytest.raises(ValueError, match=said):
        load(make(tmp_path, **counts))


@pytest.mark.parametrize("counts, classes", [
    ({"bus": 9, "car": 9, "train": 9}, ["bus", "car", "train"]),
    ({"bus": 9, "test": 9, "train": 9}, ["bus", "test", "train"]),
    ({"cat": 9, "dog": 9, "test": 9}, ["cat", "dog", "test"]),
    ({"seg_train__a": 5, "seg_test__a": 5}, ["seg_test", "seg_train"]),
    ({"fold1__a": 5, "fold1__b": 5, "fold2__a": 5, "fold2__b": 5}, ["fold1", "fold2"])])
def test_classes_that_could_be_parts_are_said_to_be_classes(load, tmp_path, counts, classes):
    data = load(make(tmp_path, **counts), check=False)
    assert data.classes == classes and "read as classes" in data.notes[0]
    assert sum(sizes(data)) == sum(counts.values())


def test_unlabelled_and_stray_files_are_counted(load, tmp_path):
    folder = make(tmp_path, train__cat=20, train__dog=20, test=12, extra__cat=3)
    (folder / "labels.csv").write_text("a,b")
    (folder / "val").mkdir()
    Image.new("L", (8, 8)).save(folder / "train" / "stray.png")
    data = load(folder)
    assert sizes(data) == (32, 4, 4)
    assert data.notes == [
        "test/ unused, it has no folders of classes: 12 unlabelled files, the first: "
        "test/0000.png",
        "val/ unused, it is empty",
        "5 files unused, outside the folders of classes in train, the first: extra/cat/0000.png"]


# ---- nothing is lost or doubled, whatever lies there

LAYOUTS = {"classes": ["a", "b", "a/deep", "a/.hidden", "."],
           "parts": ["train/a", "train/b", "Test/a", "Test/b", "train", "train/a/.x"],
           "kaggle": ["train/a", "train/b", "test", "extra", "__MACOSX/train/a"],
           "doubtful": ["a", "b", "train/a", "test/b", "."]}
COUNTED = re.compile(r"(\d+) (?:hidden|unlabelled)? ?(?:file|link|pipe)")


@st.composite
def folders(draw):
    """(folder, ending, kind) of each file: four good images per class or none, and others."""
    layout = LAYOUTS[draw(st.sampled_from([*LAYOUTS]))]
    kind = st.sampled_from(["L", "RGB", "RGBA", "P", "1", "broken", "empty", "link"])
    ending = st.sampled_from([".png", ".jpg", ".gif", ".txt", ""])
    odd = draw(st.lists(st.tuples(st.sampled_from(layout), ending, kind), max_size=12))
    good = draw(st.sampled_from([4, 4, 4, 0]))
    return good * [(folder, ".png", "L") for folder in layout] + odd


def write(path, kind, number, first):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        path.symlink_to(first)
    elif kind in ("broken", "empty"):
        path.write_bytes(b"" if kind == "empty" else b"\x89PNG and no more")
    else:
        image = Image.fromarray(np.full((5 + number % 3, 6, 3), number * 8 % 256, np.uint8))
        image.convert(kind).save(path, {"P": "GIF"}.get(kind, "PNG"))


def test_every_file_of_any_folder_is_used_once_or_counted(datasets):
    outcomes = Counter()

    @given(folders(), st.sampled_from([None, 1, 3]))
    @hypothesis_settings(max_examples=100)
    def check(files, channels):
        with tempfile.TemporaryDirectory() as place:
            paths = [Path(place, "d", folder, f"{number}{ending}")
                     for number, (folder, ending, _) in enumerate(files)]
            for number, (path, (_, _, kind)) in enumerate(zip(paths, files, strict=True)):
                write(path, kind, number, paths[0])
            try:
                data = datasets.load_data(Path(place, "d"), 4, channels=channels)
            except (ValueError, FileNotFoundError) as error:
                outcomes["refused"] += 1
                event(re.sub(r"/\S*|\d+|'\w+'", "…", str(error))[:70])
                assert place in str(error) or re.search("class '|classes in ", str(error))
                return
        outcomes["accepted"] += 1
        counted = sum(int(number) for text in data.notes for number in COUNTED.findall(text))
        assert sum(sizes(data)) + counted == len(files), data.notes
        for split in (data.train, data.val, data.test):
            images, labels = next(split.batches([torch.arange(len(split))]))
            assert images.shape[1] in ([channels] if channels else [1, 3])
            assert images.shape[2:] == (4, 4) and data.normalise(images).isfinite().all()
            assert labels.unique().tolist() == list(range(len(data.classes)))

    check()
    assert outcomes["accepted"] > outcomes.total() / 3, outcomes


# ---- odd images

def jpeg(mode):
    def save(path):
        image = Image.fromarray(RANDOM.integers(0, 255, (20, 30, 3), np.uint8))
        image.convert(mode).save(path, "JPEG")
    return save


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6                            # turn by 90 degrees to see it upright
    white_below = np.zeros((30, 30), np.uint8)
    white_below[20:] = 255
    Image.fromarray(white_below).save(path, "JPEG", exif=exif)


def animated(path):
    frames = [Image.new("L", (9, 9), value) for value in (200, 10)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def palette(path):
    image = Image.fromarray(RANDOM.integers(0, 255, (9, 9, 3), np.uint8))
    image.quantize(8).save(path, "PNG")


READ = {"CMYK": jpeg("CMYK"), "grey JPEG": jpeg("L"), "turned by EXIF": turned,
        "animated": animated, "palette": palette,
        "16 bits": lambda path: Image.fromarray(
            RANDOM.integers(0, 65535, (9, 9), np.uint16)).save(path),
        "transparent": lambda path: Image.new("RGBA", (9, 9), (9, 9, 9, 0)).save(path),
        "one bit": lambda path: Image.new("1", (9, 9)).save(path)}


@pytest.mark.parametrize("kind", READ)
def test_odd_images_are_read(datasets, memory, kind, tmp_path):
    folder = make(tmp_path, "RGB", cat=9, dog=9)
    READ[kind](folder / "dog" / "odd.png")
    data = datasets.load_data(folder, image_size=8)
    assert sum(sizes(data)) == 19 and data.notes == []


def test_what_is_damaged_in_the_middle_is_an_error_and_no_black_image(tmp_path):
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, (40, 40), np.uint8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[900:908] = bytes(8)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png cannot be read as an image: broken data stream"):
        vit_helpers.read_image(tmp_path / "a.png", 1, 8)


def test_an_exif_rotation_is_obeyed_and_transparency_is_white(tmp_path):
    turned(tmp_path / "a.jpg")
    READ["transparent"](tmp_path / "b.png")
    upright = vit_helpers.read_image(tmp_path / "a.jpg", 1, 30)[0].float()
    assert upright[:, :8].mean() > 240          # the white rows at the bottom are on the left
    assert upright[:, 12:].mean() < 15
    assert (vit_helpers.read_image(tmp_path / "b.png", 3, 9) == 255).all()
