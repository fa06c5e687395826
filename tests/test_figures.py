"""The README's tables and pictures come from the published runs, and the verdict from the numbers."""
import re
import shutil
import subprocess
import sys

import pytest
import vit_helpers

README = vit_helpers.ROOT / "README.md"


@pytest.fixture(scope="module")
def comparison():
    return vit_helpers.load_notebook("07_comparison")


def test_figures_are_drawn_without_data_and_the_readme_stays_as_it_is(tmp_path):
    shutil.copy(README, tmp_path)
    for name in ("07_comparison.ipynb", "09_questions.ipynb", "10_throughput.ipynb", "11_results.ipynb"):
        command = [sys.executable, "-m", "papermill", vit_helpers.ROOT / "notebooks" / name, tmp_path / name, "-k", "python3", "--no-progress-bar",
                   "--cwd", vit_helpers.ROOT / "notebooks", "-r", "output", tmp_path]
        subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text() == README.read_text(), "run `make figures` and commit what changed"
    shown = set(re.findall(r"\]\(img/([\w.-]+)\)", README.read_text()))
    drawn = {path.name for path in (tmp_path / "img").iterdir()}
    kept = {path.name for path in (vit_helpers.ROOT / "img").iterdir()}
    assert shown <= kept and len(shown) > 20 and {name for name in shown if "-inside-" not in name} <= drawn     # notebook 8 draws the others


def test_swapped_logs_swap_the_verdict(comparison):
    published, swapped = vit_helpers.ROOT / "runs" / "published", vit_helpers.RUNS / "swapped"
    other = {"vit": "towervit", "towervit": "vit"}
    for seed in range(3):
        for model in other:
            shutil.copytree(published / f"digits-seed{seed}-{model}", swapped / f"seed{seed}-{model}")
            shutil.copy(published / f"digits-seed{seed}-{other[model]}" / "config.json", swapped / f"seed{seed}-{model}" / "config.json")
    before = comparison.verdict(comparison.group_runs(vit_helpers.read_runs([f"published/digits-seed?-{model}" for model in other]))["digits"])
    after = comparison.verdict(comparison.group_runs(vit_helpers.read_runs(["swapped/*"]))["digits"])
    exchanged = before.replace("TowerViT", "@").replace("ViT", "TowerViT").replace("@", "ViT")
    assert sorted(after.split("\n")) == sorted(exchanged.split("\n")) and before != after


def test_runs_of_the_same_seed_count_once_and_settings_keep_groups_apart(comparison, capsys):
    run = vit_helpers.read_runs(["published/digits-seed0-vit"])[0]
    other = {**run, "run": "other", "config": {**run["config"], "learning_rate": 0.5}}
    groups = comparison.group_runs([run, {**run, "run": "twin"}, other])["digits"]
    assert {label: len(members) for label, members in groups.items()} == {"ViT learning_rate 0.1": 1, "ViT learning_rate 0.5": 1}
    assert "passed over twin: the same seed" in capsys.readouterr().out
