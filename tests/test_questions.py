"""09_questions: a plan that asks everything once, a stored study that answers it, and verdicts that
follow the numbers."""
import copy
import json
import re
import subprocess
import sys

import pytest
import torch

import vit_helpers

STUDY = vit_helpers.ROOT / "runs" / "published" / "study.jsonl"
TINY = {"dataset": "digits", "dims": "16", "head_dim": 8, "epochs": 1, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def questions():
    return vit_helpers.load_notebook("09_questions")


@pytest.fixture(scope="module")
def job():
    return vit_helpers.load_notebook("06_run")


@pytest.fixture(scope="module")
def done(job):
    return job.read_lines(STUDY)


@pytest.fixture(scope="module")
def answers(questions, done):
    return questions.collect(done)


@pytest.fixture(scope="module")
def p_values(questions, answers):
    return questions.adjusted_p(answers)


# ---------------------------------------------------------------- the plan

def test_every_option_is_in_the_plan_once(questions, job):
    planned = [job.plan_key(changed) for _, changed in questions.variants()]
    asked = {job.plan_key({**questions.BASES[dataset], **changes})
             for dataset, names in questions.ASKED.items()
             for name in names for changes in questions.QUESTIONS[name].values()}
    assert len(planned) == len(set(planned))
    assert set(planned) == asked


def test_the_models_are_called_as_in_the_registry(questions):
    labels = {entry["label"] for entry in vit_helpers.load_notebook("01_models").MODELS.values()}
    assert set(questions.QUESTIONS["width"]) <= labels
    assert next(iter(questions.QUESTIONS["width"])) == "ViT"


def test_trials_never_meet_the_test_set(questions, done):
    trials = questions.trial_plan()
    seeds = {seed for seeds in questions.SEEDS.values() for seed in seeds}
    assert all(trial["test"] is False for trial in trials)
    assert not {trial["seed"] for trial in trials} & seeds
    tried = [row for row in done.values() if row["parameters"]["seed"] not in seeds]
    assert not [row for row in tried if "test_accuracy" in row]


def test_the_plan_is_trained_once_for_every_seed(questions, job, done):
    plan = [*questions.trial_plan(), *questions.final_plan(done)]
    assert len({job.plan_key(run) for run in plan}) == len(plan)


# ---------------------------------------------------------------- the stored study

def test_the_stored_study_is_the_whole_plan_and_nothing_else(questions, job, done):
    plan = [*questions.trial_plan(), *questions.final_plan(done)]
    assert set(done) == {job.plan_key(run) for run in plan}


def test_the_stored_study_answers_every_question(questions, answers):
    for dataset, names in questions.ASKED.items():
        assert list(answers[dataset]) == names
        for name in names:
            assert list(answers[dataset][name]) == list(questions.QUESTIONS[name])
            for runs in answers[dataset][name].values():
                seeds = [row["parameters"]["seed"] for row in runs]
                assert seeds == questions.SEEDS[dataset]


def test_old_names_in_the_study_are_read_as_todays(questions, done):
    assert {"positions", "position_std"} & set(re.findall(r'"(position\w*)"', STUDY.read_text()))
    named = {name for row in done.values() for name in row["parameters"]}
    assert named <= {*vit_helpers.PARAMETERS, *questions.OWN}


def test_a_study_that_lacks_a_run_says_which_and_what_to_do(questions, done):
    less = dict(done)
    key = next(key for key, row in done.items() if "test_accuracy" in row)
    del less[key]
    with pytest.raises(ValueError, match=r"lacks 1 runs, such as .*`make study`") as caught:
        questions.collect(less)
    assert key in str(caught.value)


# ---------------------------------------------------------------- verdicts

def test_swapped_runs_swap_the_verdict(questions, answers, p_values):
    swapped = copy.deepcopy(answers)
    options = swapped["digits"]["pooling"]
    options["class token"], options["mean of the patches"] = (
        options["mean of the patches"], options["class token"])
    before = questions.verdict("digits", "pooling", answers, p_values)
    after = questions.verdict("digits", "pooling", swapped, questions.adjusted_p(swapped))
    assert "points behind" in before
    assert after == before.replace("behind", "ahead")


def test_equal_runs_differ_by_less_than_the_noise(questions, answers):
    same = copy.deepcopy(answers)
    options = same["digits"]["pooling"]
    options["mean of the patches"] = options["class token"][::-1]
    text = questions.verdict("digits", "pooling", same, questions.adjusted_p(same))
    assert "by less than the noise: *mean of the patches* 0.00 points" in text


LARGER = {      # what the prose of the notebook calls more than the noise, and in which direction
    ("digits", "pooling", "mean of the patches"): "−",
    ("digits", "recipe", "modern, erasing, drop path"): "−",
    ("digits", "positions", "learned, sd .02"): "−",
    ("digits", "positions", "sine, fixed"): "−",
    ("digits", "positions", "short sine, fixed"): "−",
    ("digits", "positions", "none"): "−",
    ("digits", "patch", "1 x 1"): "−",
    ("digits", "patch", "4 x 4"): "+",
}


def test_what_the_prose_calls_more_than_the_noise_is(questions, answers, p_values):
    found = {case for case, p in p_values.items() if p < 0.05}
    assert found == set(LARGER)
    for case, sign in LARGER.items():
        assert questions.difference(*case, answers, p_values).startswith(f"**{sign}")


def test_the_published_findings_are_those_of_the_stored_study(questions, answers, p_values):
    block = re.compile("<!-- findings -->\n(.*?)\n<!-- /findings -->", re.S)
    files = [vit_helpers.ROOT / name for name in ("README.md", "RESULTS.md")]
    published = [text for file in files if file.exists()
                 for text in block.findall(file.read_text())]
    assert published, "neither README.md nor RESULTS.md has the markers `findings`"
    assert set(published) == {questions.findings(answers, p_values)}, "run `make figures`"


# ---------------------------------------------------------------- position embeddings

@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("kind", ["sine", "short sine", "none", "random", None])
def test_fixed_position_embeddings(questions, models, kind, pool):
    def fresh():
        torch.manual_seed(0)
        return models.ViT(8, 2, 1, 10, dims=(16, 16), head_dim=8, pool=pool)

    model, before = fresh(), fresh().state_dict()
    questions.fix_pos_embed(model, {"pos_embed": kind} if kind else {"pool": pool})
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"pos_embed"} if kind in ("sine", "short sine", "none") else set())
    assert model.pos_embed.requires_grad == (kind is None)
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "pos_embed")
    patches = after["pos_embed"][0, model.num_prefix_tokens:]
    expected = 0.0 if kind == "none" else 0.5
    assert patches.pow(2).mean().sqrt() == pytest.approx(expected, abs=0.1)
    if kind and kind != "random":
        assert not after["pos_embed"][0, :model.num_prefix_tokens].any()


def test_an_unknown_kind_is_refused(questions, models):
    with pytest.raises(ValueError, match="did you mean 'sine'"):
        questions.fix_pos_embed(models.ViT(8, 2, 1, 10, dims=(16,), head_dim=8),
                                {"pos_embed": "sines"})


# ---------------------------------------------------------------- training it

TRAIN = """
import vit_helpers
questions, job = (vit_helpers.load_notebook(name) for name in ("09_questions", "06_run"))
job.train_plan({plan!r}, lines={path!r}, change=questions.fix_pos_embed, own=questions.OWN)
"""


def test_a_study_goes_on_after_a_line_that_was_cut_off(questions, job, tmp_path):
    path = tmp_path / "study.jsonl"
    plan = [{**TINY, "pos_embed": "none", "seed": 1, "test": False}, {**TINY, "seed": 2}]

    def train():                    # in a process of its own: what forks must not have trained
        code = TRAIN.format(plan=plan, path=str(path))
        command = [sys.executable, "-c", code]
        shown = subprocess.run(command, cwd=vit_helpers.ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        return job.read_lines(path)

    whole = train()
    first, second = (job.plan_key(run) for run in plan)
    assert set(whole) == {first, second}
    assert "test_accuracy" not in whole[first]
    assert whole[first]["cpu_seconds"] > 0 and whole[first]["threads"] == 1
    assert {"device_name", "torch", "git_commit"} <= set(whole[first])
    assert 0 <= whole[second]["test_accuracy"] <= 1

    path.write_text(path.read_text()[:-20])                     # as a power cut leaves it
    kept = job.read_lines(path)
    assert len(kept) == 1
    again = train()
    assert set(again) == {first, second}
    assert {key: again[key] for key in kept} == kept            # not trained again
    for key in whole:
        assert again[key]["val_losses"] == whole[key]["val_losses"]
    text = path.read_text()
    train()
    assert path.read_text() == text                             # nothing is left to train


def test_the_study_is_two_calls_of_the_one_way_to_train(questions, job, monkeypatch, tmp_path):
    calls = []

    def train_plan(plan, lines, **options):
        calls.append(options)
        with open(lines, "a") as file:
            for run in plan:
                row = {"parameters": run, "val_loss": run["learning_rate"], "test_accuracy": 0.5}
                file.write(json.dumps(row) + "\n")

    monkeypatch.setattr(questions.job, "train_plan", train_plan)
    questions.run_study(tmp_path / "study.jsonl")
    assert len(calls) == 2
    assert calls[0] == calls[1] == {"change": questions.fix_pos_embed, "own": ("pos_embed",)}
    questions.check_complete(job.read_lines(tmp_path / "study.jsonl"))
