"""08_inside.ipynb: its measures on hand-made cases, and the whole notebook on an RGB mean-pooled TowerViT with long class names."""
import json
import math

import nbformat
import numpy as np
import papermill
import pytest
import torch
import torch.nn.functional as F
import vit_helpers
from PIL import Image


@pytest.fixture(scope="module")
def inside():
    return vit_helpers.load_notebook("08_inside")


@pytest.fixture(params=["cls", "mean"])
def grey_vit(models, request):
    torch.manual_seed(0)
    return models.ViT(8, 2, 1, 10, dims=(16, 32, 48), head_dim=16, pool=request.param, position_std=2.0).eval()


@pytest.fixture
def rgb_tower(models):
    torch.manual_seed(0)
    return models.TowerViT(12, 4, 3, 5, dim=32, depth=3, head_dim=8, pool="mean", position_std=2.0).eval()


# ---- where it looks

@torch.no_grad()
def test_rollout_is_the_matrix_product(inside, grey_vit):
    attention = grey_vit(torch.randn(3, 1, 8, 8), return_intermediates=True)[1]["attention"]
    eye = np.eye(attention[0].shape[-1])
    first, second, third = (0.5 * weights.numpy().mean(1) + 0.5 * eye for weights in attention)
    rollout = inside.attention_rollout(attention)
    assert torch.allclose(rollout.sum(-1), torch.ones(()), atol=1e-6)
    np.testing.assert_allclose(inside.attention_rollout(attention[:1]), first, atol=1e-6)
    np.testing.assert_allclose(rollout, third @ second @ first, atol=1e-6)
    assert np.abs(third @ second @ first - first @ second @ third).max() > 1e-3        # the order can be told apart


@torch.no_grad()
def test_attention_from_the_answer_and_from_a_patch(inside, grey_vit):
    weights = grey_vit(torch.randn(3, 1, 8, 8), return_intermediates=True)[1]["attention"][-1]
    answer, patch = (inside.attention_from(weights, grey_vit.pool, start) for start in (0, 5))
    assert answer.shape == patch.shape == (3, 3, 16) and torch.allclose(answer.sum(-1), torch.ones(()), atol=1e-6)
    if grey_vit.pool == "mean":
        torch.testing.assert_close(answer, weights.mean(-2))
        torch.testing.assert_close(patch, weights[..., 4, :])       # patch 5 is the fifth row
    else:
        torch.testing.assert_close(answer, weights[..., 0, 1:] / (1 - weights[..., 0, :1]))
        torch.testing.assert_close(patch, weights[..., 5, 1:] / (1 - weights[..., 5, :1]))


def test_attention_distance_by_hand(inside):
    places = [(2.0 * row, 2.0 * column) for row in range(4) for column in range(4)]     # patches of 2 pixels
    apart = np.array([[math.dist(a, b) for b in places] for a in places])
    itself, even, corner = torch.eye(16), torch.full((16, 16), 1 / 16), F.one_hot(torch.zeros(16).long(), 16).float()
    heads = torch.stack([itself, even, corner])[None].repeat(2, 1, 1, 1)                # (B, heads, N, N)
    expected = [0, apart.mean(), apart[0].mean()]
    assert inside.attention_distance(heads, 2, "mean").tolist() == pytest.approx(expected, abs=1e-5)
    with_class = F.pad(heads * 0.3, (1, 0, 1, 0), value=0.7)                            # most of the attention on the class token: no matter
    assert inside.attention_distance(with_class, 2, "cls").tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_covering_a_patch(inside, rgb_tower):
    images, average = torch.randn(2, 3, 12, 12), torch.randn(3, 12, 12)
    falls = inside.cover_patches(rgb_tower, images, average)
    covered = images.clone()
    covered[:, :, 4:8, 8:12] = average[:, 4:8, 8:12]                                    # patch 5 of 0 to 8: row 1, column 2
    before, after = rgb_tower(images).log_softmax(1), rgb_tower(covered).log_softmax(1)
    answers = before.argmax(1)
    torch.testing.assert_close(falls[:, 5], (before - after)[range(2), answers])
    assert falls.shape == (2, 9) and inside.cover_patches(rgb_tower, images[:1], images[0]).abs().max() < 1e-5


# ---- what is in the weights and the tokens

def test_filter_components_find_what_was_planted(inside):
    red, edge = torch.zeros(3, 2, 2), torch.tensor([[1.0, 1], [-1, -1]]).expand(3, 2, 2) / 12 ** 0.5
    red[0] = 0.5
    weight = torch.randn(64, 1) * 3 * red.flatten() + torch.randn(64, 1) * edge.flatten()
    components, shares = inside.filter_components(weight, channels=3)
    assert components.shape == (12, 3, 2, 2) and shares[:2].sum() > 0.999 and shares[0] > shares[1]
    assert (components[0] * red).sum().abs() > 0.95 and (components[1] * edge).sum().abs() > 0.95


def test_position_similarity(inside, rgb_tower):
    similarity = inside.position_similarity(torch.tensor([[1.0, 0], [0, 2], [-3, 0], [1, 1]]))
    assert similarity[0].tolist() == pytest.approx([1, 0, -1, 0.5 ** 0.5], abs=1e-6)
    assert inside.position_similarity(rgb_tower.positions[0]).shape == (9, 9)


@torch.no_grad()
def test_states_and_what_the_head_says_of_them(inside, grey_vit, rgb_tower):
    for model, images in ((grey_vit, torch.randn(7, 1, 8, 8)), (rgb_tower, torch.randn(7, 3, 12, 12))):
        states = inside.pooled_states(model, images.split(3))
        assert list(states) == ["mean of the patches", "class token"][:1 + (model.pool == "cls")]
        seen = model(images, return_intermediates=True)[1]
        torch.testing.assert_close(states["mean of the patches"][1], seen["tokens"][1][:, model.pool == "cls":].mean(1))
        answers = inside.head_answers(model, images)
        assert torch.equal(answers[-1], model(images).argmax(1))
        assert [answer is None for answer in answers] == [tokens.shape[-1] != seen["tokens"][-1].shape[-1] for tokens in seen["tokens"]]


@torch.no_grad()
def test_covariances_are_of_the_tokens_that_matter(inside, grey_vit, rgb_tower):
    for model, images in ((grey_vit, torch.randn(7, 1, 8, 8)), (rgb_tower, torch.randn(7, 3, 12, 12))):
        tokens = model(images, return_intermediates=True)[1]["tokens"]
        tokens[-1] = tokens[-1][:, :1] if model.pool == "cls" else tokens[-1]
        for found, vectors in zip(inside.covariances(model, images.split(3)), tokens):
            torch.testing.assert_close(found, vectors.flatten(0, 1).double().T.cov(correction=0), atol=1e-6, rtol=1e-5)


def test_rank_and_new_room(inside):
    shares = inside.spectrum(torch.diag(torch.tensor([0.0, 2, 2, 2, 0])).double())
    assert shares.tolist() == pytest.approx([1 / 3] * 3 + [0] * 2) and inside.effective_rank(shares) == pytest.approx(3)
    projection = torch.randn(12, 8)                                                     # a block that grows from 8 to 12
    assert inside.share_in_new_room(projection.double() @ projection.double().T, projection) == pytest.approx(0, abs=1e-6)
    assert inside.share_in_new_room(torch.eye(12).double(), projection) == pytest.approx(4 / 12)


def test_linear_probe(inside):
    labels = torch.arange(300) % 3
    telling = F.one_hot(labels, 3) + 0.1 * torch.randn(300, 3)
    assert inside.linear_probe(telling[:200], labels[:200], telling[200:], labels[200:], 3) == 1
    same = torch.ones(300, 4)                                                           # a class token before the first block
    assert inside.linear_probe(same[:200], labels[:200], same[200:], labels[200:], 3) == pytest.approx(1 / 3, abs=0.01)


# ---- does it know how sure it may be

def test_calibration_by_hand(inside):
    sure = lambda confidence: [math.log(confidence), math.log(1 - confidence)]
    error, rows = inside.calibration(torch.tensor([sure(0.75)] * 4), torch.tensor([0, 0, 0, 1]))
    assert error == pytest.approx(0, abs=1e-6) and rows.tolist() == [pytest.approx([0.75, 0.75, 1], abs=1e-6)]
    logits = torch.tensor([sure(0.75)] * 4 + [sure(0.95)] * 12)
    error, rows = inside.calibration(logits, torch.tensor([0, 0, 1, 1] + [0] * 6 + [1] * 6))
    assert error == pytest.approx(0.25 * 0.25 + 0.75 * 0.45, abs=1e-6)
    assert rows.tolist() == [pytest.approx([0.75, 0.5, 0.25], abs=1e-6), pytest.approx([0.95, 0.5, 0.75], abs=1e-6)]
    assert inside.calibration(torch.tensor([[50.0, 0]]), torch.tensor([1]))[0] == pytest.approx(1)        # certain and wrong


# ---- the whole notebook

AFTERWARDS = """
from datetime import datetime, timezone
before = screen.value
sliders["block"].value = 1
assert screen.value != before and sliders["head"].max == models[first].blocks[0].attention.qkv.out_features // 3 // config["head_dim"]
before = screen.value
sliders["start"].value = 2
assert screen.value != before

def give(name, content):
    upload.value = ({"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": datetime.now(timezone.utc)},)

buffer = io.BytesIO()
Image.new("CMYK", (50, 31), (200, 10, 90, 0)).save(buffer, format="JPEG")
before = result.value
give("photo.jpg", buffer.getvalue())
assert result.value != before and trouble.value == ""
before = result.value
invert.value = True
assert result.value != before
give("letter.png", b"Dear reader")
assert "letter.png cannot be read as a picture" in trouble.value
"""


def execute(path, cwd=vit_helpers.NOTEBOOKS, **parameters):
    return papermill.execute_notebook(path, None, parameters=parameters, kernel_name="python3", cwd=cwd, progress_bar=False)


@pytest.fixture(scope="module")
def pooled_run(tmp_path_factory):
    """A short run of a mean-pooled TowerViT on a folder of colour pictures whose classes have long names."""
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, color in (("a class whose name would not fit any axis", (220, 30, 30)), ("blue/green".replace("/", " or "), (20, 90, 200)), ("c", (240, 240, 60))):
        (folder / name).mkdir()
        for i in range(20):
            Image.fromarray(np.clip(draws.normal(color, 40, (20, 26, 3)), 0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    execute(vit_helpers.NOTEBOOKS / "06_run.ipynb", dataset=str(folder), model="towervit", pool="mean", image_size=12, patch_size=4, dims="16,24",
            head_dim=8, epochs=2, batch_size=16, run="pooled")
    return "pooled"


def test_notebook_on_an_rgb_mean_pooled_tower(pooled_run, tmp_path):
    notebook = nbformat.read(vit_helpers.NOTEBOOKS / "08_inside.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell(AFTERWARDS))
    nbformat.write(notebook, tmp_path / "04.ipynb")
    done = execute(tmp_path / "04.ipynb", run=pooled_run, compare_with="", output=str(tmp_path / "out"))
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = json.dumps([output for output in outputs if output.output_type != "display_data" or "image/png" not in output.data])
    assert str(tmp_path) not in shown and str(vit_helpers.ROOT) not in shown
    pictures = {path.stem.partition("-inside-")[2] for path in (tmp_path / "out" / "img").glob("*.png")}
    assert pictures >= {"filters", "positions", "distance", "attention", "probe", "widths", "confusion", "calibration"}
    assert len([output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]) == 2
