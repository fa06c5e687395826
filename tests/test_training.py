"""The training loop, its checkpoints and the run folders, through their public functions."""
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import vit_helpers
from jobs import TIMINGS, needs_compiler, small_config


def untimed(history):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in history]


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---- notebooks as modules

FRESH_PROCESS = """
import pickle, traceback, vit_helpers
models = vit_helpers.load_notebook("01_models")
assert models is vit_helpers.load_notebook("01_models")
assert pickle.loads(pickle.dumps(models.TowerViT(dim=32, depth=1))).pool == "cls"
try:
    models.ViT(pool="x")
except ValueError:
    traceback.print_exc()       # with the source lines, as IPython and pytest show them
"""


def test_load_notebook_in_a_fresh_process_names_the_cell_of_an_error():
    shown = subprocess.run([sys.executable, "-c", FRESH_PROCESS], cwd=vit_helpers.ROOT,
                           capture_output=True, text=True).stderr
    assert "01_models.ipynb, cell " in shown
    assert "check_model_settings(" in shown
    assert shown.splitlines()[-1].startswith("ValueError: pool is 'x'")


def test_a_notebook_that_is_just_being_saved_is_read_when_it_is_whole(tmp_path):
    whole = (vit_helpers.NOTEBOOKS / "01_models.ipynb").read_text()
    path = tmp_path / "a.ipynb"
    path.write_text(whole[:1000])
    threading.Timer(0.3, path.write_text, [whole]).start()
    assert vit_helpers.notebook_cells(path) == json.loads(whole)["cells"]
    path.write_text(whole[:1000])
    with pytest.raises(ValueError):
        vit_helpers.notebook_cells(path)


# ---- the loop

@pytest.mark.parametrize("recipe, precision", [("sgd", "fp32"), ("modern", "bf16"),
                                               ("muon", "fp32")])
def test_resumed_training_equals_uninterrupted(tmp_path, monkeypatch, settings, train, training,
                                               recipe, precision):
    config = settings(recipe=recipe, augment="+erase", dropout=0.1, drop_path=0.1, epochs=4)
    config["precision"] = precision
    reference, history = train(config, tmp_path / "one")
    job = tmp_path / "job"
    job.mkdir()
    monkeypatch.setenv("VIT_JOB", str(job))
    real, calls = training.stop_if_asked, []

    def stop_twice(*arguments):
        calls.append(1)
        if len(calls) in (50, 130):             # in the middle of the second epoch and the fourth
            (job / "stop").touch()
        real(*arguments)

    monkeypatch.setattr(training, "stop_if_asked", stop_twice)
    for expected in ("epoch 2 after step 10", "epoch 4 after step 10"):
        with pytest.raises(training.Stopped, match=expected):
            train(config, tmp_path / "two")
        assert (job / "saved").exists()
        (job / "stop").unlink()
    resumed, second = train(config, tmp_path / "two")
    assert untimed(second) == untimed(history)
    assert same_weights(resumed, reference)
    one, two = (vit_helpers.load_checkpoint(tmp_path / name / "best.pt") for name in ("one", "two"))
    assert one["epoch"] == two["epoch"]
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])


def test_a_kill_between_the_two_checkpoints_loses_no_best_model(tmp_path, monkeypatch, settings,
                                                                train, training):
    def killed(folder, state):
        raise KeyboardInterrupt

    config = settings(epochs=1, ema_decay=0.9)
    train(config, tmp_path / "one")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_best", killed)
        train(config, tmp_path / "two")
    assert not (tmp_path / "two" / "best.pt").exists()
    train(config, tmp_path / "two")
    one, two = (vit_helpers.load_checkpoint(tmp_path / name / "best.pt") for name in ("one", "two"))
    assert one["epoch"] == two["epoch"] == 1
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])


@pytest.mark.parametrize("recipe", ["sgd", "adamw", "modern", "muon"])
def test_same_seed_same_curve(recipe, settings, train):
    config = settings(recipe=recipe, epochs=1)
    first, again = untimed(train(config)[1]), untimed(train(config)[1])
    assert first == again
    assert first != untimed(train(settings(recipe=recipe, epochs=1, seed=1))[1])


def test_bf16_is_fp32_but_for_rounding(digits, settings, train, training):
    """One epoch in both, and one model that is asked in both."""
    configs = [settings(epochs=1, augment="none") | {"precision": precision}
               for precision in ("fp32", "bf16")]
    (one, [row]), (other, [other_row]) = map(train, configs)
    assert 0 < abs(other_row["train_loss"] / row["train_loss"] - 1) < 0.01
    exact, rounded = (training.predict_split(one, digits, digits.val, config)[0].float()
                      for config in configs)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()
    assert other.head.weight.dtype == torch.float32         # what is stored is not rounded


@needs_compiler
def test_a_compiled_training_is_the_same_but_for_rounding(tmp_path, settings, train):
    """It begins compiled and goes on uncompiled."""
    config = settings(dims="16", epochs=2)
    _, reference = train(config)
    with contextlib.suppress(KeyboardInterrupt):
        train(config | {"compile": True}, tmp_path, on_epoch=interrupted)
    _, history = train(config, tmp_path)
    assert [row["val_loss"] for row in history] == pytest.approx(
        [row["val_loss"] for row in reference], rel=1e-4)


def interrupted(history):
    raise KeyboardInterrupt


def test_accumulated_gradients_give_the_same_step(settings, train):
    config = settings(epochs=1)
    whole = train(config)[1][0]
    parts = train({**config, "micro_batch_size": 5})[1][0]
    assert whole["train_loss"] == pytest.approx(parts["train_loss"], rel=1e-5)
    assert whole["val_loss"] == pytest.approx(parts["val_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def uneven(digits, datasets):
    """Digits with all training images of a 0, and five of each other."""
    labels = digits.train.labels
    few = [torch.where(labels == label)[0][:5] for label in range(1, 10)]
    train = digits.train.subset(torch.cat([torch.where(labels == 0)[0], *few]))
    return datasets.Data(train, digits.val, digits.test, digits.classes)


def test_balanced_weights_are_those_of_scikit_learn(uneven, training):
    from sklearn.utils.class_weight import compute_class_weight
    labels = uneven.train.labels
    wanted = compute_class_weight("balanced", classes=np.arange(10), y=labels.numpy())
    weights = training.balanced_weights(labels, 10)
    assert weights.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
    assert weights[labels].mean().item() == pytest.approx(1) and weights[1] > 20 * weights[0]


@pytest.mark.parametrize("mix, smoothing, micro", [(0.0, 0.0, None), (0.0, 0.1, 5), (0.5, 0.1, 7)])
def test_the_weighted_loss_of_a_step_by_hand(uneven, training, settings, mix, smoothing, micro):
    """Hard labels as torch has it; smoothed and mixed targets by a weight of the whole image; the
    gradient is of the sum divided by the number of images, in however many micro-batches."""
    config = settings(mix=mix, label_smoothing=smoothing, class_weights="balanced", augment="none",
                      micro_batch_size=micro, batch_size=64)
    model = vit_helpers.build_model(config).double()
    state = training.start_training(model, uneven, config)
    images, labels = next(uneven.train.batches([torch.arange(len(uneven.train))[-64:]]))
    images, targets = training.prepare(images, labels, uneven, config,
                                       vit_helpers.generator("weighted"))
    images = images.double()
    loss, _, number = training.forward_and_backward(state, images, targets.double()
                                                    if mix else targets, labels).tolist()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    logits = model(images)
    asked = targets.double() if mix else torch.nn.functional.one_hot(labels, 10).double()
    soft = (1 - smoothing) * asked + smoothing / 10                             # (64, 10)
    losses = -(soft * logits.log_softmax(1)).sum(1)
    by_hand = (asked @ state.class_weights.double() * losses).sum()
    assert (loss, number) == (pytest.approx(by_hand.item()), 64)
    if not mix and not smoothing:
        by_torch = torch.nn.functional.cross_entropy(
            logits, labels, weight=state.class_weights.double(), reduction="sum")
        assert by_hand.item() == pytest.approx(by_torch.item())
    (by_hand / 64).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_class_weights_are_for_training_alone_and_locked(tmp_path, uneven, settings, train,
                                                         training):
    """The model no longer answers with the large class alone; validation counts each image once;
    a run that began without weights does not go on with them."""
    answers = {}
    for weights in (None, "balanced"):
        config = settings(class_weights=weights, epochs=4, learning_rate=0.02)
        model, history = train(config, tmp_path / str(weights), uneven)
        logits, labels = training.predict_split(model, uneven, uneven.val, config)
        assert history[-1]["val_loss"] == pytest.approx(
            torch.nn.functional.cross_entropy(logits.double(), labels).item())
        answers[weights] = (logits.argmax(1) == 0).double().mean().item()
    print("answered 0:", answers)
    assert answers["balanced"] < 0.5 and answers[None] > 0.9
    with pytest.raises(ValueError, match="class_weights was None and is now 'balanced'"):
        train(config, tmp_path / "None", uneven)


def test_best_checkpoint_is_the_lowest_validation_loss(tmp_path, digits, settings, train, training):
    config = settings(epochs=6, learning_rate=0.3)
    _, history = train(config, tmp_path)
    best = vit_helpers.load_checkpoint(tmp_path / "best.pt")
    losses = [row["val_loss"] for row in history]
    assert best["epoch"] == 1 + losses.index(min(losses))
    model = vit_helpers.build_model(config)
    model.load_state_dict(best["model"])
    again = training.evaluate(model, digits, digits.val, config)["loss"]
    assert again == pytest.approx(min(losses), abs=1e-6)


def test_what_is_not_decayed(models, training):
    model = models.ViT(8, 2, 1, 10, dims=(16, 32), head_dim=8)
    chosen = dict(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.1)
    groups = training.make_optimizer(model, chosen).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"]
               for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {name for name, _ in model.named_parameters()
                     if name.endswith("weight") and "norm" not in name}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_has_every_hidden_matrix_and_adamw_all_else(models, training):
    model = models.ViT(8, 2, 1, 10, dims=(16, 32), head_dim=8)
    muon, adamw = training.make_muon(model, 0.1, 0.95, 0.1, "fp32").optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[id(each)] for group in muon.param_groups for each in group["params"]}
    rest = {names[id(each)] for group in adamw.param_groups for each in group["params"]}
    weights = {name for name in names.values() if name.endswith("weight") and "norm" not in name}
    assert hidden == {name for name in weights if name.startswith("blocks")}
    assert hidden | rest == set(names.values()) and not hidden & rest


def test_an_orthogonal_step_keeps_the_singular_vectors(training):
    for shape in ((3, 48, 16), (2, 16, 48), (1, 32, 32)):
        matrices = torch.randn(shape, dtype=torch.float64)
        u, values, v = torch.linalg.svd(matrices, full_matrices=False)
        inside = u.mT @ training.newton_schulz(matrices) @ v.mT            # (K, r, r)
        diagonal = inside.diagonal(dim1=1, dim2=2)
        assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-9
        usual = values > 0.05 * values.max()            # the smallest need more steps than five
        assert diagonal[usual].min() > 0.6 and diagonal.max() < 1.25


def test_queries_keys_and_values_are_made_orthogonal_each_by_itself(training):
    together = torch.nn.Parameter(torch.randn(24, 8, dtype=torch.float64))
    apart = [torch.nn.Parameter(part.clone()) for part in together.detach().split(8)]
    together.grad = torch.randn_like(together)
    for part, gradient in zip(apart, together.grad.split(8), strict=True):
        part.grad = gradient.clone()
    training.Muon([{"params": [together], "pieces": 3}], lr=0.1).step()
    training.Muon(apart, lr=0.1).step()
    torch.testing.assert_close(together.detach(), torch.cat([part.detach() for part in apart]))


def test_muon_leaves_frozen_matrices_alone(models, training):
    model = models.ViT(8, 2, in_channels=1, dims=(16, 16), head_dim=16).requires_grad_(False)
    model.head.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = training.make_muon(model, 0.1, 0.95, 0.0, "fp32")
    model(torch.rand(4, 1, 8, 8)).logsumexp(1).sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_muons_steps_point_where_torchs_do(training):
    start, gradient = torch.randn(96, 48), torch.randn(96, 48)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    training.Muon([ours], lr=0.1, weight_decay=0.1).step()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    steps = [(matrix.detach() - start).flatten() for matrix in (ours, theirs)]
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.99
    assert steps[0].norm() == pytest.approx(steps[1].norm().item(), rel=0.02)


@pytest.mark.parametrize("schedule, expected", [("cosine", [0, 1, 2, 1, 0]),
                                                ("constant", [0, 1, 2, 2, 2])])
def test_learning_rate_over_epochs(training, schedule, expected):
    chosen = dict(learning_rate=2.0, warmup_epochs=2, epochs=10, schedule=schedule)
    rates = [training.learning_rate_at(epoch, chosen) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, settings, train):
    config = settings(learning_rate=1e30, grad_clip=0.0, warmup_epochs=0.0)
    with pytest.raises(FloatingPointError, match="training loss is .* in epoch 1, step .* at"):
        train(config, tmp_path)
    assert not (tmp_path / "last.pt").exists()


# ---- checkpoints

@pytest.mark.parametrize("left", [0, 1000])
def test_damaged_checkpoints(tmp_path, capsys, settings, train, left):
    config = settings(epochs=2)
    reference, _ = train(config, tmp_path)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:left])
    resumed, history = train(config, tmp_path)
    shown = capsys.readouterr().out
    assert f"warning: {tmp_path / 'last.pt'} is damaged" in shown
    assert "going on from previous.pt" in shown
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
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", disk])


def test_a_full_disk_costs_no_checkpoint_and_with_room_again_the_run_goes_on(
        small_disk, tmp_path, settings, train):
    config, filler = settings(epochs=4), small_disk / "filler"

    def fill(history):
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while len(history) == 2:
                file.write(bytes(4096))

    said = f"could not write {small_disk}/.*No space left on device. What was there before is whole"
    with pytest.raises(OSError, match=said):
        train(config, small_disk, on_epoch=fill)
    assert vit_helpers.load_checkpoint(small_disk / "last.pt")["epoch"] == 2
    there = {path.name for path in small_disk.iterdir()}
    assert there == {"best.pt", "last.pt", "previous.pt", "filler"}
    filler.unlink()
    model, history = train(config, small_disk)
    reference, undisturbed = train(config, tmp_path / "reference")
    assert untimed(history) == untimed(undisturbed)
    assert same_weights(model, reference)


@pytest.fixture
def changed_notebooks(tmp_path, monkeypatch):
    """Puts a text of 01_models into other words, in a copy of the notebooks that is then used."""
    copied = tmp_path / "notebooks"
    shutil.copytree(vit_helpers.NOTEBOOKS, copied)
    monkeypatch.setattr(vit_helpers, "NOTEBOOKS", copied)

    def change(before, after):
        path = copied / "01_models.ipynb"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    yield change
    monkeypatch.undo()
    for name in [name for name in sys.modules if name[:2].isdigit()]:
        vit_helpers.load_notebook(name)                 # as they were


def test_a_run_goes_on_with_code_that_does_the_same_and_not_with_other(
        tmp_path, settings, train, changed_notebooks):
    train(settings(epochs=1), tmp_path)
    last = vit_helpers.load_checkpoint(tmp_path / "last.pt")
    config = {**settings(epochs=1), "code_hash": vit_helpers.code_hash()}
    changed_notebooks("class DropPath(nn.Module):", "class Unrelated:\\n\",\n    \"    pass\\n\",\n"
                      "    \"\\n\",\n    \"class DropPath(nn.Module):")
    assert vit_helpers.code_hash() != config["code_hash"]
    _, history = train(config, tmp_path)                # another source, the same logits
    assert untimed(history) == untimed(last["history"])
    changed_notebooks("x = x + self.drop_path(self.mlp(self.norm2(x)))",
                      "x = x + 1.1 * self.drop_path(self.mlp(self.norm2(x)))")
    with pytest.raises(ValueError, match="other logits than when they were saved"):
        train(config, tmp_path)


def test_a_checkpoint_without_today_s_settings_and_names_goes_on(tmp_path, settings, train):
    """As an earlier version wrote it: old names, no settings that came later, no logits."""
    config = settings(epochs=2)
    _, history = train(config, tmp_path)
    content = vit_helpers.load_checkpoint(tmp_path / "last.pt")
    new_names = {new: old for old, new in vit_helpers.OLD_NAMES.items()}

    def as_before(mapping):
        left_out = set(vit_helpers.NEUTRAL)
        return {new_names.get(name, name): value for name, value in mapping.items()
                if name not in left_out}

    content["config"] = as_before(content["config"])
    content["config"]["model_settings"] = as_before(content["config"]["model_settings"])
    content["model"] = as_before(content["model"])
    assert "positions" in content["model"] and "clip" in content["config"]
    del content["probe"]
    vit_helpers.save(tmp_path / "last.pt", content)
    _, again = train(config, tmp_path)
    assert untimed(again) == untimed(history)


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path, settings, train):
    train(settings(epochs=1), tmp_path)
    with pytest.raises(ValueError, match="optimizer was 'sgd' and is now 'adamw'"):
        train(settings(epochs=1) | {"optimizer": "adamw"}, tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"optimizer": "muom"}, "optimizer is 'muom', did you mean 'muon'"),
    ({"class_weights": "equal"}, "class_weights is 'equal'. Allowed: balanced")])
def test_words_that_the_loop_does_not_know_are_refused(settings, train, changes, message):
    with pytest.raises(ValueError, match=message):
        train(settings(epochs=1) | changes)


def test_muon_needs_a_model_with_blocks(training):
    with pytest.raises(ValueError, match="matrices of a model's `blocks`, and this model has none"):
        training.make_muon(torch.nn.Linear(4, 4), 0.1, 0.95, 0.1, "fp32")


def test_without_a_folder_nothing_is_said_to_be_saved(tmp_path, monkeypatch, settings, train,
                                                      training):
    monkeypatch.setenv("VIT_JOB", str(tmp_path))
    (tmp_path / "stop").touch()
    with pytest.raises(training.Stopped, match="nothing was saved, since no folder was given"):
        train(settings(epochs=1))
    assert not (tmp_path / "saved").exists()


# ---- run folders

HOLDER = """
import sys, pathlib; sys.path.insert(0, sys.argv[1])
import vit_helpers
vit_helpers.load_notebook('06_run').lock_run(pathlib.Path(sys.argv[2]))
print('locked', flush=True)
input()
"""


def test_a_run_is_locked_while_it_is_trained(tmp_path, running):
    command = [sys.executable, "-c", HOLDER, vit_helpers.ROOT, tmp_path]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RuntimeError, match="is being trained by another process"):
        running.lock_run(tmp_path)
    holder.kill()                                       # a dead process blocks nobody
    holder.wait()
    running.lock_run(tmp_path)


def test_a_run_that_goes_on_in_the_same_kernel_has_each_epoch_once_in_its_log(
        settings, train, training, running):
    config = settings(epochs=3, run="in-one-kernel")
    folder, writer, _ = running.open_run(config)

    def interrupt(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, folder, writer=writer, on_epoch=interrupt)
    train(config, folder, writer=writer)                # the cell is run again
    running.close_run(config, writer)
    assert vit_helpers.read_history("in-one-kernel")["epoch"] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_that_is_a_file_names_its_holder(tmp_path, running, monkeypatch):
    """On a disk that knows no locks, as the system then says; the machine that held it has died."""
    def unknown(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unknown)
    (tmp_path / ".lock").write_text("4711\nnode7\n")
    with pytest.raises(RuntimeError, match="if process 4711 on node7 is gone, delete that file"):
        running.lock_run(tmp_path)


def test_foreign_and_half_written_run_folders_are_skipped(capsys):
    odd = {"foreign": {"x.txt": "x"}, "half": {"config.json": json.dumps({"model": "vit"})},
           "broken": {"config.json": "{"}, "empty": {}}
    for name, content in odd.items():
        folder = vit_helpers.RUNS / "no-runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in content.items():
            (folder / file).write_text(text)
    assert [run for run in vit_helpers.read_runs() if "no-runs" in run["run"]] == []
    shown = capsys.readouterr().out
    assert [name for name in odd if f"skipped {name}" not in shown] == []
    with pytest.raises(FileNotFoundError, match="no run fits nothing-here in"):
        vit_helpers.read_runs(["published/digits-seed0-*", "nothing-here"])


READ_RUNS = "import vit_helpers; print(len(vit_helpers.read_runs(['published/digits-seed0-*'])))"


def test_published_runs_are_found_below_a_hidden_folder_and_with_a_short_home(tmp_path):
    place = tmp_path / ".hidden" / "deep" / "suite"
    (place / "runs").mkdir(parents=True)
    shutil.copy(vit_helpers.ROOT / "vit_helpers.py", place)
    (place / "runs" / "published").symlink_to(vit_helpers.ROOT / "runs" / "published")
    shown = subprocess.run([sys.executable, "-c", READ_RUNS], cwd=place, capture_output=True,
                           text=True, env={**os.environ, "VIT_HOME": str(tmp_path / "h")})
    assert shown.stdout.strip() == "4", shown.stderr


# ---- how a run is trained: chosen by measuring

SPEEDS = {("fp32", 2): 100, ("bf16", 2): 90, ("fp32", 1): 100, ("bf16", 1): 90}


@pytest.mark.parametrize("faster, epochs, expected", [
    ({("bf16", 2): 180}, 1000, ("bf16", 2)), ({("fp32", 1): 150}, 1000, ("fp32", 1)),
    ({("bf16", 1): 200, ("bf16", 2): 190}, 1000, ("bf16", 1)),
    ({("bf16", 2): 115}, 1000, ("fp32", 2)),            # not 1.2 times as fast
    ({("bf16", 2): 180}, 2, ("fp32", 2))])              # a short run
def test_the_faster_way_is_taken_in_long_runs(running, digits, settings, monkeypatch, capsys,
                                              faster, epochs, expected):
    """By a probe that says how fast each is."""
    def probe(network, data, config):
        return {**SPEEDS, **faster}[config["precision"], torch.get_num_threads()]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(running, "measure_speed", probe)
    monkeypatch.setattr(running, "has_bf16_units", lambda device: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    config = settings(epochs=epochs)
    asked = {"precision": None, "threads": None}
    choice, _ = running.choose(vit_helpers.build_model(config), digits, config, asked)
    torch.set_num_threads(before)
    assert (choice["precision"], choice["threads"]) == expected
    assert (", taken" in capsys.readouterr().out) == (epochs == 1000)


def test_what_is_asked_for_is_not_measured_away(running, monkeypatch):
    monkeypatch.setattr(running, "has_bf16_units", lambda device: True)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    asked = {"precision": "fp32", "threads": None}
    ways = running.ways({}, asked, torch.device("cpu"))
    assert ways == [("fp32", torch.get_num_threads())]


def test_a_run_that_goes_on_keeps_its_precision_unless_another_is_asked_for(running, settings,
                                                                            capsys):
    config = {**settings(run="kept"), "precision": "fp32", "threads": 1}
    path = vit_helpers.RUNS / "kept" / "config.json"
    path.parent.mkdir(parents=True)
    vit_helpers.write_json(path, {**config, "precision": "bf16"})
    assert running.keep_choice(config, {"precision": None, "threads": 1})
    assert config["precision"] == "bf16"
    config["precision"] = "fp32"
    running.keep_choice(config, {"precision": "fp32", "threads": 1})
    assert config["precision"] == "fp32"
    assert "precision was bf16 and is now fp32" in capsys.readouterr().out
    running.keep_choice(config, {"precision": "fp32", "threads": 1}, is_done=True)
    assert config["precision"] == "bf16"                        # nothing is trained again
    assert "was trained in bf16; for fp32 give it another name" in capsys.readouterr().out


def test_without_its_config_a_run_keeps_the_precision_of_its_checkpoint(running, settings, train):
    config = settings(run="config-gone", epochs=1)
    train(config | {"precision": "bf16"}, vit_helpers.SAVED_MODELS / "config-gone")
    assert running.keep_choice(config, {"precision": None, "threads": 1})
    assert config["precision"] == "bf16"


# ---- parameters

@pytest.mark.parametrize("value, kind, result", [
    (7, str, "7"), ("true", bool, True), (2e5, int, 200000), (1, float, 1.0), ("3", int, 3),
    ([64, 96], str, "64,96"), (None, float, None), ("None", int, None), (0, float, 0.0)])
def test_what_papermill_makes_of_a_value_is_put_right(value, kind, result):
    got = vit_helpers.as_type("x", value, kind)
    assert got == result and type(got) is type(result)


@pytest.mark.parametrize("value, kind", [("two", int), (1.5, int), ("maybe", bool), ({1}, str),
                                         (True, float), (float("nan"), int)])
def test_values_of_the_wrong_type(value, kind):
    with pytest.raises(ValueError, match="parameter 'x' is"):
        vit_helpers.as_type("x", value, kind)


def parameters_cell():
    cells = vit_helpers.notebook_cells(vit_helpers.NOTEBOOKS / "06_run.ipynb")
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return "".join(tagged[0]["source"])


def test_the_parameters_cell_agrees_with_the_suites_own_table():
    namespace = {}
    exec(parameters_cell(), namespace)
    del namespace["__builtins__"]
    assert namespace == vit_helpers.default_parameters()


@pytest.mark.parametrize("line, name, value", [
    ("base = 0.1\nlearning_rate = base / 2", "learning_rate", 0.05),
    ("dropout = 0", "dropout", 0.0), ("dims = [64, 96]", "dims", "64,96"),
    ("seed: int = 3", "seed", 3), ("epochs = None", "epochs", None),
    ("for i in range(3):\n    epochs = i + 1", "epochs", 3)])
def test_any_python_in_the_parameters_cell(line, name, value):
    cell = f"{parameters_cell()}\n{line}\n"
    namespace = {}
    exec(cell, namespace)
    assert vit_helpers.check_parameters({**namespace, "In": ["", cell]})[name] == value


def test_a_misspelt_name_in_the_parameters_cell_is_refused():
    cell = parameters_cell().replace("epochs = None", "epochz = 3")
    namespace = {}
    exec(cell, namespace)
    with pytest.raises(ValueError, match="unknown parameter 'epochz', did you mean 'epochs'"):
        vit_helpers.check_parameters({**namespace, "In": ["", cell]})


def resolved(running, **changes):
    return running.resolve(changes)


@pytest.mark.parametrize("changes", [
    {"micro_batch_size": 16}, {"epochs": 40}, {"dims": "48, 64,80,112"}, {"recipe": "sgd"},
    {"threads": 1}, {"workers": 0}, {"device": "cpu"}, {"augment": "crop"}])
def test_what_changes_nothing_does_not_change_the_default_name(running, changes):
    assert resolved(running, **changes)["run"] == resolved(running)["run"] == "digits-vit-sgd-seed0"


@pytest.mark.parametrize("changes, name", [
    ({"epochs": 2}, "digits-vit-sgd-epochs2-seed0"),
    ({"depth": 2}, "digits-vit-sgd-depth2-seed0"),
    ({"grad_clip": 0, "seed": 3}, "digits-vit-sgd-grad_clip0.0-seed3"),
    ({"merge_at": "2,3"}, "digits-vit-sgd-merge_at2,3-seed0")])
def test_what_was_asked_for_is_in_the_default_name(running, changes, name):
    assert resolved(running, **changes)["run"] == name


def test_zero_is_a_value_and_none_is_not(running):
    names = ("grad_clip", "label_smoothing", "weight_decay", "warmup_epochs")
    chosen = resolved(running, **dict.fromkeys(names, 0.0))
    assert [chosen[name] for name in names] == [0, 0, 0, 0]
    open_ones = resolved(running)
    assert [open_ones[name] for name in names] == [1.0, 0.1, 1e-4, 4.0]


# ---- images of one's own

@pytest.fixture(scope="module")
def trained():
    """A run with a checkpoint as `load_model` reads it; not trained at all."""
    config = {**small_config(), "mean": [0.3], "std": [0.4],
              "classes": [f"digit {i}" for i in range(10)]}
    folder = vit_helpers.SAVED_MODELS / "for-predict"
    folder.mkdir(parents=True, exist_ok=True)
    weights = vit_helpers.build_model(config).half().state_dict()
    vit_helpers.save(folder / "best.pt", {"model": weights, "config": config, "epoch": 1})
    return "for-predict"


def test_load_model_names_near_runs(trained):
    with pytest.raises(FileNotFoundError, match="near it: for-predict"):
        vit_helpers.load_model("for-predct")


def test_load_model_takes_a_name_as_tab_completion_writes_it_and_a_path(trained):
    path = vit_helpers.SAVED_MODELS / trained / "best.pt"
    for name in (trained, f"saved_models/{trained}/", str(path), path):
        assert vit_helpers.load_model(name).config["class"] == "ViT"
