"""Fine-tuning a TowerViT from torchvision's weights (random ones: tests download nothing)."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
import vit_helpers
from jobs import train_job
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings


@pytest.fixture(scope="module")
def training():
    return vit_helpers.load_notebook("06_run")


@pytest.fixture(scope="module")
def vit_b_16():
    """torchvision's ViT-B/16 with 10 classes and random weights; its own fresh head would be zero."""
    torch.manual_seed(0)
    theirs = torchvision.models.vit_b_16(num_classes=10)
    nn.init.normal_(theirs.heads.head.weight, std=0.1)
    nn.init.normal_(theirs.encoder.pos_embedding, std=0.5)
    return theirs


def ours(models, training, weights, **changes):
    settings = training.settings_of(weights)
    kept = {name: settings[name] for name in ("image_size", "patch_size", "depth", "head_dim", "mlp_ratio", "pool")}
    model = models.TowerViT(in_channels=3, num_classes=10, dim=int(settings["dims"].split(",")[0]), **{**kept, **changes})
    training.start_from(model, weights)
    return model


def test_logits_and_the_loss_after_a_step_equal_torchvisions(models, training, vit_b_16):
    model = ours(models, training, vit_b_16.state_dict())
    assert vit_helpers.count_parameters(model) == vit_helpers.count_parameters(vit_b_16) and not model.head.weight.any()
    model.head.load_state_dict(vit_b_16.heads.head.state_dict())
    pictures, labels = torch.randint(256, (4, 3, 224, 224), dtype=torch.uint8), torch.arange(4)
    settings = {**vit_helpers.resolve({**vit_helpers.default_parameters(), "model": "towervit", "initial_weights": "vit_b_16"}), "augment": "none",
                "precision": "fp32"}
    assert settings["recipe"] == "finetune" and settings["momentum"] == 0.9 and settings["weight_decay"] == 0
    data = vit_helpers.Data(*[vit_helpers.Split(pictures, labels)] * 3, range(10))
    images = data.normalise(pictures)
    with torch.no_grad():
        assert (model.eval()(images) - vit_b_16.eval()(images)).abs().max() < 1e-5
    rate = settings["learning_rate"]
    vit_helpers.train_step(model.train(), vit_helpers.make_optimizer(model, settings), pictures, labels, data, settings, {"epoch": 0, "step": 0}, 4)
    optimizer = torch.optim.SGD(vit_b_16.train().parameters(), lr=rate, momentum=0.9)
    F.cross_entropy(vit_b_16(images), labels).backward()
    nn.utils.clip_grad_norm_(vit_b_16.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        after = [F.cross_entropy(network.eval()(images), labels).item() for network in (model, vit_b_16)]
    print(f"loss after a step: ours {after[0]:.6f}, torchvision's {after[1]:.6f}")
    assert after[0] == pytest.approx(after[1], abs=1e-4)


def test_resized_positions_equal_torchvisions(models, training, vit_b_16):
    weights = vit_b_16.state_dict()
    for size in (128, 224, 384):
        expected = interpolate_embeddings(size, 16, weights.copy())["encoder.pos_embedding"]
        assert torch.equal(ours(models, training, weights, image_size=size).positions, expected)


def test_the_names_of_torchvisions_files_are_known(models, training, vit_b_16):
    """Its downloads still call the layers of the MLP linear_1 and linear_2."""
    old = {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value for name, value in vit_b_16.state_dict().items()}
    assert any("linear_1" in name for name in old)
    for a, b in zip(ours(models, training, old).parameters(), ours(models, training, vit_b_16.state_dict()).parameters()):
        assert torch.equal(a, b)


def test_a_run_from_a_file(tmp_path):
    small = torchvision.models.VisionTransformer(16, 4, 2, 2, 32, 64)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    given = ["-p", "model", "towervit", "-r", "initial_weights", str(tmp_path / "small.pth"), "-p", "head_dim", "16", "-p", "image_size", "8", "-p", "batch_size", "64",
             "-p", "epochs", "2", "-r", "run", "tuned"]
    shown = train_job(*given)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    config = vit_helpers.read_run(vit_helpers.RUNS / "tuned")["config"]
    assert config["recipe"] == "finetune" and config["in_channels"] == 3 and config["dims"] == [32, 32] and config["patch_size"] == 4
    assert vit_helpers.predict("tuned", vit_helpers.load_data("digits").test.pictures[0])


def test_a_growing_vit_cannot_start_from_a_towers_weights():
    with pytest.raises(ValueError, match="add -p model towervit"):
        vit_helpers.resolve({**vit_helpers.default_parameters(), "model": "vit", "initial_weights": "vit_b_16"})


def test_files_without_such_weights_are_refused(training, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nothing.pth, and torchvision's ViTs are vit_b_16, vit_b_32"):
        training.torchvision_weights(str(tmp_path / "nothing.pth"))
    with pytest.raises(ValueError, match="not those of a torchvision ViT"):
        training.settings_of({"conv_proj.weight": torch.zeros(4, 3, 2, 2)})
