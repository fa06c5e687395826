"""Data, the training loop, checkpoints and run folders, through the helper's public functions."""
import contextlib
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import vit_helpers
from jobs import small_config
from PIL import Image

TIMINGS = {"seconds", "time", "images_per_second"}


def untimed(history):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in history]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---- notebooks as modules

def test_load_notebook_in_a_fresh_process_names_the_cell_of_an_error():
    code = """
import pickle, traceback, vit_helpers
models = vit_helpers.load_notebook("01_models")
assert models is vit_helpers.load_notebook("01_models")
assert pickle.loads(pickle.dumps(models.TowerViT(dim=32, depth=1))).pool == "cls"
try:
    models.ViT(pool="x")
except ValueError:
    traceback.print_exc()       # with the source lines, as IPython and pytest show them
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=vit_helpers.ROOT, capture_output=True, text=True).stderr
    assert "01_models.ipynb, cell " in shown and "check_model_settings(image_size" in shown
    assert shown.splitlines()[-1].startswith("ValueError: pool is 'x'")


# ---- data

def test_a_notebook_that_is_just_being_saved_is_read_when_it_is_whole(tmp_path):
    whole = (vit_helpers.NOTEBOOKS / "01_models.ipynb").read_text()
    path = tmp_path / "a.ipynb"
    path.write_text(whole[:1000])
    threading.Timer(0.3, path.write_text, [whole]).start()
    assert vit_helpers.notebook_cells(path) == json.loads(whole)["cells"]
    path.write_text(whole[:1000])
    with pytest.raises(ValueError):
        vit_helpers.notebook_cells(path)


def test_splits_are_apart_seeded_and_stratified(digits):
    again, other = vit_helpers.load_data("digits"), vit_helpers.load_data("digits", seed=1)
    assert torch.equal(digits.val.pictures, again.val.pictures) and not torch.equal(digits.val.pictures, other.val.pictures)
    assert torch.equal(digits.test.pictures, other.test.pictures)
    rows = [{picture.numpy().tobytes() for picture in split.pictures} for split in (digits.train, digits.val, digits.test)]
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert torch.bincount(digits.val.labels).min() >= 13


@pytest.mark.parametrize("kinds", ["crop,flip", "crop,flip,trivial,erase"])
def test_augmentation_draws_for_each_picture_and_alike_on_any_number_of_ranks(kinds):
    augment = vit_helpers.load_notebook("03_augmentation").augment
    pictures = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(32, 3, 1, 1) + 1
    whole = augment(pictures, kinds, vit_helpers.generator(0, 1, 2))
    assert len({picture.numpy().tobytes() for picture in whole}) > 12         # 9 shifts, each also mirrored
    for world in (2, 3):
        for rank in range(world):
            share = slice(rank, 32, world)
            assert torch.equal(augment(pictures[share], kinds, vit_helpers.generator(0, 1, 2), share), whole[share])
    assert torch.equal(augment(pictures, "none", vit_helpers.generator(0)), pictures)


def test_mixed_pictures_and_their_targets_go_together_on_any_number_of_ranks():
    mix = vit_helpers.load_notebook("03_augmentation").mix
    labels = torch.arange(64) % 7
    images = labels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).double()            # the mean of a mixed picture says what it is made of
    mixed, targets = mix(images, labels, 7, 0.8, vit_helpers.generator(0))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(7.0, dtype=torch.double))
    assert 0.6 < (targets.max(1).values < 1).double().mean() < 0.95
    both = (mixed.amax((1, 2, 3)) - mixed.amin((1, 2, 3)) > 0).sum()          # CutMix leaves two values, MixUp one
    assert 10 < both < 40
    for rank in (0, 1):
        share = slice(rank, 64, 2)
        for whole, part in zip((mixed, targets), mix(images[share], labels[share], 7, 0.8, vit_helpers.generator(0), share)):
            torch.testing.assert_close(part, whole[share])


def test_named_pictures_are_brought_to_the_size_and_channels_asked_for(digits):
    data = vit_helpers.load_data("digits", image_size=16, channels=3)
    assert data.train.pictures.shape[1:] == (3, 8, 8)                       # kept small, enlarged batch by batch
    images = data.normalise(data.test.pictures)
    assert images.shape == (359, 3, 16, 16) and torch.equal(images[:, 0], images[:, 2])
    small = torch.nn.functional.avg_pool2d(images[:, :1], 2)
    assert torch.corrcoef(torch.stack([small.flatten(), digits.normalise(digits.test.pictures).flatten()]))[0, 1] > 0.95


@pytest.fixture
def folder(tmp_path, digits):
    """A folder of digits 0, 1 and 2 as images of several modes and sizes, with things in it that are none."""
    for i in range(90):
        label, picture = i % 3, digits.train.pictures[digits.train.labels == i % 3][i // 3][0].numpy()
        path = tmp_path / "pictures" / f"digit {label}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture).resize((8 + i % 5, 9))
        image.convert(["L", "RGB", "P", "RGBA", "1"][i % 5]).save(path)
    (path.parent / "notes.txt").write_text("no image")
    (path.parent / "broken.png").write_bytes(b"\x89PNG broken")
    return tmp_path / "pictures"


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_of_images(folder, monkeypatch, in_memory, settings, train):
    if not in_memory:
        monkeypatch.setattr(vit_helpers, "IN_MEMORY", 0)
        (folder / "digit 2" / "broken.png").unlink()
    data = vit_helpers.load_data(str(folder), image_size=8, val_fraction=0.2, channels=1)
    assert data.classes == ["digit 0", "digit 1", "digit 2"] and len(data.train) + len(data.val) + len(data.test) == 90
    assert isinstance(data.train.pictures, torch.Tensor) == in_memory
    assert f"{2 if in_memory else 1} files passed over" in data.notes[0] and "digit 2" in data.notes[0]
    _, history = train({**settings(epochs=12, batch_size=8, workers=0), "num_classes": 3}, data=data)
    assert history[-1]["train_accuracy"] > 0.6


def test_train_val_and_test_folders(folder, tmp_path):
    for part in ("train", "val", "test"):
        for label in ("digit 0", "digit 1"):
            (tmp_path / "parts" / part / label).mkdir(parents=True)
            for number, image in enumerate(sorted((folder / label).glob("*.png"))[:4]):
                (tmp_path / "parts" / part / label / f"{number}.png").write_bytes(image.read_bytes())
    data = vit_helpers.load_data(str(tmp_path / "parts"), image_size=8)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 8, 8)
    (tmp_path / "parts" / "test" / "digit 1").rename(tmp_path / "parts" / "test" / "seven")
    with pytest.raises(ValueError, match=r"classes in test/ differ.*'digit 1', 'seven'"):
        vit_helpers.load_data(str(tmp_path / "parts"), image_size=8)


# ---- training

@pytest.mark.parametrize("recipe", ["sgd", "modern"])
def test_resumed_training_equals_uninterrupted(tmp_path, monkeypatch, settings, train, recipe):
    config = settings(recipe=recipe, augment="+erase", dropout=0.1, drop_path=0.1, epochs=4)
    reference, history = train(config, tmp_path / "one")
    job = tmp_path / "job"
    job.mkdir()
    monkeypatch.setenv("VIT_JOB", str(job))
    real, calls = vit_helpers.stop_if_asked, []

    def stop_twice(*arguments):
        calls.append(1)
        if len(calls) in (50, 130):                 # in the middle of the second epoch and of the fourth
            (job / "stop").touch()
        real(*arguments)

    monkeypatch.setattr(vit_helpers, "stop_if_asked", stop_twice)
    for expected in ("epoch 2 after step 10", "epoch 4 after step 10"):
        with pytest.raises(vit_helpers.Stopped, match=expected):
            train(config, tmp_path / "two")
        assert (job / "saved").exists()
        (job / "stop").unlink()
    resumed, second = train(config, tmp_path / "two")
    assert untimed(second) == untimed(history) and same_weights(resumed, reference)
    best = [vit_helpers.load_checkpoint(tmp_path / name / "best.pt") for name in ("one", "two")]
    assert best[0]["epoch"] == best[1]["epoch"] and best[0]["model"].keys() == best[1]["model"].keys()
    assert all(torch.equal(best[0]["model"][name], best[1]["model"][name]) for name in best[0]["model"])


@pytest.mark.parametrize("recipe", ["sgd", "adamw", "modern"])
def test_same_seed_same_curve(recipe, settings, train):
    config = settings(recipe=recipe, epochs=1)
    assert untimed(train(config)[1]) == untimed(train(config)[1]) != untimed(train(settings(recipe=recipe, epochs=1, seed=1))[1])


def test_accumulated_gradients_give_the_same_step(settings, train):
    config = settings(epochs=1)
    whole, parts = train(config)[1][0], train({**config, "micro_batch_size": 5})[1][0]
    assert whole["train_loss"] == pytest.approx(parts["train_loss"], rel=1e-5)
    assert whole["val_loss"] == pytest.approx(parts["val_loss"], rel=1e-4)


def test_best_checkpoint_is_the_lowest_validation_loss(tmp_path, digits, settings, train):
    config = settings(epochs=6, learning_rate=0.3)
    _, history = train(config, tmp_path)
    best = vit_helpers.load_checkpoint(tmp_path / "best.pt")
    losses = [row["val_loss"] for row in history]
    assert best["epoch"] == 1 + losses.index(min(losses))
    model = vit_helpers.build_model(config)
    model.load_state_dict(best["model"])
    assert vit_helpers.evaluate(model, digits, digits.val, config)["loss"] == pytest.approx(min(losses), abs=1e-6)


def test_what_is_not_decayed(models):
    model = models.ViT(8, 2, 1, 10, dims=(16, 32), head_dim=8)
    groups = vit_helpers.make_optimizer(model, dict(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.1)).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {name for name, _ in model.named_parameters()
                     if name.endswith("weight") and "norm" not in name} and sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_learning_rate_warms_up_and_decays():
    rates = [vit_helpers.learning_rate_at(epoch, dict(learning_rate=2.0, warmup_epochs=2), 10) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])


def test_damaged_checkpoints(tmp_path, capsys, settings, train):
    config = settings(epochs=2)
    reference, _ = train(config, tmp_path)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:1000])
    resumed, history = train(config, tmp_path)
    shown = capsys.readouterr().out
    assert f"warning: {tmp_path / 'last.pt'} is damaged" in shown and "going on from previous.pt" in shown
    assert len(history) == 2 and same_weights(resumed, reference)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="No earlier checkpoint is readable"):
        train(config, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", disk])


def test_a_full_disk_costs_no_checkpoint_and_with_room_again_the_run_goes_on(small_disk, tmp_path, settings, train):
    config, filler = settings(epochs=4), small_disk / "filler"

    def fill(history, epochs):
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while len(history) == 2:
                file.write(bytes(4096))

    with pytest.raises(OSError, match=f"could not write {small_disk}/.*No space left on device. What was there before is whole"):
        train(config, small_disk, on_epoch=fill)
    assert vit_helpers.load_checkpoint(small_disk / "last.pt")["epoch"] == 2
    assert {path.name for path in small_disk.iterdir()} == {"best.pt", "last.pt", "previous.pt", "filler"}
    filler.unlink()
    model, history = train(config, small_disk)
    reference, undisturbed = train(config, tmp_path / "reference")
    assert untimed(history) == untimed(undisturbed) and same_weights(model, reference)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, settings, train):
    with pytest.raises(FloatingPointError, match="training loss is .* in epoch 1, step .* at learning rate"):
        train(settings(learning_rate=1e30, clip=0.0, warmup_epochs=0.0), tmp_path)
    assert not (tmp_path / "last.pt").exists()


def test_a_run_is_locked_while_it_is_trained(tmp_path):
    lock_run = vit_helpers.load_notebook("06_run").lock_run
    code = f"import sys; sys.path.insert(0, {str(vit_helpers.ROOT)!r}); import pathlib, vit_helpers; vit_helpers.load_notebook('06_run').lock_run(pathlib.Path({str(tmp_path)!r})); print('locked', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RuntimeError, match="is being trained by another process"):
        lock_run(tmp_path)
    holder.kill()                                                       # a dead process blocks nobody
    holder.wait()
    lock_run(tmp_path)


# ---- parameters

@pytest.mark.parametrize("value, default, result", [(7, "", "7"), ("true", False, True), (2e5, 0, 200000), (1, 0.0, 1.0)])
def test_what_papermill_makes_of_a_value_is_put_right(value, default, result):
    got = vit_helpers.as_type("x", value, default)
    assert got == result and type(got) is type(result)


@pytest.mark.parametrize("value, default", [("two", 1), (1.5, 1), ("maybe", False), ([1], "")])
def test_values_of_the_wrong_type(value, default):
    with pytest.raises(ValueError, match="parameter 'x' is"):
        vit_helpers.as_type("x", value, default)


def test_contestants_have_the_widths_that_they_promise(settings):
    made = {name: settings(model=name, dims="", head_dim=0)["model_settings"] for name in vit_helpers.CONTESTANTS}
    dims = made["vit"]["dims"]
    assert made["towervit"]["dim"] == dims[0] and made["towervit-wide"]["dim"] == dims[-1]
    counts = {name: vit_helpers.count_parameters(vit_helpers.build_model(settings(model=name, dims="", head_dim=0))) for name in made}
    assert abs(counts["towervit-matched"] / counts["vit"] - 1) < 0.02


# ---- pictures of one's own

@pytest.fixture(scope="module")
def trained():
    """A model from `load_model`'s kind of checkpoint, trained for a moment."""
    config = {**small_config(), "mean": [0.3], "std": [0.4], "classes": [f"digit {i}" for i in range(10)]}
    folder = vit_helpers.SAVED_MODELS / "for-predict"
    folder.mkdir(parents=True, exist_ok=True)
    vit_helpers.save(folder / "best.pt", {"model": vit_helpers.build_model(config).half().state_dict(), "config": config, "epoch": 1})
    return "for-predict"


@pytest.mark.parametrize("name, change, options", [
    ("a.png", lambda image: image, {}), ("a.jpg", lambda image: image.convert("RGB"), {"quality": 95}), ("cmyk.jpg", lambda image: image.convert("CMYK"), {"quality": 95}),
    ("16-bit.png", lambda image: Image.fromarray(np.asarray(image).astype(np.uint16) * 257), {}), ("rgba.png", lambda image: image.convert("RGBA"), {}),
    ("palette.png", lambda image: image.convert("P"), {}), ("animated.gif", lambda image: image, {"save_all": True, "append_images": [Image.new("L", (8, 8))]}),
    ("rotated.jpg", lambda image: image.rotate(90), {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0", "quality": 95})])
def test_predict_reads_pictures_of_any_kind(name, change, options, tmp_path, digits):
    image = Image.fromarray(digits.test.pictures[2][0].numpy())
    change(image).save(tmp_path / name, **options)
    answer, expected = (vit_helpers.predict("published/digits-seed0-vit", source) for source in (tmp_path / name, image))
    print(f"{name}: {answer}")
    assert len(answer) == 3 and answer[0][0] == expected[0][0] == str(digits.test.labels[2].item()) and abs(answer[0][1] - expected[0][1]) < 0.1


def test_predict_takes_one_picture_or_many_of_any_type(trained, tmp_path, digits):
    picture = digits.test.pictures[0]
    array = picture[0].numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = vit_helpers.predict(trained, array)
    assert len(expected) == 3 and expected[0][0].startswith("digit ") and expected[0][1] >= expected[1][1]
    for same in (tmp_path / "a.png", Image.fromarray(array), picture):
        assert vit_helpers.predict(trained, same)[0] == expected[0]
    assert len(vit_helpers.predict(trained, [array, tmp_path / "a.png"])) == 2 == len(vit_helpers.predict(trained, picture[None].repeat(2, 1, 1, 1)))
    assert vit_helpers.predict(trained, []) == []


def test_load_model_names_near_runs(trained):
    with pytest.raises(FileNotFoundError, match="near it: for-predict"):
        vit_helpers.load_model("for-predct")


def test_foreign_and_half_written_run_folders_are_passed_over(capsys):
    for name, content in {"foreign": {"x.txt": "x"}, "half": {"config.json": json.dumps({"model": "vit"})}, "broken": {"config.json": "{"}}.items():
        for file, text in content.items():
            (vit_helpers.RUNS / "odd" / name).mkdir(parents=True, exist_ok=True)
            (vit_helpers.RUNS / "odd" / name / file).write_text(text)
    (vit_helpers.RUNS / "odd" / "empty").mkdir()
    assert [run for run in vit_helpers.read_runs() if "odd" in run["run"]] == []
    shown = capsys.readouterr().out
    assert all(f"passed over {name}" in shown for name in ("foreign", "half", "broken"))
