"""How the suite is built: who loads whom, what the helper holds, and what a fifth model takes."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import vit_helpers
from jobs import with_a_kernel

NAMES = sorted(path.stem for path in vit_helpers.NOTEBOOKS.glob("*.ipynb"))
HELPER = vit_helpers.ROOT / "vit_helpers.py"


def code_of(name, exported=False):
    """The code of a notebook's cells, or of its exported cells."""
    cells = vit_helpers.notebook_cells(vit_helpers.NOTEBOOKS / f"{name}.ipynb")
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\n\n".join(source for source in sources
                       if source.startswith("#| export") or not exported)


def loads(source):
    """The notebooks that a source names as a text of its own: `load_notebook("02_data")` under
    whatever alias, a default value, a key of sys.modules."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return sorted(set(NAMES) & {node.value for node in nodes if isinstance(node.value, str)})


def test_a_notebook_loads_only_notebooks_with_smaller_numbers():
    graph = {name: [other for other in loads(code_of(name)) if other != name] for name in NAMES}
    for name, others in graph.items():
        print(f"{name} -> {', '.join(others) or 'nothing'}")
    wrong = [(name, other) for name, others in graph.items() for other in others if other > name]
    assert wrong == []


def test_the_helper_loads_the_models_alone():
    assert loads(HELPER.read_text()) == ["01_models"]


def test_the_graph_would_show_an_arrow_by_another_name():
    assert loads("load = vit_helpers.load_notebook\nf = load('09_questions').f") == ["09_questions"]


@pytest.mark.parametrize("name, allowed", [("01_models", {"torch"}),
                                           ("03_augmentation", {"torch", "torchvision"})])
def test_exports_that_others_may_copy_import_torch_and_torchvision_at_most(name, allowed):
    tree = ast.parse(code_of(name, exported=True))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names)
    assert packages <= allowed


def test_what_the_helper_holds_is_used():
    """By more than one notebook, by the contract (DESIGN), make, train_job.sh or the helper."""
    contract = {"check_parameters", "default_parameters", "load_notebook", "load_model", "predict",
                "read_history", "read_image", "build_model", "normalise"}
    commands = "".join((vit_helpers.ROOT / name).read_text()
                       for name in ("Makefile", "train_job.sh"))
    tree = ast.parse(HELPER.read_text())
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    inside = {node.id for node in ast.walk(tree)
              if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    others = {name for name in defined - contract - inside
              if f"vit_helpers.{name}(" not in commands}
    users = {name: [notebook for notebook in NAMES if re.search(rf"\b{name}\b", code_of(notebook))]
             for name in others}
    print("\n".join(f"{name}: {', '.join(where)}" for name, where in sorted(users.items())))
    assert {name for name, where in users.items() if len(where) < 2} == set()


def test_the_sections_of_the_helper():
    """Printed, for whoever wants to know where its lines are (pytest -s)."""
    sections = re.split(r"^# -+ (.*)$", HELPER.read_text(), flags=re.M)
    counts = {}
    for title, text in zip(["imports", *sections[1::2]], sections[0::2], strict=True):
        lines = [line.strip() for line in text.splitlines()]
        counts[title] = sum(bool(line) and not line.startswith("#") for line in lines)
    print(counts, "in all", sum(counts.values()))
    assert list(counts)[1:] == ["notebooks as modules", "parameters",
                                "devices, ranks, random numbers", "images",
                                "files and checkpoints", "run folders", "trained models", "figures"]


# ---- a fifth model: one class and one entry

CLASS = '''#| export
class RegisterViT(ViT):
    """A ViT with learned tokens that are nobody's patch.  Darcet et al. 2023, arXiv:2309.16588."""

    def __init__(self, registers=2, **others):
        super().__init__(**others)
        self.registers = nn.Parameter(0.5 * torch.randn(1, registers, self.widths[0]))
        self.num_prefix_tokens += registers

    def embed_images(self, images):
        x = super().embed_images(images)
        registers = self.registers.expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)


def with_registers(dims, shared):
    """The ViT's widths, and three registers."""
    return {"dims": dims, "registers": 3}


MODELS["vit-registers"] = {"class": "RegisterViT", "label": "ViT with registers",
                           "color": "#56B4E9", "widths": with_registers}
'''
TINY = ["-p", "dims", "16,32", "-p", "head_dim", "8", "-p", "epochs", "2"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A copy of the suite with a fifth model, and an environment in which to use it."""
    place = tmp_path_factory.mktemp("fifth") / "suite"
    shutil.copytree(vit_helpers.NOTEBOOKS, place / "notebooks")
    for name in ("vit_helpers.py", "train_job.sh"):
        shutil.copy(vit_helpers.ROOT / name, place)
    (place / ".venv").symlink_to(vit_helpers.ROOT / ".venv")
    for name in ("runs", "saved_models"):           # a run to compare it with
        published = vit_helpers.ROOT / name / "published" / "digits-seed0-vit"
        shutil.copytree(published, place / name / "digits-vit")
    path = place / "notebooks" / "01_models.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"].append({"cell_type": "code", "id": "fifth", "metadata": {}, "outputs": [],
                              "execution_count": None, "source": CLASS.splitlines(keepends=True)})
    path.write_text(json.dumps(notebook))
    return place


def run_in(suite, *command):
    """A command in the copy of the suite, with runs of its own; returns the finished process."""
    environment = {**os.environ, "VIT_HOME": str(suite), "VIT_CWD": str(suite),
                   "PATH": f"{suite / '.venv/bin'}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True,
                          timeout=300)


def test_a_fifth_model_goes_the_whole_way(suite, tmp_path):
    """Trained, compared and looked into, by one entry and one class."""
    shown = run_in(suite, "bash", "train_job.sh", "-p", "model", "vit-registers", *TINY)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    config = json.loads(next(suite.glob("runs/*vit-registers*/config.json")).read_text())
    assert config["class"] == "RegisterViT" and config["model_settings"]["registers"] == 3
    runs = sorted(path.name for path in suite.glob("runs/digits-*"))
    papermill = ["papermill", "-k", "python3", "--cwd", str(suite / "notebooks"),
                 "--no-progress-bar", "--no-request-save-on-cell-execute", "--log-level", "ERROR"]
    comparison = ["notebooks/07_comparison.ipynb", str(tmp_path / "07.ipynb"),
                  "-r", "runs", "digits-*", "-r", "output", str(tmp_path)]
    shown = with_a_kernel(lambda: run_in(suite, *papermill, *comparison))
    assert shown.returncode == 0, shown.stderr
    assert "ViT with registers" in (tmp_path / "README.md").read_text()
    inside = ["notebooks/08_inside.ipynb", str(tmp_path / "08.ipynb"), "-r", "run", runs[0],
              "-r", "compare_with", runs[1]]
    shown = with_a_kernel(lambda: run_in(suite, *papermill, *inside))
    assert shown.returncode == 0, shown.stderr


UNKNOWN = """
import vit_helpers
print(*vit_helpers.load_notebook("01_models").MODELS)
vit_helpers.load_notebook("06_run").resolve({"model": "vit-registerz"})
"""


def test_an_unknown_model_is_refused_with_the_fifth_as_the_nearest_name(suite):
    shown = run_in(suite, "python", "-c", UNKNOWN)
    assert "model is 'vit-registerz', did you mean 'vit-registers'" in shown.stderr.splitlines()[-1]
    names = ["vit", "towervit", "towervit-wide", "towervit-matched", "vit-registers"]
    assert shown.stdout.split() == names


# ---- what earlier versions wrote

PUBLISHED = sorted(str(path.parent.relative_to(vit_helpers.ROOT / "runs"))
                   for path in (vit_helpers.ROOT / "runs" / "published").rglob("config.json"))


@pytest.mark.parametrize("run", PUBLISHED)
def test_every_published_run_can_be_read(run):
    found = vit_helpers.read_run(vit_helpers.find_run(run))
    known = set(vit_helpers.default_parameters()) - {"threads"}
    assert known <= set(found["config"])
    assert found["results"]["epochs"] == len(found["history"]["epoch"])
    predictions = vit_helpers.read_predictions(run)
    accuracy = (predictions["logits"].argmax(1) == predictions["labels"]).double().mean().item()
    assert accuracy == pytest.approx(found["results"]["test_accuracy"], abs=0.002)
    assert len(predictions["images"]) == len(predictions["indices"])


@pytest.mark.parametrize("run", PUBLISHED)
def test_the_settings_of_every_published_run_are_still_the_same_run(run):
    """The command that made it would be the same run today: nothing in it has another meaning."""
    config = json.loads((vit_helpers.find_run(run) / "config.json").read_text())
    running = vit_helpers.load_notebook("06_run")
    known = set(vit_helpers.default_parameters()) - vit_helpers.NOT_COMPARED
    settings = vit_helpers.renamed_config(config)
    given = {name: value for name, value in settings.items() if name in known}
    for name in ("dims", "merge_at"):
        given[name] = ",".join(map(str, given[name]))
    today = running.resolve({**given, "run": "same"})
    facts = {name: settings[name] for name in vit_helpers.DATA_FACTS}
    configured = running.configure(today, settings["in_channels"], settings["num_classes"])
    vit_helpers.refuse_changes(config, {**configured, **facts}, "published")
    assert configured["class"] == settings["class"]
    model = vit_helpers.build_model(configured)
    assert vit_helpers.load_notebook("01_models").count_parameters(model) == config["parameters"]


# ---- what the pages say to type

def words_after_train_job():
    """What follows train_job.sh in each command of README.md and of the script's own head."""
    text = "".join((vit_helpers.ROOT / page).read_text() for page in ("README.md", "train_job.sh"))
    lines = re.findall(r"^(?:# +)?(?:\w+=\w+ )?(?:bash|sbatch) .*train_job\.sh(.*)$", text, re.M)
    return sorted({re.split(r" {2}| #", line)[0].replace("…", "").strip() for line in lines})


@pytest.mark.parametrize("words", words_after_train_job())
def test_every_command_of_the_pages_is_a_run(words, tmp_path, monkeypatch):
    """Its parameters as papermill would set them.  (Weights by a name need a network, or a run.)"""
    monkeypatch.setenv("VIT_CWD", str(tmp_path))
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            image = np.full((64, 64, 3), number, np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{number}.png")
    options, names, values = (words.split()[start::3] for start in range(3))
    assert set(options) <= {"-p", "-r"} and len(options) == len(names) == len(values)
    given = dict(zip(names, values, strict=True))
    typed = vit_helpers.check_parameters({**given, "In": list(map("{} = 0".format, given))})
    settings = vit_helpers.load_notebook("06_run").resolve({**typed, "initial_weights": None})
    assert settings["run"]
