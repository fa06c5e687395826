"""The tables and figures of README.md and RESULTS.md come from the published runs, and the verdict
from the numbers."""
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import vit_helpers
from jobs import with_a_kernel

PAGES = ("README.md", "RESULTS.md")
DRAWING = ("07_comparison", "09_questions", "10_throughput", "11_results", "12_growing")
PUBLISHED = vit_helpers.ROOT / "runs" / "published"


@pytest.fixture(scope="module")
def comparison():
    return vit_helpers.load_notebook("07_comparison")


@pytest.fixture(scope="module")
def published():
    """One published run of each contestant on digits, by the model's name."""
    found = vit_helpers.read_runs(["published/digits-seed0-*"], finished=True)
    return {run["config"]["model"]: run for run in found}


def execute(name, output, *parameters):
    """Run a notebook with papermill; returns all that its cells printed or displayed, as text."""
    executed = output / f"{name}.ipynb"
    source = vit_helpers.NOTEBOOKS / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", source, executed, "-k", "python3",
               "--no-progress-bar", "--no-request-save-on-cell-execute",
               "--cwd", vit_helpers.NOTEBOOKS, "-r", "output", output]
    done = with_a_kernel(lambda: subprocess.run([*command, *parameters], capture_output=True,
                                                text=True))
    assert done.returncode == 0, done.stderr
    return json.dumps(json.loads(executed.read_text()), ensure_ascii=False)


def figures_in(*pages):
    """The names of the figures that Markdown pages show."""
    return set(re.findall(r"\]\(img/([^)]+)\)", "\n".join(page.read_text() for page in pages)))


def changed(run, name="changed", **settings):
    """A run with another name and other settings."""
    return {**run, "run": name, "config": {**run["config"], **settings}}


# ---------------------------------------------------------------- the pages of the repository

@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with copies of the pages, after all that `make figures` does but for notebook 8."""
    output = tmp_path_factory.mktemp("figures")
    for page in PAGES:
        shutil.copy(vit_helpers.ROOT / page, output)
    for name in DRAWING:
        execute(name, output)
    return output


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_are_what_the_published_runs_make_them(drawn, page):
    fresh, kept = (folder / page for folder in (drawn, vit_helpers.ROOT))
    assert fresh.read_text() == kept.read_text(), "run `make figures` and commit what changed"


def test_all_figures_that_the_pages_show_are_drawn_without_data(drawn):
    shown = figures_in(*(vit_helpers.ROOT / page for page in PAGES))
    assert len(shown) > 20
    assert shown <= {path.name for path in (vit_helpers.ROOT / "img").iterdir()}
    by_others = {name for name in shown if "-inside-" in name}              # notebook 8 draws them
    assert shown - by_others <= {path.name for path in (drawn / "img").iterdir()}


# ---------------------------------------------------------------- a comparison of one's own

def test_a_damaged_run_is_named_and_a_new_readme_shows_all_that_was_drawn(tmp_path):
    for model in ("vit", "towervit"):
        shutil.copytree(PUBLISHED / f"digits-seed0-{model}", vit_helpers.RUNS / "odd" / model)
    damaged = vit_helpers.RUNS / "odd" / "towervit"
    (damaged / "predictions.npz").write_bytes(b"no predictions")
    log = next(damaged.glob("events.out.tfevents.*"))
    log.write_bytes(b"loss/val".join(log.read_bytes().split(b"loss/val")[:30]))     # cut off
    said = execute("07_comparison", tmp_path, "-r", "runs", "odd/*")
    assert re.search(r"odd/towervit: its log holds \d+ of 40 epochs", said)
    assert "odd/towervit: no predictions to read" in said
    shown = figures_in(tmp_path / "README.md")
    assert shown == {path.name for path in (tmp_path / "img").iterdir()}
    kinds = ("accuracy", "loss", "confusion", "vit-curves", "vit-samples", "towervit-curves")
    assert {f"digits-{kind}.png" for kind in kinds} <= shown


# ---------------------------------------------------------------- groups

def test_runs_of_the_same_seed_count_once(comparison, published, capsys):
    run = published["vit"]
    groups = comparison.group_runs([run, changed(run, "twin")])["digits"]
    assert {label: len(members) for label, members in groups.items()} == {"ViT": 1}
    assert "skipped twin: the same seed" in capsys.readouterr().out


def test_another_setting_makes_another_group_and_names_it(comparison, published):
    run = published["vit"]
    groups = comparison.group_runs([run, changed(run, learning_rate=0.5)])["digits"]
    assert list(groups) == ["ViT", "ViT learning_rate 0.5"]


@pytest.mark.parametrize("settings", [
    {"seed": 1}, {"threads": 7}, {"device": "cuda"}, {"workers": 0}, {"compile": True},
    {"micro_batch_size": 8}, {"code_hash": "of another version"},
])
def test_what_does_not_change_the_result_splits_no_group(comparison, published, settings):
    run = published["vit"]
    other = changed(run, **{"seed": 1, **settings})
    assert len(comparison.group_runs([run, other])["digits"]["ViT"]) == 2


def test_values_that_are_written_alike_are_groups_of_their_own(comparison, published):
    long = "/somewhere/" + 60 * "x"
    runs = [changed(published["vit"], f"from{end}", initial_weights=f"{long}/{end}/{long}")
            for end in "ab"]
    groups = comparison.group_runs([published["vit"], *runs])["digits"]
    assert [len(members) for members in groups.values()] == [1, 1, 1]


def test_a_data_set_is_the_same_however_its_path_was_typed(comparison, published):
    run = published["vit"]
    typed = [changed(run, dataset="./pets", folder="/data/pets"),
             changed(run, dataset="../data/pets", folder="/data/pets", seed=1)]
    assert [len(members) for members in comparison.group_runs(typed)["pets"].values()] == [2]


def test_a_model_that_is_gone_is_skipped_by_name(comparison, published, capsys):
    gone = changed(published["vit"], "old", model="vit-of-yesterday")
    assert list(comparison.group_runs([gone, published["vit"]])["digits"]) == ["ViT"]
    assert "skipped old: there is no model 'vit-of-yesterday'" in capsys.readouterr().out


# ---------------------------------------------------------------- the verdict

def test_swapped_logs_swap_the_verdict(comparison):
    other = {"vit": "towervit", "towervit": "vit"}
    for seed in range(3):
        for model in other:
            copy = vit_helpers.RUNS / "swapped" / f"seed{seed}-{model}"
            shutil.copytree(PUBLISHED / f"digits-seed{seed}-{model}", copy)
            shutil.copy(PUBLISHED / f"digits-seed{seed}-{other[model]}" / "config.json", copy)
    found = [vit_helpers.read_runs([f"published/digits-seed?-{model}" for model in other]),
             vit_helpers.read_runs(["swapped/*"])]
    before, after = (comparison.verdict(comparison.group_runs(runs)["digits"]) for runs in found)
    exchanged = before.replace("TowerViT", "@").replace("ViT", "TowerViT").replace("@", "ViT")
    assert sorted(after.split("\n")) == sorted(exchanged.split("\n"))
    assert before != after


def test_groups_that_differ_in_three_settings_say_so_first(comparison, published):
    settings = {"batch_size": 64, "learning_rate": 0.03, "augment": "none"}
    groups = comparison.group_runs([published["vit"], changed(published["towervit"], **settings)])
    first = comparison.verdict(groups["digits"]).split("\n")[0]
    assert "differ in more than the model" in first
    for name, value in settings.items():
        assert name in first and str(value) in first
    header, _, vit, tower = comparison.results_table(groups["digits"]).split("\n")
    assert "what differs" in header
    assert "batch_size 32" in vit and "batch_size 64" in tower


def test_folders_of_one_name_with_other_classes_are_no_seeds_of_one(comparison, published):
    config = {**published["vit"]["config"], "folder": "/a/photos", "dataset": "/a/photos"}
    other = {**config, "classes": list("qrstuvwxyz"), "seed": 1}
    runs = [{**published["vit"], "run": name, "config": each}
            for name, each in (("one", config), ("two", other))]
    [groups] = comparison.group_runs(runs).values()
    assert [len(members) for members in groups.values()] == [1, 1]
    assert sum("q, r, s" in label for label in groups) == 1


def test_the_name_of_a_figure_is_short_and_its_own(comparison):
    names = {comparison.file_name("digits", f"ViT {'long ' * 60}{end}", "curves") for end in "ab"}
    assert len(names) == 2 and all(len(name) < 140 for name in names)
    assert comparison.file_name("fashion-mnist", "", "loss") == "fashion-mnist-loss"


def test_a_marker_without_its_pair_loses_nothing(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- a -->\nold\n\n## My own text\n")
    with pytest.raises(ValueError, match="README.md: of <!-- a --> and <!-- /a --> one is missing"):
        vit_helpers.fill_markers(tmp_path, {"b": "new", "a": "new"})
    assert page.read_text() == "<!-- a -->\nold\n\n## My own text\n"


def test_p_values_are_adjusted_for_the_number_of_comparisons(comparison, published):
    accuracies = {"first": [0.90, 0.91, 0.92], "second": [0.93, 0.94, 0.95],
                  "third": [0.90, 0.915, 0.92], "alone": [0.99]}
    groups = {label: [{**published["vit"], "results": {"test_accuracy": each}} for each in values]
              for label, values in accuracies.items()}
    second, third, alone = comparison.compare_with_first(groups)
    first = accuracies["first"]
    p = {label: stats.ttest_ind(first, accuracies[label], equal_var=False).pvalue
         for label in ("second", "third")}
    assert f"p = {2 * p['second']:.2g} adjusted for 2 tests" in second and 2 * p["second"] < 0.05
    assert "second is 3.00 points ahead of first: more than the noise" in second
    assert f"p = {p['third']:.2g} adjusted for 2 tests" in third
    assert "359 test images alone give a standard error of 0.00" in alone           # one model
    equal = [{**published["vit"], "results": {"test_accuracy": 0.9}} for _ in range(2)]
    ahead = [{**published["towervit"], "results": {"test_accuracy": 0.91}} for _ in range(2)]
    [sentence] = comparison.compare_with_first({"first": equal, "second": ahead})
    right = [comparison.right(published[name]) for name in ("vit", "towervit")]
    error = 100 * (right[1] - right[0]).std() / len(right[0]) ** 0.5        # image by image
    assert f"a standard error of {error:.2f}, to which" in sentence
    assert "without any spread to test by" in sentence


def test_groups_that_were_trained_in_other_precisions_say_so(comparison, published):
    groups = comparison.group_runs([published["vit"], changed(published["towervit"],
                                                              precision="bf16")])["digits"]
    assert "in precision (fp32 / bf16)" in comparison.verdict(groups).split("\n")[0]


def test_groups_that_differ_in_the_model_alone_need_no_such_line(comparison, published):
    groups = comparison.group_runs(published.values())["digits"]
    assert "differ" not in comparison.verdict(groups)
    assert "differ" not in comparison.results_table(groups)


def test_the_answer_is_about_equal_parameters_and_says_unequal_operations(comparison, published):
    vit, matched = (published[name] for name in ("vit", "towervit-matched"))
    [said] = comparison.compare_with_first(groups_of(comparison, vit, matched))
    assert comparison.answer(groups_of(comparison, vit, matched)).startswith(said)
    dearer = changed(matched, flops=round(1.5 * vit["config"]["flops"]))
    assert "TowerViT matched needs 1.50 times the operations" in comparison.answer(
        groups_of(comparison, vit, dearer))
    longer = comparison.answer(groups_of(comparison, vit, changed(matched, epochs=99)))
    assert longer.startswith("**These groups differ in more than the model:** in epochs")
    larger = changed(matched, parameters=2 * vit["config"]["parameters"])
    assert comparison.answer(groups_of(comparison, vit, larger)) == ""
    assert comparison.answer(groups_of(comparison, vit, published["towervit"])) == ""


@pytest.mark.parametrize("name", ["threads", "versions", "label_smoothing", "learning_rate"])
def test_a_run_that_lacks_what_the_tables_need_is_left_out_by_name(comparison, published, capsys,
                                                                    name):
    config = {key: value for key, value in published["vit"]["config"].items() if key != name}
    groups = groups_of(comparison, {**published["vit"], "config": config}, published["towervit"])
    assert list(groups) == ["TowerViT"]
    reason = f"skipped {published['vit']['run']}: it does not say its {name}"
    assert reason in capsys.readouterr().out


def groups_of(comparison, *runs):
    return comparison.group_runs(runs)["digits"]


def overfitting_of(comparison, run, losses, validation_images):
    """The sentence on a run with such validation losses, one per epoch, of so many images."""
    history = {tag: [1.0] * len(losses) for tag in comparison.CURVES}
    history.update({"epoch": list(range(1, len(losses) + 1)), "loss/val": losses})
    images = [1294, validation_images, 359]
    run = changed(run, run["run"], epochs=len(losses), images=images)
    return comparison.overfitting("ViT", [{**run, "history": history}])


@pytest.mark.parametrize("losses, images, said", [
    ([0.5, 0.2, 0.9], 6000, "cannot be said from 3 epochs"),
    ([0.5, 0.4, 0.2, 0.5, 0.9], 99, "99 validation images"),
    ([0.5, 0.4, 0.2, 0.21, 0.22], 144, "says little"),
    ([0.5, 0.4, 0.2, 0.201, 0.202], 6000, "does not turn up"),
    ([0.5, 0.4, 0.2, 0.5, 0.9], 144, "ViT overfits"),
    ([0.5, 0.4, 0.2, 0.21, 0.22], 60000, "ViT overfits"),
])
def test_overfitting_is_said_only_where_it_can_be_seen(comparison, published, losses, images, said):
    sentence = overfitting_of(comparison, published["vit"], losses, images)
    assert said in sentence
    assert ("overfits:" in sentence) == (said == "ViT overfits")


def test_runs_that_met_other_test_images_are_compared_without_an_error_of_common_ones(
        comparison, published):
    """A folder that has grown, or whose order has changed: the images no longer go by pairs."""
    ones, name = [published["vit"]], "other-images"
    shutil.copytree(PUBLISHED / "digits-seed0-towervit", vit_helpers.RUNS / name)
    others = [{**published["towervit"], "run": name}]
    path = vit_helpers.RUNS / name / "predictions.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    assert comparison.difference_error(ones, others) > 0
    for rows in (np.roll(np.arange(359), 1), np.arange(300)):
        kept = {part: arrays[part][rows] for part in ("logits", "labels")}
        np.savez(path, **{**arrays, **kept})
        assert math.isnan(comparison.difference_error(ones, others))
        [sentence] = comparison.compare_with_first({"first": ones, "second": others})
        assert "too few to test)" in sentence
    shutil.rmtree(vit_helpers.RUNS / name)


def test_the_validation_images_of_a_folder_count_once_however_many_seeds(comparison, published):
    run = published["vit"]
    drawn, given = (changed(run, run["run"], val_drawn=drawn) for drawn in (True, False))
    one = comparison.validation_error([drawn])
    assert comparison.validation_error([drawn] * 4) == pytest.approx(one / 2)
    assert comparison.validation_error([given] * 4) == pytest.approx(one)


def test_equal_means_are_no_lead(comparison, published):
    groups = {label: [{**published[name], "results": {"test_accuracy": 0.9}}]
              for label, name in (("first", "vit"), ("second", "towervit"))}
    said = comparison.verdict(groups)
    assert "**first**, 90.00% (n = 1; the same: second)." in said
    assert "first and second have the same mean test accuracy (n = 1 and 1" in said


# ---------------------------------------------------------------- classes

def test_the_confusion_matrix_agrees_with_the_test_accuracy(comparison, published):
    for run in published.values():
        counts = comparison.confusion(run)
        assert counts.sum() == run["config"]["images"][2]
        assert np.trace(counts) / counts.sum() == pytest.approx(run["results"]["test_accuracy"])


def test_of_many_classes_the_worst_are_named(comparison):
    accuracies = np.linspace(0.2, 0.99, 20)
    table = comparison.class_table([f"kind{i}" for i in range(20)], {"ViT": np.diag(accuracies)})
    row = table.split("\n")[-1]
    assert re.findall(r"kind\d+", row) == ["kind0", "kind1", "kind2", "kind3", "kind4"]
