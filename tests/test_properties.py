"""Settings, parameters and data folders drawn at random by hypothesis: accepted and working, or refused with a ValueError."""
import tempfile
from pathlib import Path

import numpy as np
import torch
import vit_helpers
from hypothesis import event, given, settings, strategies as st
from PIL import Image

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
small = st.integers(-1, 24)
MODEL = st.fixed_dictionaries({
    "image_size": small, "patch_size": st.integers(-1, 8), "in_channels": st.integers(0, 4), "num_classes": st.integers(0, 6),
    "dims": st.lists(st.sampled_from([0, 4, 8, 12, 16, 20]), max_size=4), "head_dim": st.sampled_from([-4, 0, 1, 4, 8]),
    "mlp_ratio": st.sampled_from([-1, 0, 0.01, 0.5, 1, 2.5, float("nan")]), "pool": st.sampled_from(["cls", "mean", "max"]),
    "dropout": st.sampled_from([0.0, 0.3, 1.0]), "drop_path": st.sampled_from([0.0, 0.2, -0.1])})


@given(MODEL)
@settings(max_examples=400)
def test_model_settings_work_or_are_refused(models, chosen):
    try:
        model = models.ViT(**chosen)
    except ValueError as error:
        event("refused")
        assert str(error)
        return
    event("accepted")
    logits = model(torch.randn(16, chosen["in_channels"], chosen["image_size"], chosen["image_size"]))
    assert logits.shape == (16, chosen["num_classes"]) and logits.isfinite().all()
    model.eval()(torch.randn(4, chosen["in_channels"], chosen["image_size"], chosen["image_size"])).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


NAMES = st.sampled_from([*vit_helpers.default_parameters(), "epochz", "In", "_"])
VALUES = st.one_of(st.integers(-3, 200), st.floats(), st.booleans(), st.text("ab,3-./ ", max_size=6), st.none(), st.lists(st.integers(), max_size=2),
                   st.sampled_from(["vit", "towervit", "digits", "sgd", "adamw", "16,32", "crop", "mean", "cifar10", "true", "1e-3"]))


@given(st.dictionaries(NAMES, VALUES, max_size=5))
@settings(max_examples=500)
def test_parameters_are_resolved_or_refused(given_values):
    known = vit_helpers.default_parameters()
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in given_values.items())
    try:
        parameters = vit_helpers.check_parameters({**known, **given_values, "In": [cell]})
        resolved = vit_helpers.resolve(parameters)
    except ValueError as error:
        event("refused")
        assert str(error)
        return
    event("accepted")
    assert resolved["epochs"] >= 1 and resolved["batch_size"] >= 1 and resolved["dims"] and resolved["run"]
    assert vit_helpers.model_settings({**resolved, "in_channels": 1, "num_classes": 10})[0] in ("ViT", "TowerViT")


FILE = st.tuples(st.sampled_from(["a", "b", "train/a", "train/b", "test/a", "test/b", "val/a", ".", "a/deep"]), st.sampled_from([".png", ".jpg", ".gif", ".txt"]),
                 st.sampled_from(["L", "RGB", "RGBA", "P", "1", "broken", "empty"]))


@given(st.lists(FILE, max_size=30), st.sampled_from([0, 1, 3]))
@settings(max_examples=150)
def test_folders_of_images_are_loaded_or_refused(files, channels):
    with tempfile.TemporaryDirectory() as place:
        for number, (folder, ending, kind) in enumerate(files):
            path = Path(place, "data", folder, f"{number}{ending}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if ending == ".txt" or kind in ("broken", "empty"):
                path.write_bytes(b"" if kind == "empty" else b"\x89PNG and no more")
            else:
                mode = "RGB" if ending == ".jpg" and kind in ("RGBA", "P", "1") else kind
                Image.fromarray(np.full((5 + number % 3, 6, 3), number * 8, np.uint8)).convert(mode).save(path)
        try:
            data = vit_helpers.load_data(str(Path(place, "data")), image_size=4, channels=channels)
        except (ValueError, FileNotFoundError) as error:
            event("refused")
            assert str(error)
            return
        event("accepted")
        for split in (data.train, data.val, data.test):
            pictures, labels = next(split.batches([torch.arange(len(split))]))
            assert len(pictures) > 0 and pictures.shape[1] in ((1, 3) if not channels else (channels,)) and pictures.shape[2:] == (4, 4)
            assert labels.max() < len(data.classes) and data.normalise(pictures).isfinite().all()
