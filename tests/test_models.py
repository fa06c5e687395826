"""The models of 01_models.ipynb: what they compute, what they refuse, that they learn."""
import shutil

import pytest
import torch
import torchvision
import vit_helpers
from torch import nn


def pair_of_twins(models, image_size, patch_size, dim, depth, heads, ratio, classes):
    """(torchvision's model, ours with the same weights, both in evaluation mode, images)."""
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(image_size, patch_size, depth, heads, dim, dim * ratio, num_classes=classes).eval()
    for parameter in theirs.parameters():       # a fresh torchvision head is zero, and would make all logits equal
        nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.5)
    ours = models.TowerViT(image_size, patch_size, 3, classes, dim=dim, depth=depth, head_dim=dim // heads, mlp_ratio=ratio).eval()
    vit_helpers.load_notebook("06_run").start_from(ours, theirs.state_dict())
    ours.head.load_state_dict(theirs.heads.head.state_dict())           # it starts from a head of zeros
    return theirs, ours, torch.randn(2, 3, image_size, image_size)


@pytest.mark.parametrize("shape", [(32, 4, 96, 4, 3, 2, 10), (28, 7, 64, 2, 4, 4, 7), (48, 16, 192, 3, 3, 3, 100), (224, 16, 768, 12, 12, 4, 1000)])
def test_equals_torchvision(models, shape):
    theirs, ours, images = pair_of_twins(models, *shape)
    with torch.no_grad():
        expected, logits = theirs(images), ours(images)
    difference = (logits - expected).abs().max().item()
    print(f"largest difference of logits: {difference:.1e}, their sd: {expected.std().item():.2f}")
    assert expected.std() > 0.1 and difference < 1e-5


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler for torch.compile"))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equals_torchvision_on_every_fast_path(models, precision, compile):
    """bf16 keeps 8 binary digits: a value is rounded by at most u = 2^-8 of itself.  On its way through a block a number is rounded at most 14
    times (inputs, weights and outputs of six products, softmax, GELU); independent errors add up as a root: u * sqrt(14 * depth) of the logits' sd."""
    theirs, ours, images = pair_of_twins(models, 32, 4, 96, 4, 3, 2, 10)
    network = torch.compile(ours) if compile else ours
    with torch.no_grad():
        expected = theirs(images)
        with vit_helpers.autocast(images.device, {"precision": precision}):
            logits = network(images).float()
    difference, bound = logits - expected, 2 ** -8 * (14 * len(ours.blocks)) ** 0.5 * expected.std()
    print(f"{precision}, compiled {compile}: largest difference {difference.abs().max():.1e}, root mean square {difference.square().mean().sqrt():.1e}, bound in bf16 {bound:.1e}")
    assert difference.abs().max() < 1e-5 if precision == "fp32" else 0 < difference.square().mean().sqrt() < bound


def test_parameters_of_vit_b_16(models):
    with torch.device("meta"):
        assert vit_helpers.count_parameters(models.TowerViT(224, 16, 3, 1000, dim=768, depth=12, head_dim=64, mlp_ratio=4)) == 86_567_656


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("dims", [(16, 32, 48), (48, 32, 16), (16, 16, 32, 16, 16), (32,)])
def test_gradients_reach_every_parameter(models, dims, pool):
    model = models.ViT(8, 2, 1, 10, dims=dims, head_dim=16, pool=pool, dropout=0.1, drop_path=0.1)
    model(torch.randn(64, 1, 8, 8)).square().sum().backward()
    missed = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert not missed and model(torch.randn(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_intermediates_are_what_hooks_see(models, pool):
    model = models.ViT(8, 2, 1, 10, dims=(16, 32), head_dim=8, pool=pool).eval()
    images, hooked = torch.randn(3, 1, 8, 8), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: hooked.append(output))
    logits, seen = model(images, return_intermediates=True)
    tokens = 16 + (pool == "cls")
    assert [weights.shape for weights in seen["attention"]] == [(3, 2, tokens, tokens), (3, 4, tokens, tokens)]
    assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in seen["attention"])
    assert len(seen["tokens"]) == 3 and all(torch.equal(a, b) for a, b in zip(seen["tokens"][1:], hooked))
    assert torch.allclose(model(images), logits, atol=1e-6) and torch.allclose(model.head(seen["features"]), logits)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_leaving_out_what_nobody_reads_changes_neither_logits_nor_gradients(models, pool):
    """With a class token the last block is computed for it alone; to give out intermediates it is computed whole."""
    model = models.ViT(8, 2, 1, 10, dims=(16, 32, 48), head_dim=16, pool=pool).double()
    images, widths, outcomes = torch.randn(8, 1, 8, 8, dtype=torch.float64), [], []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    for forward in (model, lambda images: model(images, return_intermediates=True)[0]):
        model.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        outcomes.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert widths == ([1, 17] if pool == "cls" else [16, 16])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*outcomes))


@pytest.mark.parametrize("wrong, said", [
    (dict(image_size=30), "30 is not divisible by patch_size 4"), (dict(dims=(64, 100)), "nearest width that is: 96"),
    (dict(dims=()), "dims is empty"), (dict(pool="max"), "'cls' .*'mean'"), (dict(dims=(64, 0)), r"dims\[1\] is 0"),
    (dict(patch_size=0), "patch_size is 0"), (dict(in_channels=1.5), "in_channels is 1.5"), (dict(num_classes=-1), "num_classes is -1"),
    (dict(dropout=1.0), "dropout is 1.0"), (dict(drop_path=-0.1), "drop_path is -0.1"), (dict(mlp_ratio=0), "mlp_ratio is 0")])
def test_wrong_settings_are_refused(models, wrong, said):
    with pytest.raises(ValueError, match=said):
        models.ViT(**wrong)


def test_wrong_images_are_refused(models):
    with pytest.raises(ValueError, match=r"images are \(2, 3, 28, 28\)"):
        models.ViT()(torch.zeros(2, 3, 28, 28))


def test_drop_path_and_dropout_are_off_in_evaluation(models):
    model = models.ViT(8, 2, 1, 10, dims=(16, 32), head_dim=8, dropout=0.3, drop_path=0.3)
    images = torch.randn(16, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_learns_32_digits_by_heart(digits, settings, train):
    few = digits.train.subset(torch.arange(32))
    config = settings(dims="32,48", head_dim=16, epochs=60, batch_size=32, augment="none", label_smoothing=0.0)
    model, history = train(config, data=vit_helpers.Data(few, few, few, digits.classes))
    assert history[-1]["val_accuracy"] == 1.0 and history[0]["val_accuracy"] < 0.5
