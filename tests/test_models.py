"""The models of 01_models.ipynb: what they compute, what they refuse, that they learn."""
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import vit_helpers
from jobs import needs_compiler

SMALL = dict(image_size=8, patch_size=2, in_channels=1, num_classes=10, head_dim=16)
TORCHVISION_NAMES = [
    (r"^conv_proj\.", "embed."), (r"^encoder\.pos_embedding", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."), (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attention.qkv."),
    (r"\.self_attention\.out_proj\.", ".attention.out."),
    (r"^encoder\.ln\.", "norm."), (r"^heads\.head\.", "head.")]


def parameters_without_gradient(model):
    """Names of the parameters that the last backward did not reach."""
    return [name for name, parameter in model.named_parameters()
            if parameter.grad is None or not parameter.grad.abs().sum() > 0]


# ---------------------------------------------------------------- the same as torchvision's

def from_torchvision(state_dict):
    """torchvision's weights under our names; a convolution of patches is a linear map."""
    ours = {}
    for name, value in state_dict.items():
        for pattern, replacement in TORCHVISION_NAMES:
            name = re.sub(pattern, replacement, name)
        ours[name] = value.flatten(1) if name == "embed.weight" else value
    return ours


def pair_of_twins(models, image_size, patch_size, dim, depth, num_heads, ratio, num_classes):
    """(torchvision's model, ours with the same weights, both in evaluation mode, images)."""
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(image_size, patch_size, depth, num_heads, dim,
                                                  dim * ratio, num_classes=num_classes)
    for parameter in theirs.parameters():       # a fresh head of theirs is zero: all logits equal
        nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.5)
    ours = models.TowerViT(image_size, patch_size, 3, num_classes, dim=dim, depth=depth,
                           head_dim=dim // num_heads, mlp_ratio=ratio)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return theirs.eval(), ours.eval(), torch.randn(2, 3, image_size, image_size)


@pytest.mark.parametrize("shape", [
    (32, 4, 96, 4, 3, 2, 10), (28, 7, 64, 2, 4, 4, 7), (48, 16, 192, 3, 3, 3, 100),
    (224, 16, 768, 12, 12, 4, 1000)])
def test_equals_torchvision(models, shape):
    theirs, ours, images = pair_of_twins(models, *shape)
    with torch.no_grad():
        expected, logits = theirs(images), ours(images)
    difference = (logits - expected).abs().max().item()
    print(f"largest difference of logits: {difference:.1e}, their sd: {expected.std().item():.2f}")
    assert expected.std() > 0.1
    assert difference < 1e-5


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equals_torchvision_on_every_fast_path(models, precision, compiled):
    """bf16 keeps 8 binary digits: a value is rounded by at most u = 2^-8 of itself.  On its way
    through a block a number is rounded at most 14 times (inputs, weights and outputs of six
    products, softmax, GELU); independent errors add up as a root: u * sqrt(14 * depth) of the
    logits' sd."""
    depth = 2 if compiled else 4            # a block of all tokens and the last one: both kinds
    theirs, ours, images = pair_of_twins(models, 32, 4, 96, depth, 3, 2, 10)
    network = torch.compile(ours) if compiled else ours
    with torch.no_grad():
        expected = theirs(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images).float()
    difference = logits - expected
    largest, typical = difference.abs().max(), difference.square().mean().sqrt()
    bound = 2 ** -8 * (14 * len(ours.blocks)) ** 0.5 * expected.std()
    print(f"{precision}, compiled {compiled}: largest difference {largest:.1e},", end=" ")
    print(f"root mean square {typical:.1e}, bound in bf16 {bound:.1e}")
    if precision == "fp32":
        assert largest < 1e-5
    else:
        assert 0 < typical < bound


def test_mixed_precision_rounds_nothing_on_the_skip_path(models):
    """Of a block that widens, as of one that does not: with branches that add nothing, tokens and
    gradients are those of fp32."""
    block = models.Block(32, 48, head_dim=16, mlp_ratio=2)
    for last in (block.attention.out, block.mlp[3]):
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    x, wanted = torch.randn(4, 17, 32, requires_grad=True), torch.randn(4, 17, 48)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = block(x)
    torch.testing.assert_close(tokens, x @ block.project.weight.T)
    [gradient] = torch.autograd.grad(tokens, x, wanted)
    torch.testing.assert_close(gradient, wanted @ block.project.weight)


def test_parameters_of_vit_b_16(models):
    with torch.device("meta"):
        model = models.TowerViT(224, 16, 3, 1000, dim=768, depth=12, head_dim=64, mlp_ratio=4)
    assert models.count_parameters(model) == 86_567_656


# ---------------------------------------------------------------- gradients, intermediates

@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("changes", [
    dict(dims=(16, 32, 48)), dict(dims=(48, 32, 16)), dict(dims=(16, 16, 32, 16, 16)),
    dict(dims=(32,)), dict(dims=(16, 32, 48), merge_at=(2,)), dict(dims=(16, 32), merge_at=(2,)),
    dict(dims=(32, 32, 32), merge_at=(1, 3)), dict(dims=(16, 32), patch_size=4, stem="conv")])
def test_gradients_reach_every_parameter(models, changes, pool):
    model = models.ViT(**{**SMALL, "pool": pool, "dropout": 0.1, "drop_path": 0.1, **changes})
    model(torch.randn(64, 1, 8, 8)).square().sum().backward()
    assert parameters_without_gradient(model) == []
    assert model(torch.randn(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("merge_at", [(), (2,), (1, 3)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_intermediates_are_what_hooks_see(models, pool, merge_at):
    model = models.ViT(**SMALL, dims=(16, 32, 32), pool=pool, merge_at=merge_at).eval()
    images, hooked = torch.randn(3, 1, 8, 8), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: hooked.append(output))
    logits, seen = model(images, return_intermediates=True)

    numbers = [model.num_prefix_tokens + grid ** 2 for grid in model.grids]
    shapes = [(3, n, width) for n, width in zip(numbers, model.widths, strict=True)]
    assert [tuple(tokens.shape) for tokens in seen["tokens"]] == shapes
    for tokens, output in zip(seen["tokens"][1:], hooked, strict=True):
        assert torch.equal(tokens, output)

    heads = [width // 16 for width in model.widths[1:]]
    shapes = [(3, h, n, n) for h, n in zip(heads, numbers[1:], strict=True)]
    assert [tuple(weights.shape) for weights in seen["attention"]] == shapes
    for weights in seen["attention"]:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))

    torch.testing.assert_close(model.pool_tokens(model.norm(hooked[-1])), seen["features"])
    torch.testing.assert_close(model.head(seen["features"]), logits)
    torch.testing.assert_close(model(images), logits)


@pytest.mark.parametrize("merge_at, tokens", [((), 16), ((3,), 4)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_leaving_out_what_is_unused_changes_neither_logits_nor_gradients(
        models, pool, merge_at, tokens):
    """With a class token the last block is computed for it alone; to give out intermediates it is
    computed whole."""
    model = models.ViT(**SMALL, dims=(16, 32, 48), pool=pool, merge_at=merge_at).double()
    images, computed = torch.randn(8, 1, 8, 8, dtype=torch.float64), []
    model.blocks[-1].register_forward_hook(
        lambda module, inputs, output: computed.append(output.shape[1]))
    outcomes = []
    for intermediates in (False, True):
        model.zero_grad()
        output = model(images, return_intermediates=intermediates)
        logits = output[0] if intermediates else output
        logits.square().sum().backward()
        outcomes.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert computed == ([1, tokens + 1] if pool == "cls" else [tokens, tokens])
    for short, whole in zip(*outcomes, strict=True):
        torch.testing.assert_close(short, whole, rtol=1e-12, atol=1e-12)


def test_drop_path_and_dropout_are_off_in_evaluation(models):
    model = models.ViT(**SMALL, dims=(16, 32), dropout=0.3, drop_path=0.3)
    images = torch.randn(16, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


# ---------------------------------------------------------------- merging, the stem

@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_merging_equals_averaging_by_hand(models, pool):
    """The blocks run one by one, with tokens averaged place by place in between."""
    model = models.ViT(**SMALL, dims=(16, 32, 32), pool=pool, merge_at=(2,)).eval()
    images, prefix = torch.randn(3, 1, 8, 8), model.num_prefix_tokens
    tokens = model.blocks[0](model.embed_images(images))
    merged = [tokens[:, i] for i in range(prefix)]
    for row in (0, 2):
        for column in (0, 2):
            corner = prefix + 4 * row + column              # the grid is 4 x 4, row by row
            four = [tokens[:, corner + step] for step in (0, 1, 4, 5)]
            merged.append(sum(four) / 4)
    tokens = model.blocks[2](model.blocks[1](torch.stack(merged, dim=1)))
    torch.testing.assert_close(model.head(model.pool_tokens(model.norm(tokens))), model(images))


def test_merging_keeps_the_parameters_and_saves_operations(models):
    plain, merging = models.ViT(), models.ViT(merge_at=[5, 3])
    assert merging.grids == (8, 8, 8, 4, 4, 2, 2, 2, 2)
    assert merging.parts() == plain.parts()
    assert models.count_flops(merging) < models.count_flops(plain) / 3
    for name, value in plain.state_dict().items():
        assert merging.state_dict()[name].shape == value.shape, name


def test_tokens_of_the_conv_stem(models):
    """One per 4 x 4 pixels, in reading order, about as large as those of patches."""
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(64, 3, 8, 8), size=32, mode="bicubic")     # smooth
    images = images / images.std()
    tokens = {}
    for stem in ("patch", "conv"):
        model = models.ViT(stem=stem, pool="mean", pos_embed_std=0)
        tokens[stem] = model.embed_images(images)
        assert tokens[stem].shape == (64, 64, 64)
        assert 0.3 < tokens[stem].std() < 0.9
    by_place = tokens["conv"].transpose(1, 2).unflatten(2, (8, 8))
    assert torch.equal(by_place, model.embed(images))


def test_the_conv_stem_has_no_statistics_of_the_batch(models):
    model = models.ViT(stem="conv")                         # in training mode, without dropout
    images = torch.randn(6, 3, 32, 32)
    torch.testing.assert_close(model(images)[:2], model(images[:2]))
    assert dict(model.parts())["convolutional stem"] == 32 * 27 + 32 + 64 * 32 * 9 + 64


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("wrong, said", [
    (dict(image_size=30), "30 is not divisible by patch_size 4"),
    (dict(dims=(64, 100)), "nearest width that is: 96"),
    (dict(dims=()), "dims is empty"),
    (dict(dims=64), "dims is 64; give one width per block"),
    (dict(dims=(64, 0)), r"dims\[1\] is 0"),
    (dict(pool="max"), "'cls' .*'mean'"),
    (dict(patch_size=0), "patch_size is 0"),
    (dict(in_channels=1.5), "in_channels is 1.5"),
    (dict(num_classes=-1), "num_classes is -1"),
    (dict(mlp_ratio=0), "mlp_ratio is 0"),
    (dict(dropout=1.0), "dropout is 1.0; it is a fraction and must be"),
    (dict(drop_path=-0.1), "drop_path is -0.1; it is a fraction and must be"),
    (dict(pos_embed_std=-1), "pos_embed_std is -1; it must be 0 or more"),
    (dict(merge_at=(9,)), "names block 9; .*from 1 to the depth, 8"),
    (dict(merge_at=(0,)), "names block 0; .*from 1 to the depth, 8"),
    (dict(merge_at=(3, 3)), r"merge_at is \(3, 3\); name each block once"),
    (dict(merge_at=(2.0,)), "names block 2.0; it takes whole numbers"),
    (dict(merge_at=("3",)), "names block '3'; it takes whole numbers"),
    (dict(merge_at=3), r"merge_at is 3; give block numbers, such as \(3,\)"),
    (dict(image_size=28, merge_at=(2,)), "before block 2 the grid is 7 x 7, .*multiple of 2"),
    (dict(merge_at=(2, 3, 4, 5)), "before block 5 the grid is 1 x 1, .*multiple of 16"),
    (dict(stem="convolution"), "stem is 'convolution'; it must be 'patch' .*'conv'"),
    (dict(stem="conv", patch_size=8), "patch_size must be 4, not 8; set .*stem to 'patch'")])
def test_wrong_settings_are_refused(models, wrong, said):
    with pytest.raises(ValueError, match=said):
        models.ViT(**wrong)


@pytest.mark.parametrize("wrong, said", [
    (dict(depth=0), "depth is 0"), (dict(depth=2.5), "depth is 2.5"), (dict(dim=0), "dim is 0")])
def test_wrong_settings_of_a_tower_are_refused(models, wrong, said):
    with pytest.raises(ValueError, match=said):
        models.TowerViT(**wrong)


def test_wrong_images_are_refused(models):
    with pytest.raises(ValueError, match=r"images are \(2, 3, 28, 28\)"):
        models.ViT()(torch.zeros(2, 3, 28, 28))


# ---------------------------------------------------------------- the registry

def contestant(models, name, dims=(48, 64, 80, 112), **changes):
    """A model of the registry for digits, on the meta device."""
    class_name, arguments = models.model_settings({**SMALL, "model": name, "dims": dims, **changes})
    with torch.device("meta"):
        return getattr(models, class_name)(**arguments)


def test_widths_of_the_contestants(models):
    widths = {name: contestant(models, name).widths[1:] for name in models.MODELS}
    assert widths == {"vit": (48, 64, 80, 112), "towervit": (48,) * 4,
                      "towervit-wide": (112,) * 4, "towervit-matched": (80,) * 4}


@pytest.mark.parametrize("changes", [
    dict(), dict(pool="mean"), dict(merge_at=(3,)), dict(dims=(112, 80, 64, 48)),
    dict(image_size=32, patch_size=4, stem="conv"), dict(mlp_ratio=4),
    dict(image_size=32, patch_size=4, in_channels=3, head_dim=32,
         dims=(64, 64, 96, 96, 128, 128, 192, 192))])
def test_the_matched_tower_is_the_nearest(models, changes):
    """Nearer in parameters than its two neighbours; for digits within 2%."""
    growing = models.count_parameters(contestant(models, "vit", **changes))
    matched = contestant(models, "towervit-matched", **changes)
    head_dim, dim = changes.get("head_dim", 16), matched.widths[0]
    depth = len(matched.blocks)
    gaps = {}
    for width in (dim - head_dim, dim, dim + head_dim):
        tower = contestant(models, "towervit", **{**changes, "dims": (width,) * depth})
        gaps[width] = abs(models.count_parameters(tower) / growing - 1)
    assert min(gaps, key=gaps.get) == dim
    if not changes:
        assert gaps[dim] < 0.02


def test_an_unknown_model_is_refused(models):
    with pytest.raises(ValueError, match="'vit-registers'; .*: " + ", ".join(models.MODELS)):
        contestant(models, "vit-registers")


def test_what_settings_leave_out_is_the_classs_default(models):
    for name in models.MODELS:
        class_name, arguments = models.model_settings({"model": name, "dims": (64, 96)})
        assert getattr(models, class_name)(**arguments).blocks[0].attention.head_dim == 32


@pytest.mark.parametrize("name", ["vit", "towervit-matched"])
def test_settings_reach_the_model(models, name):
    model = contestant(models, name, pool="mean", merge_at=[2], dropout=0.25)
    assert (model.pool, model.merge_at, model.dropout.p) == ("mean", (2,), 0.25)


@pytest.mark.parametrize("changes", [dict(), dict(stem="conv", pool="mean"), dict(merge_at=(3,))])
def test_parts_add_up(models, changes):
    model = models.ViT(**changes)
    assert sum(number for _, number in model.parts()) == models.count_parameters(model)
    assert [text for text, _ in model.parts()][2:-1] == [f"block {i}" for i in range(1, 9)]


def test_count_flops_by_hand(models):
    """A linear layer is 2 * tokens * in * out, attention twice 2 * tokens² * width."""
    model = models.TowerViT(**SMALL, dim=32, depth=1, mlp_ratio=2, pool="mean").train()
    weights = 4 * 32 + 3 * 32 * 32 + 32 * 32 + 2 * 32 * 64  # embedding, qkv, out, MLP
    expected = 2 * 16 * weights + 2 * (2 * 16 * 16 * 32) + 2 * 32 * 10
    assert models.count_flops(model) == expected
    assert model.training                                   # left as it was


# ---------------------------------------------------------------- export

EXPORTED = [dict(), dict(pool="mean"), dict(merge_at=(1, 2)), dict(patch_size=4, stem="conv")]


def exported(model, images):
    """By torch.export, which is also what the ONNX exporter uses, for batches of any size."""
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (images,), dynamic_shapes=shapes).module()


@pytest.mark.filterwarnings("ignore")                       # torch.jit is deprecated, and warns
@pytest.mark.parametrize("export", [exported, torch.jit.trace])
@pytest.mark.parametrize("changes", EXPORTED)
def test_exported_models_take_any_batch_size(models, changes, export):
    model = models.ViT(**{**SMALL, "dims": (16, 32), **changes}).eval()
    images = torch.randn(5, 1, 8, 8)
    network = export(model, images[:2])
    torch.testing.assert_close(network(images), model(images))


# ---------------------------------------------------------------- learning

def test_learns_32_digits_by_heart(digits, settings, train):
    few = digits.train.subset(torch.arange(32))
    data = vit_helpers.load_notebook("02_data").Data(few, few, few, digits.classes)
    config = settings(dims="32,48", head_dim=16, epochs=60, batch_size=32, augment="none",
                      label_smoothing=0.0)
    _, history = train(config, data=data)
    assert history[0]["val_accuracy"] < 0.5
    assert history[-1]["val_accuracy"] == 1.0
