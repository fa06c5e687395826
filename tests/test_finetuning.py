"""Fine-tuning from torchvision's weights, timm's or a run's (tests download nothing)."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

import vit_helpers
from jobs import run_notebook

PUBLISHED = "published/digits-seed0-vit"
TEN = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def finetuning():
    return vit_helpers.load_notebook("05_finetuning")


@pytest.fixture(scope="module")
def training():
    return vit_helpers.load_notebook("04_training")


@pytest.fixture(scope="module")
def theirs():
    """A small ViT of torchvision's with random weights; its own fresh head would be zero."""
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=2, hidden_dim=128, mlp_dim=512,
        num_classes=10)
    nn.init.normal_(theirs.heads.head.weight, std=0.1)
    nn.init.normal_(theirs.encoder.pos_embedding, std=0.5)
    return theirs


def tower_of(models, found, num_classes=10, **changes):
    """A fresh TowerViT of the shape that weights fix."""
    settings = {**found["settings"], **changes}
    names = ("image_size", "patch_size", "depth", "head_dim", "mlp_ratio", "pool")
    dim = int(settings["dims"].split(",")[0])
    return models.TowerViT(in_channels=found["in_channels"], num_classes=num_classes, dim=dim,
                           **{name: settings[name] for name in names})


def largest_difference(a, b, images):
    with torch.no_grad():
        return (a.eval()(images) - b.eval()(images)).abs().max().item()


# ---- torchvision's

@pytest.fixture
def ours(models, finetuning, theirs):
    """Our TowerViT with torchvision's weights, its new head filled with theirs."""
    found = finetuning.read_foreign(theirs.state_dict(), "theirs")
    model = tower_of(models, found)
    finetuning.start_from(model, found)
    assert not model.head.weight.any()
    model.head.load_state_dict(theirs.heads.head.state_dict())
    return model


def test_the_parameters_are_as_many_as_torchvisions(models, theirs, ours):
    number = sum(parameter.numel() for parameter in theirs.parameters())
    assert models.count_parameters(ours) == number


def test_logits_equal_torchvisions(theirs, ours):
    assert largest_difference(ours, theirs, torch.randn(4, 3, 64, 64)) < 1e-5


def test_the_loss_after_a_step_equals_torchvisions(training, theirs, ours):
    images, labels = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8), torch.arange(8)
    datasets = vit_helpers.load_notebook("02_data")
    data = datasets.Data(*[datasets.Split(images, labels)] * 3, range(10))
    settings = {**training.COMMON, **training.RECIPES["finetune"], "augment": "none", "seed": 0,
                "batch_size": 8, "micro_batch_size": None, "precision": "fp32"}
    training.train_step(training.start_training(ours.train(), data, settings), images, labels)

    images = data.normalise(images)
    optimizer = torch.optim.SGD(theirs.train().parameters(), lr=settings["learning_rate"])
    F.cross_entropy(theirs(images), labels).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        ours_after = F.cross_entropy(ours.eval()(images), labels).item()
        theirs_after = F.cross_entropy(theirs.eval()(images), labels).item()
    assert ours_after == pytest.approx(theirs_after, abs=1e-4)


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_resized_position_embeddings_equal_torchvisions(models, finetuning, theirs, size):
    weights = theirs.state_dict()
    found = finetuning.read_foreign(weights, "theirs")
    model = tower_of(models, found, image_size=size)
    finetuning.start_from(model, found)
    expected = interpolate_embeddings(size, 16, weights.copy())["encoder.pos_embedding"]
    assert torch.equal(model.pos_embed, expected)


def test_position_embeddings_are_resized_alike_without_a_class_token(finetuning):
    pos_embed = torch.randn(1, 1 + 36, 8)
    with_token = finetuning.resize_pos_embed(pos_embed, 9)
    without = finetuning.resize_pos_embed(pos_embed[:, 1:], 9, num_prefix_tokens=0)
    assert torch.equal(without, with_token[:, 1:])


def test_the_names_of_torchvisions_files_are_known(finetuning, theirs):
    """Its downloads still call the layers of the MLP linear_1 and linear_2."""
    new = theirs.state_dict()
    old = {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
           for name, value in new.items()}
    assert any("linear_1" in name for name in old)
    by_old = finetuning.read_foreign(old, "old")["weights"]
    by_new = finetuning.read_foreign(new, "new")["weights"]
    assert by_old.keys() == by_new.keys()
    assert all(torch.equal(by_old[name], by_new[name]) for name in by_new)


@pytest.mark.parametrize("dim, head_dim", [(192, 64), (768, 64), (1280, 80), (1664, 104),
                                           (40, None)])
def test_head_dim_is_that_of_published_models(finetuning, models, dim, head_dim):
    with torch.device("meta"):
        tower = models.TowerViT(8, 4, dim=dim, depth=1, head_dim=dim, mlp_ratio=4)
    assert finetuning.read_foreign(in_timms_names(tower), "x")["settings"]["head_dim"] == head_dim


@pytest.mark.parametrize("dim, hidden", [(1408, 6144), (1664, 8192), (49, 48), (96, 41)])
def test_the_mlp_ratio_gives_the_very_width(finetuning, dim, hidden):
    assert int(dim * finetuning.mlp_ratio_of(hidden, dim)) == hidden


def test_a_run_from_a_file(tmp_path):
    small = torchvision.models.VisionTransformer(16, 4, 2, 2, 32, 64)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    run_notebook(model="towervit", initial_weights=str(tmp_path / "small.pth"), dims=None,
                 head_dim=16, image_size=8, batch_size=64, epochs=2, run="tuned")
    config = vit_helpers.read_run(vit_helpers.RUNS / "tuned")["config"]
    assert config["recipe"] == "finetune"
    assert config["in_channels"] == 3
    assert config["dims"] == [32, 32]
    assert config["patch_size"] == 4
    image = vit_helpers.load_notebook("02_data").load_data("digits").test.images[0]
    assert vit_helpers.predict("tuned", image)


# ---- timm's

def in_timms_names(tower):
    """The state dict of a TowerViT under timm's names."""
    channels, side = tower.image_shape[0], tower.patch_size
    weights = {}
    for name, value in tower.state_dict().items():
        for ours, theirs in (("class_token", "cls_token"), ("embed.", "patch_embed.proj."),
                             ("attention.qkv", "attn.qkv"), ("attention.out", "attn.proj"),
                             ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")):
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
            name = name.replace(f".{ours}", f".{theirs}")
        weights[name] = value
    kernel = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = kernel.view(len(kernel), channels, side, side)
    return weights


TIMM_SIZES = {
    "tiny at 224": dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "tiny at 64": dict(img_size=64, patch_size=16, embed_dim=192, depth=3, num_heads=3),
    "small at 32, patch 4": dict(img_size=32, patch_size=4, embed_dim=384, depth=2, num_heads=6),
    "huge": dict(img_size=28, patch_size=14, embed_dim=1280, depth=1, num_heads=16),
    "one channel": dict(img_size=28, patch_size=7, in_chans=1, embed_dim=64, depth=2, num_heads=2),
    "no class token": dict(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3,
                           class_token=False, global_pool="avg", fc_norm=False),
    "no biases": dict(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3,
                      qkv_bias=False, proj_bias=False),
    "ratio 48/11": dict(img_size=32, patch_size=8, embed_dim=1408, depth=1, num_heads=16,
                        mlp_ratio=48 / 11),
}


@pytest.fixture
def timm_vit():
    """Makes a ViT of timm's whose weights are all random, biases and tokens, too."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("timm.models")

    def make(**settings):
        torch.manual_seed(0)
        model = timm.models.vision_transformer.VisionTransformer(num_classes=10, **settings)
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            nn.init.normal_(parameter, std=scale)           # logits of about 1
        return model.eval()
    return make


@pytest.mark.parametrize("name", TIMM_SIZES)
def test_logits_equal_timms(models, finetuning, timm_vit, tmp_path, name):
    theirs = timm_vit(**TIMM_SIZES[name])
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    found = finetuning.read_weights(str(tmp_path / "timm.pt"))
    model = tower_of(models, found)
    finetuning.start_from(model, {**found, "classes": TEN}, TEN)        # so the head is kept
    size = TIMM_SIZES[name]["img_size"]
    images = torch.randn(4, found["in_channels"], size, size)
    difference = largest_difference(model, theirs, images)
    size = theirs(images).abs().max().item()
    print(f"{name}: largest difference {difference:.1e}, largest logit {size:.2f}")
    assert difference < 1e-4 * size


@pytest.mark.parametrize("settings, what", [
    (dict(reg_tokens=2), "register tokens"), (dict(init_values=1e-5), "layer scale"),
    (dict(pre_norm=True), "pre_norm"), (dict(no_embed_class=True), "no_embed_class"),
    (dict(qk_norm=True), "normalised queries"), (dict(global_pool="map"), "attention pooling"),
    (dict(global_pool="avg"), "a norm after the mean"), (dict(final_norm=False), "norm.weight"),
    (dict(pos_embed="none"), "pos_embed"), (dict(scale_mlp_norm=True), "within the MLP"),
    (dict(class_token=False, global_pool="avg"), "a norm after the mean")])
def test_what_timms_models_have_more_is_refused(finetuning, timm_vit, settings, what):
    theirs = timm_vit(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, **settings)
    with pytest.raises(ValueError, match=what):
        finetuning.read_foreign(theirs.state_dict(), "theirs.pt")


@pytest.mark.parametrize("layer", ["SwiGLU", "SwiGLUPacked", "GluMlp"])
def test_timms_gated_mlps_are_refused(finetuning, timm_vit, layer):
    layers = pytest.importorskip("timm.layers")
    theirs = timm_vit(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1,
                      mlp_layer=getattr(layers, layer))
    with pytest.raises(ValueError, match="gated MLP"):
        finetuning.read_foreign(theirs.state_dict(), "theirs.pt")


@pytest.fixture
def timm_names(models):
    """The state dict of a small TowerViT under timm's names."""
    torch.manual_seed(0)
    return in_timms_names(models.TowerViT(16, 4, dim=64, depth=2, head_dim=64, mlp_ratio=4))


@pytest.mark.parametrize("name, what", [
    ("reg_token", "register tokens"), ("dist_token", "a distillation token"),
    ("blocks.0.ls1.gamma", "layer scale"), ("norm_pre.weight", "a norm before the blocks"),
    ("blocks.0.mlp.fc1_g.weight", "gated MLP"), ("fc_norm.weight", "a norm after the mean"),
    ("attn_pool.latent", "attention pooling"), ("blocks.0.attn.q_bias", "blocks.0.attn.q_bias")])
def test_weights_that_we_cannot_express_are_refused(finetuning, timm_names, name, what):
    """Without timm: one name more is enough."""
    with pytest.raises(ValueError, match=f"theirs.pt have .*{what}.* cannot express; choose"):
        finetuning.read_foreign({**timm_names, name: torch.zeros(64)}, "theirs.pt")


def test_norms_without_biases_are_refused(finetuning, timm_names):
    """They are another function (RMSNorm), unlike a linear layer without a bias."""
    del timm_names["blocks.1.norm1.bias"]
    with pytest.raises(ValueError, match="lack blocks.1.norm1.bias"):
        finetuning.read_foreign(timm_names, "theirs.pt")


def test_linear_layers_without_biases_have_zeros(finetuning, timm_names):
    del timm_names["blocks.1.attn.qkv.bias"]
    weights = finetuning.read_foreign(timm_names, "theirs.pt")["weights"]
    assert torch.equal(weights["blocks.1.attention.qkv.bias"], torch.zeros(192))


def test_weights_without_a_head_start_a_model(models, finetuning, timm_names):
    del timm_names["head.weight"], timm_names["head.bias"]
    found = finetuning.read_foreign(timm_names, "theirs.pt")
    model = tower_of(models, found, num_classes=7)
    finetuning.start_from(model, found)
    assert not model.head.weight.any()


# ---- runs of one's own

@pytest.fixture
def published(finetuning):
    return finetuning.read_weights(PUBLISHED)


def model_like(found, **changes):
    """A fresh model of the shape of a run."""
    config = found["config"]
    return vit_helpers.build_model({**config, "seed": 7,
                                    "model_settings": {**config["model_settings"], **changes}})


@pytest.mark.parametrize("name", ["vit", "towervit", "towervit-wide", "towervit-matched"])
def test_a_run_goes_on_with_its_own_head(finetuning, digits, name):
    run = f"published/digits-seed0-{name}"
    found = finetuning.read_weights(run)
    assert found["settings"]["model"] == name
    assert found["config"]["recipe"] == "sgd"
    model = model_like(found)
    finetuning.start_from(model, found, digits.classes)
    images = digits.normalise(digits.test.images)
    assert largest_difference(model, vit_helpers.load_model(run), images) == 0


def test_other_classes_get_a_head_of_zeros(finetuning, published, digits):
    model = model_like(published, num_classes=2)
    finetuning.start_from(model, published, ["no loop", "loop"])
    assert not model.head.weight.any()
    images = digits.normalise(digits.test.images[:8])
    _, seen = model.eval()(images, return_intermediates=True)
    _, expected = vit_helpers.load_model(PUBLISHED)(images, return_intermediates=True)
    assert torch.equal(seen["features"], expected["features"])


def test_the_same_classes_in_another_order_get_a_head_of_zeros(finetuning, published):
    model = model_like(published)
    finetuning.start_from(model, published, TEN[::-1])
    assert not model.head.weight.any()


def test_a_run_goes_on_at_another_image_size(finetuning, published):
    model = model_like(published, image_size=16)
    finetuning.start_from(model, published, TEN)
    weights = published["weights"]
    assert torch.equal(model.pos_embed, finetuning.resize_pos_embed(weights["pos_embed"], 8))
    assert torch.equal(model.head.weight, weights["head.weight"])


@pytest.mark.parametrize("changes", [dict(merge_at=(2,)), dict(pool="mean"),
                                     dict(stem="conv", patch_size=4, image_size=16)])
def test_merging_models_mean_pooling_and_stems_go_on(finetuning, published, tmp_path, changes):
    model = model_like(published, **changes)
    config = {**published["config"], "merge_at": [], "stem": "patch", **changes,
              "model_settings": {**published["config"]["model_settings"], **changes}}
    vit_helpers.save(tmp_path / "best.pt", {"model": model.state_dict(), "config": config})
    found = finetuning.read_weights(str(tmp_path / "best.pt"))
    other = model_like(found)
    finetuning.start_from(other, found, TEN)
    images = torch.randn(4, *model.image_shape)
    assert largest_difference(model, other, images) == 0


def test_weights_of_another_shape_name_the_way_out(finetuning, published):
    with pytest.raises(ValueError, match="run published/digits-seed0-vit, a vit of widths "
                                         "48,64,80,112; they do not fit .* add -p model vit"):
        finetuning.start_from(model_like(published, dims=(48, 64, 80, 80)), published)


def test_a_model_for_other_channels_is_refused(finetuning, published):
    with pytest.raises(ValueError, match="images of 1 channel.* 3; load the data with channels=1"):
        finetuning.start_from(model_like(published, in_channels=3), published)


@pytest.mark.parametrize("changes", [dict(pool="mean"), dict(stem="conv", patch_size=4,
                                                             image_size=16)])
def test_a_model_with_other_parts_is_refused(finetuning, published, changes):
    with pytest.raises(ValueError, match="they do not fit this ViT, whose .* add -p model"):
        finetuning.start_from(model_like(published, **changes), published)


def test_a_run_that_goes_on_begins_where_the_other_ended():
    """With a learning rate of 0 its validation loss is that of the published run."""
    run_notebook(initial_weights=PUBLISHED, dims=None, head_dim=None, epochs=1, learning_rate=0.0,
                 run="from-published")
    run = vit_helpers.read_run(vit_helpers.RUNS / "from-published")
    before = vit_helpers.read_run(vit_helpers.ROOT / "runs" / PUBLISHED)["results"]
    assert run["config"]["recipe"] == "sgd"
    assert run["results"]["val_loss"] == pytest.approx(before["val_loss"], rel=1e-2)
    assert run["results"]["test_accuracy"] == pytest.approx(before["test_accuracy"], abs=0.006)


# ---- parameters beside such weights

def asked(**changes):
    return {**vit_helpers.default_parameters(), **changes}


def test_a_runs_shape_need_not_be_given(finetuning, published):
    fitted = finetuning.fit_parameters(asked(), published)
    assert fitted["dims"] == "48,64,80,112"
    assert (fitted["patch_size"], fitted["head_dim"], fitted["pool"]) == (2, 16, "cls")
    assert fitted["recipe"] is None                             # not theirs to say


def test_the_image_size_may_change_and_the_rest_be_said_again(finetuning, published):
    said = asked(image_size=16, dims="48, 64, 80, 112", patch_size=2, mlp_ratio=2.0)
    fitted = finetuning.fit_parameters(said, published)
    assert fitted["image_size"] == 16
    assert fitted["dims"] == "48,64,80,112"


@pytest.mark.parametrize("changes, message", [
    (dict(model="towervit"), "model is 'towervit', but .* a vit of .*; add -p model vit$"),
    (dict(dims="32,32"), "dims is '32,32', .* leave dims out"),
    (dict(merge_at="2"), "merge_at is '2', .* leave merge_at out"),
    (dict(stem="conv"), "stem is 'conv', .* leave stem out"),
    (dict(pool="mean"), "pool is 'mean', .* leave pool out"),
    (dict(seed=1), "seed is 1, .* with seed 0: .* add -p seed 0"),
    (dict(val_fraction=0.2), "val_fraction is 0.2, .* add -p val_fraction 0.1")])
def test_parameters_that_contradict_a_run_are_refused(finetuning, published, changes, message):
    with pytest.raises(ValueError, match=message):
        finetuning.fit_parameters(asked(**changes), published)


def test_on_other_data_the_seed_is_free(finetuning, published):
    fitted = finetuning.fit_parameters(asked(dataset="mnist", seed=1), published)
    assert fitted["seed"] == 1


def test_a_run_on_a_folder_is_known_by_where_it_lies(finetuning, published, tmp_path, monkeypatch):
    config = {**published["config"], "dataset": "images", "folder": str(tmp_path / "images")}
    (tmp_path / "images").mkdir()
    monkeypatch.setenv("VIT_CWD", str(tmp_path))
    found = {**published, "config": config}
    for folder in ("./images", "./images/train", "."):      # in it and around it are its images
        with pytest.raises(ValueError, match="add -p seed 0"):
            finetuning.fit_parameters(asked(dataset=folder, seed=1), found)
    (tmp_path / "other").mkdir()
    assert finetuning.fit_parameters(asked(dataset="./other", seed=1), found)["seed"] == 1


def test_a_folder_that_was_moved_or_has_grown_since(finetuning, published, datasets, tmp_path):
    """Moved, it must be split as before; with more images, a note says what its accuracy is."""
    numbers = torch.Generator().manual_seed(0)
    for label in ("a", "b"):
        (tmp_path / "old" / label).mkdir(parents=True)
        for i in range(20):
            pixels = torch.randint(0, 256, (8, 8), generator=numbers).byte().numpy()
            Image.fromarray(pixels).save(tmp_path / "old" / label / f"{i}.png")
    data = datasets.load_data(str(tmp_path / "old"), 8)
    config = {"dataset": "old", "folder": str(tmp_path / "old"), "classes": data.classes,
              "images": [len(data.train), len(data.val), len(data.test)], "mean": data.mean,
              "seed": 0, "val_fraction": 0.1}
    found = {**published, "config": config}
    (tmp_path / "old").rename(tmp_path / "new")
    for seed in (0, 1):
        given = asked(dataset=str(tmp_path / "new"), seed=seed)
        data = datasets.load_data(given["dataset"], 8, seed=seed)
        if seed == 0:
            finetuning.check_images(found, given, data)
    with pytest.raises(ValueError, match="add -p seed 0"):
        finetuning.check_images(found, given, data)
    assert data.notes == []
    (tmp_path / "new" / "a" / "19.png").unlink()
    found["config"] = {**config, "folder": str(tmp_path / "new")}
    data = datasets.load_data(given["dataset"], 8)
    finetuning.check_images(found, given, data)
    assert data.notes[-1].startswith("39 images are there, 40 when the weights of run ")


def test_a_folder_with_validation_images_of_its_own_may_have_any_seed(finetuning, published,
                                                                     tmp_path):
    config = {**published["config"], "folder": str(tmp_path), "val_drawn": False}
    for dataset in (str(tmp_path), "mnist"):
        fitted = finetuning.fit_parameters(asked(dataset=dataset, seed=1),
                                           {**published, "config": config})
        assert (fitted["seed"], fitted["val_fraction"]) == (1, None)


def test_a_tower_of_any_name_may_be_called_towervit(finetuning):
    """The width of towervit-matched depends on the number of classes; said so, it does not."""
    found = finetuning.read_weights("published/digits-seed0-towervit-matched")
    fitted = finetuning.fit_parameters(asked(model="towervit"), found)
    assert fitted["dims"] == "80,80,80,80"
    with pytest.raises(ValueError, match="a towervit-matched of 4 blocks of width 80; "
                                         "add -p model towervit-matched"):
        finetuning.fit_parameters(asked(model="vit"), found)


def test_a_growing_vit_cannot_start_from_a_towers_weights(finetuning, timm_names):
    found = finetuning.read_foreign(timm_names, "timm.pt")
    with pytest.raises(ValueError, match="a towervit of 2 blocks of width 64; "
                                         "add -p model towervit"):
        finetuning.fit_parameters(asked(model="vit"), found)


@pytest.mark.parametrize("changes", [dict(merge_at="2"), dict(stem="conv"), dict(pool="mean"),
                                     dict(patch_size=8), dict(dims="32,32")])
def test_parameters_that_contradict_foreign_weights_are_refused(finetuning, timm_names, changes):
    found = finetuning.read_foreign(timm_names, "timm.pt")
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name} is .* leave {name} out"):
        finetuning.fit_parameters(asked(model="towervit", **changes), found)


def test_the_number_of_heads_can_be_given_and_must_be_where_it_is_unknown(finetuning, models):
    tower = models.TowerViT(16, 4, dim=40, depth=1, head_dim=8, mlp_ratio=4)
    found = finetuning.read_foreign(in_timms_names(tower), "timm.pt")
    with pytest.raises(ValueError, match="add -p head_dim"):
        finetuning.fit_parameters(asked(model="towervit"), found)
    fitted = finetuning.fit_parameters(asked(model="towervit", head_dim=8), found)
    assert fitted["head_dim"] == 8


# ---- files

@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema"])
def test_state_dicts_inside_training_checkpoints(finetuning, timm_names, tmp_path, key):
    inside = {f"module.{name}": value for name, value in timm_names.items()}
    torch.save({"epoch": 3, "arch": "vit", key: inside}, tmp_path / "timm.pth")
    found = finetuning.read_weights(str(tmp_path / "timm.pth"))
    assert torch.equal(found["weights"]["pos_embed"], timm_names["pos_embed"])


def test_weights_as_averaged_by_torch_and_compiled(finetuning, timm_names, tmp_path):
    inside = {f"module._orig_mod.{name}": value for name, value in timm_names.items()}
    torch.save({"model_ema": {"n_averaged": torch.tensor(7), **inside}}, tmp_path / "timm.pth")
    found = finetuning.read_weights(str(tmp_path / "timm.pth"))
    assert torch.equal(found["weights"]["pos_embed"], timm_names["pos_embed"])


def test_our_own_weights_without_their_settings_name_the_way_out(finetuning, published, tmp_path):
    torch.save({"settings": {}, "model": published["weights"]}, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="mine.pt are weights of this suite without the settings"):
        finetuning.read_weights(str(tmp_path / "mine.pt"))


def test_safetensors(finetuning, timm_names, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(timm_names, tmp_path / "timm.safetensors")
    found = finetuning.read_weights(str(tmp_path / "timm.safetensors"))
    assert torch.equal(found["weights"]["head.weight"], timm_names["head.weight"])


def test_weights_in_half_precision(finetuning, timm_names):
    half = {name: value.half() for name, value in timm_names.items()}
    weights = finetuning.read_foreign(finetuning.unwrap(half, "half"), "half")["weights"]
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_a_path_is_taken_from_where_the_command_was_typed(finetuning, timm_names, tmp_path,
                                                          monkeypatch):
    torch.save(timm_names, tmp_path / "timm.pt")
    monkeypatch.setenv("VIT_CWD", str(tmp_path))
    assert finetuning.read_weights("timm.pt")["source"] == str(tmp_path / "timm.pt")


@pytest.mark.parametrize("source", [f"runs/{PUBLISHED}", f"saved_models/{PUBLISHED}/",
                                    str(vit_helpers.ROOT / "saved_models" / PUBLISHED / "best.pt")])
def test_a_run_by_the_paths_that_a_shell_completes(finetuning, source):
    assert finetuning.read_weights(source)["source"] == f"run {PUBLISHED}"


def test_what_is_nowhere_names_the_path_and_near_runs(finetuning, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_CWD", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        finetuning.read_weights("published/digits-seed0-vti")
    said = str(caught.value)
    assert f"no file {tmp_path}/published/digits-seed0-vti" in said
    assert "near it: published/digits-seed0-vit" in said
    assert "vit_b_16, vit_b_32" in said


@pytest.mark.parametrize("content, message", [
    (b"no weights", "cannot be read from .*weights.pt"), (b"", "cannot be read"),
    ({"a": 1}, "hold no state dict"), ([1, 2], "hold no state dict"), ({}, "hold no state dict"),
    ({"conv1.weight": torch.zeros(2)}, "are not those of a ViT"),
    ({"conv_proj.weight": torch.zeros(4, 3, 2, 2)}, "are not those of a ViT"),
    ({"model": {"conv1.weight": torch.zeros(2)}, "config": {"lr": 0.1}}, "are not those of a ViT"),
    (nn.Linear(2, 2), "cannot be read from .* and no code")])
def test_files_without_such_weights_are_refused(finetuning, tmp_path, content, message):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        finetuning.read_weights(str(path))
