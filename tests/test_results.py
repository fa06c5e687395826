"""Notebook 11: the plans, the published runs and their checkpoints; notebook 10's tables."""
import json
import re
import shutil
import subprocess
import sys

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
def two_plans(results, tmp_path_factory):
    """(a folder of greys, what was said of two plans): each the smallest for a CPU, of one epoch.
    The first has no data; the second has greys."""
    place = tmp_path_factory.mktemp("images")
    folder = draw_greys(place / "greys")
    bad = results.budget_plans(str(place / "nowhere"), "cpu", "results-bad", 1)
    good = results.budget_plans(folder, "cpu", "results-1-epochs", 1)
    with pytest.raises(SystemExit) as caught:
        results.train_all({"nowhere": bad["nowhere-cpu"], "greys": good["greys-cpu"]})
    return folder, str(caught.value)


@pytest.fixture(scope="module")
def greys(two_plans):
    """The folder of a run that was trained by its plan."""
    return two_plans[0]


SMALL_PLAN = {"only": "greys-cpu", "epochs": 1, "kind": "cpu"}
GREYS = "results-1-epochs/greys-cpu-seed0"


def test_a_plan_is_trained_once(results, greys):
    stored = vit_helpers.RUNS / GREYS / "results.json"
    trained = stored.stat().st_mtime_ns
    results.run_results(greys, **SMALL_PLAN)
    assert stored.stat().st_mtime_ns == trained
    assert vit_helpers.read_json(stored)["epochs"] == 1


def test_a_plan_that_is_done_has_nothing_left(results, greys, capfd):
    results.run_results(greys, **SMALL_PLAN)
    assert capfd.readouterr().out.startswith("greys-cpu: 0 of 1 runs to train, about 0 minutes")


def test_a_finished_run_with_other_settings_is_refused_before_anything_is_trained(results, greys):
    [entry], _ = results.budget_plans(greys, "cpu", "results-1-epochs", 1)["greys-cpu"]
    plans = {"new": ([{**entry, "run": "never-begun"}], 1), "old": ([{**entry, "epochs": 2}], 1)}
    with pytest.raises(ValueError, match="epochs was 1 and is now 2"):
        results.train_all(plans)
    assert not (vit_helpers.RUNS / "never-begun").exists()


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


def test_what_cannot_be_tested_is_named_and_the_others_are_tested(results, greys, capfd):
    for name in ("aa-lost", "ab-pointer"):
        folder = vit_helpers.RUNS / "results-1-epochs" / name
        shutil.copytree(vit_helpers.RUNS / GREYS, folder)
    pointer = vit_helpers.SAVED_MODELS / "results-1-epochs/ab-pointer/best.pt"
    pointer.parent.mkdir(parents=True)
    pointer.write_text("version https://git-lfs.github.com/spec/v1")
    lost = "results-1-epochs/aa-lost, results-1-epochs/ab-pointer"
    with pytest.raises(SystemExit, match=f"^could not be tested: {lost}$"):
        results.retest(["results-1-epochs/*"])
    shown = capfd.readouterr().out
    assert "`git lfs pull` fetches it" in shown and f"{GREYS}: " in shown
    for name in ("aa-lost", "ab-pointer"):
        shutil.rmtree(vit_helpers.RUNS / "results-1-epochs" / name)
    shutil.rmtree(pointer.parent)


def test_publishing_halves_a_checkpoint_once(results, greys, monkeypatch, tmp_path):
    source = vit_helpers.SAVED_MODELS / GREYS / "best.pt"
    path = tmp_path / "published" / "greys" / "best.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(source.read_bytes())
    monkeypatch.setattr(vit_helpers, "SAVED_MODELS", tmp_path)
    monkeypatch.setattr(vit_helpers, "RUNS", tmp_path)
    results.publish_checkpoints()
    assert path.read_bytes() == source.read_bytes()     # still trained: it will be tested as it is
    (path.parent / "results.json").write_text("{}")
    results.publish_checkpoints()
    once = path.stat().st_mtime_ns
    assert path.stat().st_size < 0.6 * source.stat().st_size
    results.publish_checkpoints()
    assert path.stat().st_mtime_ns == once


def test_an_unknown_configuration_is_refused_with_the_list(results):
    with pytest.raises(ValueError, match="only is 'best'.* Allowed: greys-cpu-20-minutes, "):
        results.run_results("greys", only="best", kind="cpu")
    with pytest.raises(ValueError, match="ONLY is 'greys-best', which is .*: KIND=cuda"):
        results.run_results("greys", only="greys-best", kind="cpu")


@pytest.mark.parametrize("dataset, epochs, words", [
    ("cifer10", None, "dataset is 'cifer10', did you mean 'cifar10'"),
    ("./no/photos", None, "no folder .*no/photos"), ("cifar10", "abc", "'EPOCHS' is 'abc'"),
    ("cifar10", "-1", "epochs is -1; it must be")])
def test_a_budget_that_no_run_would_accept_trains_nothing(results, monkeypatch, dataset, epochs,
                                                          words):
    monkeypatch.setattr(results, "train_all", lambda plans: pytest.fail("it began to train"))
    with pytest.raises((ValueError, OSError), match=words):
        results.run_results(dataset, epochs=epochs, kind="cpu")


def test_configurations_are_all_there_whatever_the_data_are_called(results):
    for kind in ("cpu", "cuda"):
        counts = [len(results.configurations(name, kind)) for name in ("cifar10", "fashion-mnist")]
        assert counts[1] == counts[0] - 1               # Fashion-MNIST is in the other one, too
    plan, _ = results.budget_plans("/tmp/my photos", "cpu")["my_photos-cpu"]
    assert plan[0]["run"] == "results/my_photos-cpu-seed0"
    trained = published_run("published/digits-seed0-vit")
    found = [{**trained, "run": run} for run in
             ("results/a-seed0", "results/a-seed1", "other/a-seed0", "results/b-seed0")]
    results_of = {name: len(members) for name, members in results.by_name(found).items()}
    assert results_of == {"results/a": 2, "other/a": 1, "b": 1}


def test_commands_of_make_say_what_is_wrong_without_a_traceback():
    """Through the words with which make loads the suite."""
    makefile = (vit_helpers.ROOT / "Makefile").read_text()
    words = re.search("^LOAD := (.*)$", makefile, re.MULTILINE)[1]
    wrong = {" vit_helpers.one_of('ONLY', 'collour', ['colour'])":
             "ONLY is 'collour', did you mean 'colour'? Allowed: colour\n",
             " load('02_data').load_data('cifer10')":
             "dataset is 'cifer10', did you mean 'cifar10'"}
    for code, said in wrong.items():
        shown = subprocess.run([sys.executable, "-c", words + code], cwd=vit_helpers.ROOT,
                               capture_output=True, text=True)
        assert shown.returncode == 1 and shown.stderr.startswith(said)
        assert shown.stderr.count("\n") == 1


def test_an_unknown_kind_is_refused_with_the_list(results):
    with pytest.raises(ValueError, match="kind is 'gpu'.* Allowed: cuda, cpu"):
        results.run_results("greys", kind="gpu")


def test_a_run_that_fails_is_named_and_the_others_are_trained(two_plans):
    assert "failed: results-bad/nowhere-cpu-seed0" in two_plans[1]
    assert (vit_helpers.RUNS / GREYS / "results.json").exists()


@pytest.fixture(scope="module")
def planned(results):
    """{run: parameters} of all that `make published` trains."""
    return {entry["run"]: entry for plan, _ in results.published_plans().values() for entry in plan}


def test_the_published_plans_name_the_published_runs(planned):
    there = {str(path.parent.relative_to(PUBLISHED.parent))
             for path in PUBLISHED.rglob("config.json")}
    assert there <= set(planned)


def test_the_published_lines_are_those_of_the_plans(results):
    """No line is left of a plan that was changed later, nor counted for another."""
    read = results.job.read_lines
    digits, baseline = read(results.DIGITS), read(results.BASELINE)
    plans = {results.AUGMENTATIONS: results.augmentation_trials(),
             results.SETTINGS: results.settings_trials(),
             results.DIGITS: [*sum(map(results.digits_trials, results.WAYS), []),
                              *results.digits_runs(digits)],
             results.BASELINE: [*results.baseline_trials(), *results.baseline_runs(baseline)]}
    for path, plan in plans.items():
        lines = set(read(path))
        assert lines and lines <= set(map(results.job.plan_key, plan)), path


def test_the_published_plans_have_the_settings_of_the_published_runs(planned):
    job = vit_helpers.load_notebook("06_run")
    there = [entry for entry in planned.values() if job.is_finished(entry)]
    for entry in there:
        config = published_run(entry["run"])["config"]
        settings = job.resolve(entry)
        facts = {name: config[name] for name in vit_helpers.DATA_FACTS}
        vit_helpers.refuse_changes(config, {**settings, **facts}, entry["run"])
    assert len(there) >= 24


def test_every_planned_model_is_small_and_every_contestant_has_three_seeds(results, planned):
    for parameters, *_ in results.configurations("cifar10", "cpu").values():
        assert results.models.count_parameters(results.model_of(parameters)[1]) <= 3_000_000
    seeds = {}
    for run, entry in planned.items():
        if "more/" not in run and "headline/" not in run:
            seeds.setdefault(run.replace(f"seed{entry['seed']}", ""), set()).add(entry["seed"])
    assert len(seeds) == 4 * 3 + 3 and all(found == {0, 1, 2} for found in seeds.values())


def test_towers_at_equal_operations_cost_what_the_vit_costs(results):
    equal, towers = results.colour_contestants(), results.at_equal_operations()
    wanted = results.operations(equal[0])
    ratios = {entry["model"]: results.operations(entry) / wanted for entry in towers[:3]}
    print(ratios)
    assert len(towers) == 9 and set(ratios) == set(results.models.MODELS) - {"vit"}
    assert all(abs(ratio - 1) < 0.03 for ratio in ratios.values())
    ways = {(entry["precision"], entry["threads"]) for entry in [*equal, *towers]}
    assert len(ways) == 1                           # what stands in one table is trained alike


def test_the_prose_says_what_the_four_in_colour_show(results):
    """At equal parameters and epochs the tower is ahead, by less than the noise; at equal
    operations the small tower is ahead of the ViT, and the ViT of the others, all by more."""
    found = [published_run(entry["run"]) for entry in results.colour_contestants()]
    vit, matched = (results.comparison.accuracies_of(
        [run for run in found if run["config"]["model"] == model])
        for model in ("vit", "towervit-matched"))
    assert len(vit) == len(matched) == 3
    assert matched.mean() > vit.mean() and results.comparison.p_value(vit, matched) > 0.05
    towers = [published_run(entry["run"]) for entry in results.at_equal_operations()]
    of_vit = [run for run in found if run["config"]["model"] == "vit"]
    [groups] = results.comparison.group_runs(of_vit + towers).values()
    said = [sentence.split(" (")[0] for sentence in results.comparison.compare_with_first(groups)]
    who = r"TowerViT .* of ViT|ViT .* of TowerViT (wide|matched)"
    assert len(said) == 3 and said[0].startswith("TowerViT ")
    assert all(re.match(rf"({who}): more than the noise of the seeds", line) for line in said)
    equal_said = results.comparison.compare_with_first(
        next(iter(results.comparison.group_runs(found).values())))
    assert all("not settled by these seeds" in line for line in equal_said)


def test_a_plan_that_was_begun_keeps_its_precision_and_threads(results, monkeypatch):
    plan = [{"run": "alike/seed0"}, {"run": "alike/seed1"}]
    for units, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(results.job, "has_bf16_units", lambda device, units=units: units)
        results.cpu_precision.cache_clear()
        assert results.trained_alike(plan, 1)[0] == {**plan[0], "precision": precision,
                                                     "threads": 1, "device": "cpu"}
    results.cpu_precision.cache_clear()
    begun = {"precision": "bf16", "threads": 2}
    (vit_helpers.RUNS / "alike/seed1").mkdir(parents=True)
    vit_helpers.write_json(vit_helpers.RUNS / "alike/seed1/config.json", begun)
    assert results.trained_alike(plan, 1) == [{**entry, **begun, "device": "cpu"} for entry in plan]
    assert results.trained_alike([{"run": "other"}], 1, others=plan) == [
        {"run": "other", **begun, "device": "cpu"}]


def test_runs_that_were_not_trained_alike_are_counted(results):
    config = published_run("published/digits-seed0-vit")["config"]
    assert results.unlike([config, config]) == ""
    said = results.unlike([config, {**config, "precision": "bf16"}, config])
    assert re.search("2 by torch .* fp32, 2 threads; 1 by torch .* bf16, 2 threads", said)


# ---------------------------------------------------------------- the baseline

def test_the_baseline_costs_what_the_vit_costs_and_learns(results, greys, tmp_path):
    """By the plan's own way, with Muon and with SGD, on a folder of greys."""
    _, vit = results.model_of({**results.MERGED, "dataset": "cifar10"})
    cnn = results.as_cnn(vit, {"network": "cnn"})
    ratio = results.models.count_flops(cnn) / results.models.count_flops(vit)
    assert abs(ratio - 1) < 0.02 and results.as_cnn(vit, {}) is None
    short = {"dataset": greys, "epochs": 2, "seed": 0, "batch_size": 8, "precision": "fp32"}
    for recipe in results.RATES:
        entry = {**results.CNN, **short, "recipe": recipe}
        row = results.job.train_to_a_line(entry, tmp_path / recipe, results.as_cnn, results.OWN)
        assert row["test_accuracy"] > 0.9 and row["size"] < results.models.count_parameters(vit)


def test_the_baseline_is_chosen_on_validation_loss(results):
    done = {results.job.plan_key(trial): {"val_loss": number}
            for number, trial in enumerate(reversed(results.baseline_trials()))}
    last = results.baseline_trials()[-1]
    runs = results.baseline_runs(done)
    assert [run["seed"] for run in runs] == [0, 1, 2] and "test" not in runs[0]
    assert {(run["recipe"], run["learning_rate"]) for run in runs} == {
        (last["recipe"], last["learning_rate"])}
    assert results.baseline_runs(dict(list(done.items())[1:])) == []


def test_the_recipe_for_digits_is_chosen_on_the_mean_over_the_splits(results):
    done = {}
    for number, way in enumerate(results.WAYS):
        for trial, noise in zip(results.digits_trials(way), (0, -9, 9, 0), strict=True):
            done[results.job.plan_key(trial)] = {"val_loss": 5 - number + noise}
    runs = results.digits_runs(done)
    assert [run["seed"] for run in runs] == [0, 1, 2, 3, 4] and "test" not in runs[0]
    assert all(results.WAYS[-1].items() <= run.items() for run in runs)
    assert results.digits_runs(dict(list(done.items())[1:])) == []


# ---------------------------------------------------------------- robustness

def test_robustness_is_deterministic_and_clean_is_what_was_published(results, tmp_path, capfd):
    found = vit_helpers.read_runs(["published/digits-seed0-vit"], finished=True)
    first = results.measure_robustness(tmp_path / "a.json", found)
    again = results.measure_robustness(tmp_path / "b.json", found)
    assert first == again == vit_helpers.read_json(tmp_path / "a.json")
    numbers = first["published/digits-seed0-vit"]
    said = found[0]["results"]["test_accuracy"]
    assert numbers["clean"] == pytest.approx(said, abs=1e-9)
    capfd.readouterr()
    assert results.measure_robustness(tmp_path / "a.json", found) == first
    assert capfd.readouterr().out == ""             # what the file holds is not measured again
    assert "| ViT | 96.9 |" in results.robustness_table(first)


def test_each_corruption_does_what_its_severity_says(results):
    images = torch.randint(64, 192, (8, 3, 32, 32), dtype=torch.uint8)
    for kind, severities in results.CORRUPTIONS.items():
        changes = [(results.corrupted(images, kind, severity).float() - images).square().mean()
                   for severity in (0, *severities)]
        assert changes[0] == 0 and changes == sorted(changes)
    noise = results.corrupted(images, "noise", 10).float() - images
    assert noise.std().item() == pytest.approx(10, rel=0.1)
    left = results.corrupted(images, "contrast", 0.4).float().std() / images.float().std()
    assert left.item() == pytest.approx(0.4, abs=0.02)


def test_the_calibration_error_by_hand(results):
    """Two bins of 15: confidence .55, half of 4 right; confidence .95, all of 4 right."""
    confidence = torch.tensor([0.55] * 4 + [0.95] * 4)
    logits = torch.stack([confidence, 1 - confidence], dim=1).log()
    error, _ = results.inside.calibration(logits, torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]), 15)
    assert error == pytest.approx((0.05 + 0.05) / 2, abs=1e-6)


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


def test_each_case_is_compiled_by_itself(throughput):
    """Two models of one class and shape: nothing of the one is taken for the other."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for make in (throughput.our_vit, throughput.our_whole_vit):
        throughput.compiled_alone(make(8, 4, 64, 2), backend=keep)(torch.zeros(2, 3, 8, 8))
    assert len(graphs) == 2


def test_a_bench_does_not_go_on_with_that_of_another_machine(throughput, bench, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**bench, "machine": {**bench["machine"], "threads": 99}}))
    with pytest.raises(ValueError, match="begun with another .*threads.*; name another file"):
        throughput.begun_bench(path, torch.device("cpu"))


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
