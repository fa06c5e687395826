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
GOOD = {"image_size": [4, 8, 12, 24], "patch_size": [1, 2, 4], "in_channels": [1, 3, 4], "num_classes": [1, 2, 6], "head_dim": [1, 2, 4], "mlp_ratio": [0.5, 1, 2.5],
        "dims": [(8,), (8, 16), (16, 8, 8), (4, 8, 12, 16)], "pool": ["cls", "mean"], "dropout": [0.0, 0.3], "drop_path": [0.0, 0.2]}
ODD = {"image_size": [-4, 0, 5, 7], "patch_size": [-1, 0, 3, 5, 9], "in_channels": [0, -1], "num_classes": [0, -2], "head_dim": [-4, 0, 3, 32], "mlp_ratio": [-1, 0, 0.01, float("nan")],
       "dims": [(), (0,), (8, -8), (6, 8)], "pool": ["max", ""], "dropout": [1.0, -0.1], "drop_path": [1.5]}


@st.composite
def model_settings(draw):
    """Good settings, of which a few are replaced by odd ones."""
    chosen = {name: draw(st.sampled_from(values)) for name, values in GOOD.items()}
    return {**chosen, **{name: draw(st.sampled_from(ODD[name])) for name in draw(st.lists(st.sampled_from([*ODD]), max_size=2))}}


@given(model_settings())
@settings(max_examples=100)
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
VALUES = st.one_of(st.integers(-3, 40), st.floats(), st.booleans(), st.text("ab,3-./ ", max_size=6), st.none(), st.lists(st.integers(), max_size=2),
                   st.sampled_from(["vit", "towervit", "digits", "sgd", "adamw", "16,32", "crop", "mean", "cifar10", "true", "1e-3"]))


@given(st.dictionaries(NAMES, VALUES, max_size=5))
@settings(max_examples=200)
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


LAYOUTS = {"classes": ["a", "b", "a/deep"], "parts": ["train/a", "train/b", "test/a", "test/b"], "mixed": ["a", "b", "train/a", "test/b", "."]}


@st.composite
def folders(draw):
    """(folder, ending, kind) of each file: four good pictures a class or none, and whatever else."""
    layout = LAYOUTS[draw(st.sampled_from([*LAYOUTS]))]
    odd = st.tuples(st.sampled_from(layout), st.sampled_from([".png", ".jpg", ".gif", ".txt"]), st.sampled_from(["L", "RGB", "RGBA", "P", "1", "broken", "empty"]))
    return draw(st.sampled_from([4, 4, 0])) * [(folder, ".png", "L") for folder in layout] + draw(st.lists(odd, max_size=12))


@given(folders(), st.sampled_from([0, 1, 3]))
@settings(max_examples=80)
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
