"""Settings and parameters drawn at random by hypothesis: accepted and working, or refused with a
ValueError.  A third at least must be accepted, or the draws would test the refusals alone."""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vit_helpers

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
RUNNING = vit_helpers.load_notebook("06_run")
GOOD = {"image_size": [4, 8, 12, 24], "patch_size": [1, 2, 4], "in_channels": [1, 3, 4],
        "num_classes": [1, 2, 6], "head_dim": [1, 2, 4], "mlp_ratio": [0.5, 1, 2.5],
        "dims": [(8,), (8, 16), (16, 8, 8), (4, 8, 12, 16)], "pool": ["cls", "mean"],
        "dropout": [0.0, 0.3], "drop_path": [0.0, 0.2], "merge_at": [(), (), (1,)]}
ODD = {"image_size": [-4, 0, 5, 7], "patch_size": [-1, 0, 3, 5, 9], "in_channels": [0, -1],
       "num_classes": [0, -2], "head_dim": [-4, 0, 3, 32], "mlp_ratio": [-1, 0, 0.01, float("nan")],
       "dims": [(), (0,), (8, -8), (6, 8)], "pool": ["max", ""], "dropout": [1.0, -0.1],
       "drop_path": [1.5], "merge_at": [(9,), (0,), (1, 1)], "stem": ["resnet", "conv"]}


@st.composite
def model_settings(draw):
    """Good settings, of which up to two are replaced by odd ones."""
    chosen = {name: draw(st.sampled_from(values)) for name, values in GOOD.items()}
    for name in draw(st.lists(st.sampled_from([*ODD]), max_size=2)):
        chosen[name] = draw(st.sampled_from(ODD[name]))
    return chosen


def test_model_settings_work_or_are_refused(models):
    accepted = []

    @given(model_settings())
    @settings(max_examples=100)
    def check(chosen):
        try:
            model = models.ViT(**chosen)
        except ValueError:
            return
        accepted.append(chosen)
        size = chosen["image_size"]
        images = torch.randn(16, chosen["in_channels"], size, size)
        logits = model(images)
        assert logits.shape == (16, chosen["num_classes"]) and logits.isfinite().all()
        model.eval()(images[:4]).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)

    check()
    print(f"{len(accepted)} of 100 accepted")
    assert len(accepted) >= 33


NAMES = [*vit_helpers.default_parameters(), "epochz", "In", "_"]
VALUES = st.one_of(st.integers(-3, 40), st.floats(), st.booleans(), st.none(),
                   st.text("ab,3-./ ", max_size=6), st.lists(st.integers(), max_size=2))
FITTING = {"epochs": 3, "batch_size": "16", "dims": "16,32", "learning_rate": 1e-3, "seed": 2.0,
           "model": "towervit", "recipe": "adamw", "augment": "+erase", "grad_clip": 0, "depth": 2,
           "pool": "mean", "dataset": "cifar10", "compile": "true", "mix": 0.5, "head_dim": 8,
           "threads": 1, "schedule": "constant", "drop_path": 0.1, "run": 7}


@st.composite
def some_parameters(draw):
    """A few fitting values, and now and then one of anything for any name."""
    names = draw(st.lists(st.sampled_from([*FITTING]), max_size=4))
    chosen = {name: FITTING[name] for name in names}
    if draw(st.booleans()):
        chosen[draw(st.sampled_from(NAMES))] = draw(VALUES)
    return chosen


def test_parameters_are_resolved_or_refused(models):
    accepted = []

    @given(some_parameters())
    @settings(max_examples=200)
    def check(chosen):
        cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in chosen.items())
        try:
            parameters = vit_helpers.check_parameters({**chosen, "In": [cell]})
            resolved = RUNNING.resolve(parameters)
        except ValueError:
            return
        accepted.append(chosen)
        assert resolved["epochs"] >= 1 and resolved["batch_size"] >= 1
        assert resolved["dims"] and resolved["run"]
        config = RUNNING.configure(resolved, in_channels=1, num_classes=10)
        assert config["class"] in ("ViT", "TowerViT")

    check()
    print(f"{len(accepted)} of 200 accepted")
    assert len(accepted) >= 66
