"""Notebook 11: the plans, the published runs and their checkpoints; notebook 10's tables."""
import json

import pytest
import torch
from PIL import Image

import vit_helpers

PUBLISHED = vit_helpers.ROOT / "runs" / "published"
CHECKPOINTS = sorted(str(path.parent.relative_to(vit_helpers.ROOT / "saved_models"))
                     for path in vit_helpers.ROOT.glob("saved_models/published/**/best.pt"))
ON_DIGITS = [run for run in CHECKPOINTS if run.startswith("published/digits")]


@pytest.fixture(scope="module")
def results():
    return vit_helpers.load_notebook("11_results")


def published_run(name):
    """A published run as `read_run` gives it."""
    return vit_helpers.read_run(vit_helpers.find_run(name))


def draw_greys(folder):
    """A folder of images: 12 dark and 12 light ones to train on, as many to test."""
    for part in ("train", "test"):
        for number in range(12):
            for label, grey in (("dark", 10 * number), ("light", 255 - 10 * number)):
                path = folder / part / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (grey, grey, grey)).save(path)
    return str(folder)


@pytest.fixture(scope="module")
def greys(results, tmp_path_factory):
    """The CPU's plan trained for one epoch on greys: the name of its run."""
    folder = draw_greys(tmp_path_factory.mktemp("images") / "greys")
    results.run_results(folder, epochs=1, kind="cpu")
    return folder


GREYS = "results-1-epochs/greys-cpu-seed0"


def test_a_plan_is_trained_once(results, greys):
    stored = vit_helpers.RUNS / GREYS / "results.json"
    trained = stored.stat().st_mtime_ns
    results.run_results(greys, epochs=1, kind="cpu")
    assert stored.stat().st_mtime_ns == trained
    assert vit_helpers.read_json(stored)["epochs"] == 1


def test_the_minutes_of_what_is_left_come_first(results, greys, capfd):
    results.run_results(greys, epochs=1, kind="cpu")
    assert capfd.readouterr().out.startswith("greys-cpu: 0 of 1 runs to train: about 0 minutes")


def test_its_checkpoint_is_tested_again(results, greys, capfd):
    said = vit_helpers.read_json(vit_helpers.RUNS / GREYS / "results.json")["test_accuracy"]
    results.retest(["results-1-epochs/*"])
    assert f"{GREYS}: {said:.2%} again, {said:.2%} reported" in capfd.readouterr().out


def test_a_result_that_the_checkpoint_does_not_give_is_named(results, greys):
    stored = vit_helpers.RUNS / GREYS / "results.json"
    honest = vit_helpers.read_json(stored)
    vit_helpers.write_json(stored, {**honest, "test_accuracy": honest["test_accuracy"] - 0.1})
    try:
        with pytest.raises(SystemExit, match=f"not what was reported: {GREYS}"):
            results.retest(["results-1-epochs/*"])
    finally:
        vit_helpers.write_json(stored, honest)


def test_publishing_halves_a_checkpoint_once(results, greys, monkeypatch, tmp_path):
    source = vit_helpers.SAVED_MODELS / GREYS / "best.pt"
    path = tmp_path / "published" / "greys" / "best.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(source.read_bytes())
    monkeypatch.setattr(vit_helpers, "SAVED_MODELS", tmp_path)
    results.publish_checkpoints()
    once = path.stat().st_mtime_ns
    assert path.stat().st_size < 0.6 * source.stat().st_size
    results.publish_checkpoints()
    assert path.stat().st_mtime_ns == once


def test_an_unknown_configuration_is_refused_with_the_list(results):
    with pytest.raises(ValueError, match="only is 'best'.* Allowed: greys-cpu"):
        results.run_results("greys", only="best", kind="cpu")


def test_an_unknown_kind_is_refused_with_the_list(results):
    with pytest.raises(ValueError, match="kind is 'gpu'.* Allowed: cuda, cpu"):
        results.run_results("greys", kind="gpu")


def test_a_run_that_fails_is_named_and_the_others_are_trained(results, greys, tmp_path):
    """The first plan has no data."""
    bad = results.budget_plans(str(tmp_path / "nowhere"), "cpu", "results-1-epochs", 1)
    good = results.budget_plans(greys, "cpu", "results-good", 1)
    with pytest.raises(SystemExit, match="results-1-epochs/nowhere-cpu-seed0"):
        results.train_all({**bad, **good})
    assert (vit_helpers.RUNS / "results-good" / "greys-cpu-seed0" / "results.json").exists()


def test_the_published_plan_names_the_published_runs(results):
    planned = sorted(run["run"] for run in results.published_plan())
    patterns = ("digits-*", "fashion-mnist-*", "more/*")
    there = [path for pattern in patterns for path in PUBLISHED.glob(pattern)]
    assert planned == sorted(str(path.relative_to(PUBLISHED.parent)) for path in there)


def test_the_published_plan_has_the_settings_of_the_published_runs(results):
    job = vit_helpers.load_notebook("06_run")
    for planned in results.published_plan():
        config = published_run(planned["run"])["config"]
        settings = job.resolve({**vit_helpers.default_parameters(), **planned})
        facts = {name: config[name] for name in vit_helpers.DATA_FACTS}
        vit_helpers.refuse_changes(config, {**settings, **facts}, planned["run"])


def test_the_budget_plans_are_runs_of_seeds(results):
    plans = results.budget_plans("cifar10", "cuda", epochs=2)
    first, at_once = plans["cifar10-best"]
    names = [run["run"] for run in first]
    assert names == [f"results/cifar10-best-seed{seed}" for seed in range(3)]
    assert {run["epochs"] for run in first} == {2} and at_once == 3


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_a_published_checkpoint_loads(run):
    model = vit_helpers.load_model(run)
    with torch.no_grad():
        logits = model(torch.randn(2, *model.image_shape))
    assert logits.shape == (2, 10) and logits.isfinite().all()
    count = vit_helpers.load_notebook("01_models").count_parameters(model)
    assert count == published_run(run)["results"]["parameters"]


@pytest.mark.parametrize("run", ON_DIGITS)
def test_a_published_checkpoint_tests_to_the_published_number(results, run):
    published = published_run(run)
    again, count = results.test_again(published)
    assert again == pytest.approx(published["results"]["test_accuracy"], abs=1e-9)
    assert count == 359


@pytest.fixture(scope="module")
def throughput():
    return vit_helpers.load_notebook("10_throughput")


@pytest.fixture(scope="module")
def bench():
    return json.loads((PUBLISHED / "throughput.json").read_text())


def test_a_bench_that_was_stopped_says_what_it_lacks(throughput, bench):
    stopped = {name: bench[name] for name in ("machine", "matmul", "training")}
    said = throughput.lacking(stopped, *throughput.SECTIONS)
    assert "lacks: parameters, inference, batch size, growth, profile, loop." in said
    assert not throughput.lacking(bench, *throughput.SECTIONS)


def test_what_a_step_reaches_is_told_only_where_the_product_was_measured(throughput, bench):
    row = throughput.find_step(bench, "training", "ours", "fp32", "as it ships")
    reached = throughput.fraction_reached(bench, row)
    speed = throughput.median_speed(row)
    model = throughput.our_vit(*throughput.BENCH_SHAPE.values())
    done = 3 * throughput.models.count_flops(model) * speed / 1e9
    assert reached == pytest.approx(done / bench["matmul"]["fp32"])
    assert throughput.fraction_reached({"training": bench["training"]}, row) is None


def test_a_table_names_every_library_even_with_a_row_missing(throughput, bench):
    some = {**bench, "training": bench["training"][:-1]}
    table = throughput.training_table(some)
    assert all(f"| {library} |" in table for library in throughput.LIBRARIES)
    assert "| – |" in table
