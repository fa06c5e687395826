"""08_inside.ipynb: its measures on hand-made cases, and the whole notebook on a merging tower.

The tower is mean-pooled, its images are in colour and its classes have long names.
"""
import io
import json
import math
import re
from datetime import datetime, timezone
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vit_helpers
from jobs import NO_KERNEL, run_notebook

SCREEN = 95         # letters that fit into a line of text output in JupyterLab at 1440 pixels


@pytest.fixture(scope="module")
def inside():
    return vit_helpers.load_notebook("08_inside")


@pytest.fixture(params=["cls", "mean"])
def grey_vit(models, request):
    torch.manual_seed(0)
    return models.ViT(8, 2, 1, 10, dims=(16, 32, 48), head_dim=16, pool=request.param,
                      pos_embed_std=2.0).eval()


@pytest.fixture
def rgb_tower(models):
    torch.manual_seed(0)
    return models.TowerViT(12, 4, 3, 5, dim=32, depth=3, head_dim=8, pool="mean",
                           pos_embed_std=2.0).eval()


def with_registers(models, **settings):
    """A ViT with two more tokens between the class token and the patches: a model of a kind that
    the notebook has never seen."""
    class Registers(models.ViT):
        def __init__(self):
            super().__init__(8, 1, 1, 10, dims=(16, 16, 32, 32), head_dim=8, pos_embed_std=2.0,
                             **settings)
            self.registers = torch.nn.Parameter(torch.randn(1, 2, 16))
            self.num_prefix_tokens += 2

        def embed_images(self, images):
            x, prefix = super().embed_images(images), self.num_prefix_tokens - 2
            registers = self.registers.expand(x.shape[0], -1, -1)
            return torch.cat([x[:, :prefix], registers, x[:, prefix:]], dim=1)

    return Registers().eval()


@pytest.fixture(params=["cls", "mean", "cls and registers", "mean and registers"])
def merging(models, request):
    """A model of grids 8 -> 8, 8, 4, 2, with 0 to 3 tokens before the patches."""
    torch.manual_seed(0)
    pool, _, more = request.param.partition(" and ")
    if more:
        return with_registers(models, pool=pool, merge_at=(3, 4))
    return models.ViT(8, 1, 1, 10, dims=(16, 16, 32, 32), head_dim=8, pool=pool, merge_at=(3, 4),
                      pos_embed_std=2.0).eval()


@torch.no_grad()
def intermediates(model, number=3):
    """(images, what happened to them)."""
    images = torch.randn(number, *model.image_shape)
    return images, model(images, return_intermediates=True)[1]


# ---- where it looks

def test_rollout_is_the_matrix_product(inside, grey_vit):
    attention = intermediates(grey_vit)[1]["attention"]
    grids, prefix = grey_vit.grids, grey_vit.num_prefix_tokens
    eye = np.eye(attention[0].shape[-1])
    first, second, third = (0.5 * weights.numpy().mean(1) + 0.5 * eye for weights in attention)
    rollout = inside.attention_rollout(attention, grids, prefix)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(rollout.shape[:2]))
    np.testing.assert_allclose(rollout, third @ second @ first, atol=1e-6)
    assert np.abs(third @ second @ first - first @ second @ third).max() > 1e-3     # order matters
    alone = inside.attention_rollout(attention[:1], grids[:2], prefix)
    np.testing.assert_allclose(alone, first, atol=1e-6)


def test_merging_matrix_by_hand(inside):
    by_hand = torch.zeros(2 + 4, 2 + 16)                    # two prefix tokens, 4 x 4 -> 2 x 2
    by_hand[0, 0] = by_hand[1, 1] = 1
    for row in range(4):
        for column in range(4):
            by_hand[2 + 2 * (row // 2) + column // 2, 2 + 4 * row + column] = 1 / 4
    torch.testing.assert_close(inside.merging_matrix(4, 2, 2), by_hand)
    torch.testing.assert_close(inside.merging_matrix(3, 3, 1), torch.eye(10))
    torch.testing.assert_close(inside.merging_matrix(8, 2, 0),
                               inside.merging_matrix(4, 2, 0) @ inside.merging_matrix(8, 4, 0))


@torch.no_grad()
def test_merging_matrix_is_what_the_model_does(inside, merging):
    for block in merging.blocks:                            # only the skip path is left
        for layer in (block.attention.out, block.mlp[3]):
            torch.nn.init.zeros_(layer.weight)
    tokens = intermediates(merging)[1]["tokens"]
    for number, block in enumerate(merging.blocks, 1):
        side, smaller = merging.grids[number - 1:number + 1]
        matrix = inside.merging_matrix(side, smaller, merging.num_prefix_tokens)
        torch.testing.assert_close(tokens[number], block.project(matrix @ tokens[number - 1]))


def test_rollout_ends_at_the_patches_of_the_image(inside, merging):
    attention = intermediates(merging)[1]["attention"]
    prefix = merging.num_prefix_tokens
    assert merging.grids == (8, 8, 8, 4, 2)
    rollout = inside.attention_rollout(attention, merging.grids, prefix)
    assert rollout.shape == (3, prefix + 4, prefix + 64)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(3, prefix + 4))

    expected = torch.eye(prefix + 64)
    merges = {3: inside.merging_matrix(8, 4, prefix), 4: inside.merging_matrix(4, 2, prefix)}
    for number, weights in enumerate(attention, 1):
        if number in merges:
            expected = merges[number] @ expected
        expected = (weights.mean(1) + torch.eye(weights.shape[-1])) / 2 @ expected
    torch.testing.assert_close(rollout, expected)


def test_rollout_spreads_a_merged_token_over_its_patches(inside):
    still = torch.eye(4).expand(1, 2, 4, 4)                 # attention of each token to itself
    rollout = inside.attention_rollout([still], (4, 2), 0)[0]
    top_left = [1 / 4, 1 / 4, 0, 0] * 2 + [0] * 8
    assert rollout[0].tolist() == pytest.approx(top_left)


def test_attention_from_the_answer_and_from_a_patch(inside, grey_vit):
    weights = intermediates(grey_vit)[1]["attention"][-1]
    answer, patch = (inside.attention_from(grey_vit, weights, start) for start in (0, 5))
    assert answer.shape == patch.shape == (3, 3, 16)
    torch.testing.assert_close(answer.sum(-1), torch.ones(3, 3))
    if grey_vit.pool == "mean":
        torch.testing.assert_close(answer, weights.mean(-2))
        torch.testing.assert_close(patch, weights[..., 4, :])       # patch 5 is the fifth row
    else:
        torch.testing.assert_close(answer, weights[..., 0, 1:] / (1 - weights[..., 0, :1]))
        torch.testing.assert_close(patch, weights[..., 5, 1:] / (1 - weights[..., 5, :1]))
    torch.testing.assert_close(inside.attention_from(grey_vit, weights[0, 1]), answer[0, 1])


def test_attention_from_leaves_out_all_prefix_tokens(inside, merging):
    attention = intermediates(merging)[1]["attention"]
    prefix = merging.num_prefix_tokens
    for weights, side in zip(attention, merging.grids[1:], strict=True):
        answer, last = (inside.attention_from(merging, weights, start) for start in (0, side ** 2))
        rows = weights[:, :, :1] if merging.pool == "cls" else weights[:, :, prefix:]
        expected = rows.mean(-2)[..., prefix:]
        torch.testing.assert_close(answer, expected / expected.sum(-1, keepdim=True))
        expected = weights[..., -1, prefix:]
        torch.testing.assert_close(last, expected / expected.sum(-1, keepdim=True))
    rollout = inside.attention_rollout(attention, merging.grids, prefix)
    assert inside.attention_from(merging, rollout).shape == (3, 64)


def test_enlarge_gives_a_merged_token_to_its_patches(inside):
    maps = torch.tensor([[1.0, 2, 3, 4]])
    expected = [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]
    assert inside.enlarge(maps, 4)[0].tolist() == expected
    assert torch.equal(inside.enlarge(maps, 2), maps)


def test_attention_distance_by_hand(inside):
    places = [(2.0 * row, 2.0 * column) for row in range(4) for column in range(4)]     # in pixels
    apart = np.array([[math.dist(a, b) for b in places] for a in places])
    itself, even = torch.eye(16), torch.full((16, 16), 1 / 16)
    corner = F.one_hot(torch.zeros(16).long(), 16).float()
    heads = torch.stack([itself, even, corner])[None].repeat(2, 1, 1, 1)    # (B, heads, N, N)
    expected = pytest.approx([0, apart.mean(), apart[0].mean()], abs=1e-5)
    assert inside.attention_distance(heads, 2, 0).tolist() == expected
    for prefix in (1, 3):                           # most attention goes to these: no matter
        with_prefix = F.pad(heads * 0.3, (prefix, 0, prefix, 0), value=0.7)
        assert inside.attention_distance(with_prefix, 2, prefix).tolist() == expected


def test_a_merged_token_stands_for_a_larger_patch(inside, merging):
    assert [inside.token_side(merging, block) for block in range(1, 5)] == [1, 1, 2, 4]
    prefix = merging.num_prefix_tokens
    to_the_right = torch.eye(4)[[1, 1, 3, 3]]               # 2 x 2 tokens, each 4 pixels wide
    weights = F.pad(to_the_right, (prefix, 0, prefix, 0), value=0.1)[None, None]
    assert inside.attention_distance(weights, inside.token_side(merging, 4), prefix).item() == 2


@torch.no_grad()
def test_covering_a_patch(inside, rgb_tower):
    images, average = torch.randn(2, 3, 12, 12), torch.randn(3, 12, 12)
    falls = inside.cover_patches(rgb_tower, images, average)
    covered = images.clone()
    covered[:, :, 4:8, 8:12] = average[:, 4:8, 8:12]        # patch 5 of 0 to 8: row 1, column 2
    before, after = rgb_tower(images).log_softmax(1), rgb_tower(covered).log_softmax(1)
    answers = before.argmax(1)
    assert falls.shape == (2, 9)
    torch.testing.assert_close(falls[:, 5], (before - after)[range(2), answers])
    assert inside.cover_patches(rgb_tower, images[:1], images[0]).abs().max() < 1e-5


def test_covering_is_by_the_patches_before_merging(inside, merging):
    images = torch.randn(2, *merging.image_shape)
    falls = inside.cover_patches(merging, images, torch.zeros(merging.image_shape))
    assert falls.shape == (2, merging.grids[0] ** 2)


# ---- what is in the weights and the tokens

def test_filter_components_find_what_was_planted(inside):
    red = torch.zeros(3, 2, 2)
    red[0] = 0.5
    edge = torch.tensor([[1.0, 1], [-1, -1]]).expand(3, 2, 2) / 12 ** 0.5
    filters = torch.randn(64, 1) * 3 * red.flatten() + torch.randn(64, 1) * edge.flatten()
    patterns, fractions = inside.filter_components(filters, channels=3)
    assert patterns.shape == (12, 3, 2, 2)
    assert fractions[:2].sum() > 0.999
    assert fractions[0] > fractions[1]
    assert (patterns[0] * red).sum().abs() > 0.95
    assert (patterns[1] * edge).sum().abs() > 0.95


def test_first_filters_of_patches_and_of_a_hybrid(inside, models, rgb_tower):
    assert torch.equal(inside.first_filters(rgb_tower), rgb_tower.embed.weight)
    hybrid = models.ViT(32, 4, 3, 10, dims=(32, 32), stem="conv", pool="mean").eval()
    filters = inside.first_filters(hybrid)
    assert inside.filter_components(filters, channels=3)[0].shape[1:] == (3, 3, 3)


def test_position_similarity(inside, rgb_tower):
    vectors = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [1, 1]])
    similarity = inside.position_similarity(vectors)
    assert similarity[0].tolist() == pytest.approx([1, 0, -1, 0.5 ** 0.5], abs=1e-6)
    assert inside.position_similarity(rgb_tower.pos_embed[0]).shape == (9, 9)


def test_grid_of_grids(inside):
    drawn = inside.grid_of_grids(torch.arange(16.0).view(4, 4))
    assert drawn.shape == (5, 5)
    assert drawn[:2, :2].tolist() == [[0, 1], [2, 3]]                       # the first place's map
    assert drawn[3:, :2].tolist() == [[8, 9], [10, 11]]                     # the one below it
    assert drawn[2].isnan().all() and drawn[:, 2].isnan().all()


@torch.no_grad()
def test_states_and_what_the_head_says_of_them(inside, grey_vit, rgb_tower, merging):
    for model in (grey_vit, rgb_tower, merging):
        images, seen = intermediates(model, 7)
        states = inside.pooled_states(model, images.split(3))
        kinds = ["mean of the patches", "class token"]
        assert list(states) == kinds[:2 if model.pool == "cls" else 1]
        for tokens, pooled in zip(seen["tokens"], states["mean of the patches"], strict=True):
            torch.testing.assert_close(pooled, tokens[:, model.num_prefix_tokens:].mean(1))
        if model.pool == "cls":
            torch.testing.assert_close(states["class token"][1], seen["tokens"][1][:, 0])

        answers = inside.head_answers(model, images)
        assert torch.equal(answers[-1], model(images).argmax(1))
        fits = [width == model.widths[-1] for width in model.widths]
        assert [answer is not None for answer in answers] == fits


def test_covariances_are_of_the_tokens_that_matter(inside, grey_vit, rgb_tower, merging):
    for model in (grey_vit, rgb_tower, merging):
        images, seen = intermediates(model, 7)
        tokens, last = seen["tokens"][:-1], seen["tokens"][-1]
        read = last[:, :1] if model.pool == "cls" else last[:, model.num_prefix_tokens:]
        found = inside.covariances(model, images.split(3))
        for covariance, vectors in zip(found, [*tokens, read], strict=True):
            expected = vectors.flatten(0, 1).double().T.cov(correction=0)
            torch.testing.assert_close(covariance, expected, atol=1e-6, rtol=1e-5)


def test_rank_and_new_room(inside):
    fractions = inside.spectrum(torch.diag(torch.tensor([0.0, 2, 2, 2, 0])).double())
    assert fractions.tolist() == pytest.approx([1 / 3] * 3 + [0] * 2)
    assert inside.effective_rank(fractions) == pytest.approx(3)
    projection = torch.randn(12, 8)                         # a block that grows from 8 to 12
    carried = projection.double() @ projection.double().T
    assert inside.fraction_in_new_room(carried, projection) == pytest.approx(0, abs=1e-6)
    assert inside.fraction_in_new_room(torch.eye(12).double(), projection) == pytest.approx(4 / 12)


def test_linear_probe(inside):
    labels = torch.arange(300) % 3
    telling = F.one_hot(labels, 3) + 0.1 * torch.randn(300, 3)
    same = torch.ones(300, 4)                               # a class token before the first block
    scores = [inside.linear_probe(x[:200], labels[:200], x[200:], labels[200:], 3)
              for x in (telling, same)]
    assert scores == [1, pytest.approx(1 / 3, abs=0.01)]


# ---- does it know how confident it may be

def two_logits(confidence):
    """Logits of two classes that give the first this probability."""
    return [math.log(confidence), math.log(1 - confidence)]


def test_calibration_by_hand(inside):
    logits = torch.tensor([two_logits(0.75)] * 4)
    error, rows = inside.calibration(logits, torch.tensor([0, 0, 0, 1]))
    assert error == pytest.approx(0, abs=1e-6)
    assert rows.tolist() == [pytest.approx([0.75, 0.75, 1], abs=1e-6)]

    logits = torch.tensor([two_logits(0.75)] * 4 + [two_logits(0.95)] * 12)
    error, rows = inside.calibration(logits, torch.tensor([0, 0, 1, 1] + [0] * 6 + [1] * 6))
    assert error == pytest.approx(0.25 * 0.25 + 0.75 * 0.45, abs=1e-6)
    assert rows.tolist() == [pytest.approx([0.75, 0.5, 0.25], abs=1e-6),
                             pytest.approx([0.95, 0.5, 0.75], abs=1e-6)]

    certain_and_wrong = torch.tensor([[50.0, 0]])
    assert inside.calibration(certain_and_wrong, torch.tensor([1]))[0] == pytest.approx(1)


# ---- the whole notebook

def use_widgets(notebook):
    """Move the sliders and upload files, as a person would; `notebook`: its globals().

    A cell behind the notebook's last calls this, in the notebook's kernel.
    """
    move_sliders(**{name: notebook[name] for name in ("sliders", "screen", "square", "model")})
    names = ("upload", "invert", "result", "trouble")
    upload_files(**{name: notebook[name] for name in names})


def move_sliders(sliders, screen, square, model):
    """The sliders follow the block's heads and grid, and the frame its patches."""
    before = screen.value
    sliders["block"].value = 1
    assert screen.value != before
    assert sliders["head"].max == 2
    assert sliders["start"].max == model.grids[1] ** 2 == 16

    before = screen.value
    sliders["start"].value = 16
    assert screen.value != before
    assert (square.get_xy(), square.get_width()) == ((12, 12), 4)
    sliders["block"].value = 2                      # four tokens, so patch 16 is out of reach
    assert sliders["start"].max == sliders["start"].value == 4
    assert (square.get_xy(), square.get_width()) == ((8, 8), 8)


def upload_files(upload, invert, result, trouble):
    """An image of another mode is classified; what is no image is refused in words."""
    def give(name, content):
        now = datetime.now(timezone.utc)
        upload.value = ({"name": name, "type": "", "size": len(content),
                         "content": memoryview(content), "last_modified": now},)

    buffer = io.BytesIO()
    Image.new("CMYK", (50, 31), (200, 10, 90, 0)).save(buffer, format="JPEG")
    before = result.value
    give("photo.jpg", buffer.getvalue())
    assert result.value != before
    assert trouble.value == ""

    before = result.value
    invert.value = True
    assert result.value != before
    give("letter.png", b"Dear reader")
    assert "letter.png cannot be read as an image" in trouble.value


AFTERWARDS = f"""
sys.path.append({str(Path(__file__).parent)!r})
import test_inside
test_inside.use_widgets(globals())
"""


def execute(path, **parameters):
    for again in (True, True, False):       # kernels that start at once may pick the same port
        try:
            return papermill.execute_notebook(path, None, parameters=parameters, progress_bar=False,
                                              kernel_name="python3", cwd=vit_helpers.NOTEBOOKS)
        except RuntimeError as error:
            if not re.search(NO_KERNEL, str(error)) or not again:
                raise


@pytest.fixture(scope="module")
def merging_run(tmp_path_factory):
    """A short run of a mean-pooled, merging TowerViT on a folder of images in colour."""
    folder, numbers = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    classes = {"a class whose name would not fit any axis": (220, 30, 30),
               "blue or_green": (20, 90, 200), "c": (240, 240, 60)}
    for name, color in classes.items():
        (folder / name).mkdir()
        for i in range(20):
            pixels = np.clip(numbers.normal(color, 40, (20, 26, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    run_notebook(dataset=str(folder), model="towervit", pool="mean", merge_at="2", image_size=16,
                 patch_size=4, dims="16,24", epochs=2, batch_size=16, run="merging")
    return "merging"


@pytest.fixture(scope="module")
def outputs(merging_run, tmp_path_factory):
    """(outputs of the notebook on that run, the folder that it drew into)."""
    folder = tmp_path_factory.mktemp("inside")
    notebook = nbformat.read(vit_helpers.NOTEBOOKS / "08_inside.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell(AFTERWARDS))
    nbformat.write(notebook, folder / "08.ipynb")
    done = execute(folder / "08.ipynb", run=merging_run, compare_with=None,
                   output=str(folder / "out"))
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs], folder


def test_notebook_on_a_merging_mean_pooled_rgb_tower(outputs):
    found, folder = outputs
    assert not [each for each in found if each.output_type == "error"]
    assert not [each for each in found if each.get("name") == "stderr"]
    drawn = {path.stem.partition("-inside-")[2] for path in (folder / "out" / "img").glob("*.png")}
    assert drawn >= {"filters", "positions", "distance", "attention", "probe", "widths",
                     "confusion", "calibration"}
    widget = "application/vnd.jupyter.widget-view+json"
    assert len([each for each in found if widget in each.get("data", {})]) == 2


def test_outputs_name_no_folder_and_fit_the_screen(outputs):
    found, folder = outputs
    texts = [each for each in found if "image/png" not in each.get("data", {})]
    shown = json.dumps(texts)
    assert str(folder) not in shown
    assert str(vit_helpers.ROOT) not in shown
    lines = [line for each in found for line in each.get("text", "").splitlines()]
    assert [line for line in lines if len(line) > SCREEN] == []
    assert not [each for each in found if each.output_type == "execute_result"]
