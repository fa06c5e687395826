"""09_questions: a plan that asks everything once, a stored study that answers it, and verdicts that
follow the numbers."""
import copy
import inspect
import json
import re

import pytest
import torch

import vit_helpers

STUDY, COLOUR = (vit_helpers.ROOT / "runs" / "published" / f"{name}.jsonl"
                 for name in ("study", "colour"))
TINY = {"dataset": "digits", "dims": "16", "head_dim": 8, "epochs": 1, "learning_rate": 0.01}
MERGED = {**TINY, "dims": "16,16", "merge_at": "2", "pool": "mean", "recipe": "muon"}


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
def colour(job):
    return job.read_lines(COLOUR)


@pytest.fixture(scope="module")
def answers(questions, done, colour):
    everything = {**done, **colour}
    asked = {**questions.GREY_QUESTIONS,
             **questions.answered(questions.COLOUR_QUESTIONS, everything)}
    return questions.collect(asked, everything)


@pytest.fixture(scope="module")
def p_values(questions, answers):
    return questions.adjusted_p(answers)


# ---------------------------------------------------------------- the plan

def all_questions(questions):
    return {**questions.GREY_QUESTIONS, **questions.COLOUR_QUESTIONS}


def test_every_option_is_in_the_plan_once(questions, job):
    asked = all_questions(questions)
    planned = [job.plan_key(changed) for _, changed in questions.variants(asked)]
    wanted = {job.plan_key({**questions.STUDIES[dataset]["base"], **changes})
              for dataset, names in asked.items()
              for options in names.values() for changes in options.values()}
    assert len(planned) == len(set(planned))
    assert set(planned) == wanted


def test_a_model_that_questions_share_is_trained_once(questions):
    """Muon's is the reference of all five, AdamW's an option of two."""
    asked = questions.COLOUR_QUESTIONS[questions.COLOUR]
    options = [list(each.values()) for each in asked.values()]
    assert sum(map(len, options)) - len(questions.variants(questions.COLOUR_QUESTIONS)) == 4 + 1
    of_each = [len(questions.runs_left({questions.COLOUR: {"": dict(enumerate(each))}}, {}))
               for each in options]
    left = questions.runs_left(questions.COLOUR_QUESTIONS, {})
    assert sum(of_each) - len(left) == 5 * (3 + 3)
    said = questions.left_in_words(questions.COLOUR_QUESTIONS, {})
    assert f"in all {len(left)}," in said


def test_the_models_are_called_as_in_the_registry(questions):
    labels = {entry["label"] for entry in vit_helpers.load_notebook("01_models").MODELS.values()}
    assert set(questions.COMPARED["width"]) <= labels
    assert next(iter(questions.COMPARED["width"])) == "ViT"


def test_trials_never_meet_the_test_set(questions, done, colour):
    trials = questions.trial_plan(all_questions(questions))
    seeds = {seed for study in questions.STUDIES.values() for seed in study["seeds"]}
    assert all(trial["test"] is False for trial in trials)
    assert not {trial["seed"] for trial in trials} & seeds
    rows = [*done.values(), *colour.values()]
    tried = [row for row in rows if row["parameters"]["seed"] not in seeds]
    assert not [row for row in tried if "test_accuracy" in row]


def keys_of(questions, job, asked, done):
    """The keys of all runs that are planned for questions, as far as their rates are chosen."""
    plan = questions.trial_plan(asked)
    for model in questions.variants(asked):
        if all(job.plan_key(trial) in done for trial in questions.trials(*model)):
            plan += questions.final_runs(*model, done)
    keys = [job.plan_key(run) for run in plan]
    assert len(keys) == len(set(keys))              # trained once for every seed
    return set(keys)


# ---------------------------------------------------------------- the stored study

def test_the_stored_study_is_the_whole_plan_and_nothing_else(questions, job, done):
    assert set(done) == keys_of(questions, job, questions.GREY_QUESTIONS, done)


def test_every_stored_run_in_colour_is_found_in_the_plan(questions, job, colour):
    assert set(colour) <= keys_of(questions, job, questions.COLOUR_QUESTIONS, colour)
    asked = {questions.COLOUR: {"": questions.COLOUR_QUESTIONS[questions.COLOUR]["optimizer"]}}
    assert not [run for run in questions.trial_plan(asked) if job.plan_key(run) not in colour]


def test_the_stored_study_answers_every_question(questions, answers):
    for dataset, names in questions.GREY_QUESTIONS.items():
        assert list(answers[dataset]) == list(names)
        for name, options in names.items():
            assert list(answers[dataset][name]) == list(options)
            for runs in answers[dataset][name].values():
                seeds = [row["parameters"]["seed"] for row in runs]
                assert seeds == questions.STUDIES[dataset]["seeds"]


def test_old_names_in_the_study_are_read_as_todays(questions, done):
    assert {"positions", "position_std"} & set(re.findall(r'"(position\w*)"', STUDY.read_text()))
    named = {name for row in done.values() for name in row["parameters"]}
    assert named <= {*vit_helpers.PARAMETERS, *questions.OWN}


def test_a_study_that_lacks_a_run_says_which_and_what_to_do(questions, done):
    less = dict(done)
    key = next(key for key, row in done.items() if "test_accuracy" in row)
    del less[key]
    with pytest.raises(ValueError, match=r"lacks 1 runs, such as .*`make study`") as caught:
        questions.collect(questions.GREY_QUESTIONS, less)
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
    ("cifar10-jpeg", "optimizer", "AdamW"): "−",
    ("cifar10-jpeg", "optimizer", "SGD"): "−",
    ("cifar10-jpeg", "positions", "none"): "−",
    ("cifar10-jpeg", "patch", "8 x 8"): "−",
    ("cifar10-jpeg", "recipe", "adamw"): "−",
    ("cifar10-jpeg", "recipe", "modern"): "−",
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
    assert set(published) == {questions.summary_of(answers, p_values)}, "run `make figures`"


# ---------------------------------------------------------------- colour beside the digits

@pytest.fixture
def both(questions, answers):
    """Answers in which colour is what digits are, option for option."""
    digits = answers["digits"]
    found = {"digits": digits, questions.COLOUR: {}}
    for name, (question, option, against) in questions.IN_COLOUR.items():
        on_digits, *others = questions.ON_DIGITS[name]
        options = found[questions.COLOUR].setdefault(question, {})
        for here, there in zip((option, against), others, strict=True):
            options[here] = digits[on_digits][there]
    return copy.deepcopy(found)


def test_swapped_labels_in_colour_turn_agree_into_disagree(questions, both):
    name = "wide patches against narrow"
    assert set(questions.side_by_side(both)) == set(questions.ON_DIGITS)
    digits, colour = questions.side_by_side(both)[name]
    assert digits[0] == colour[0]
    before = questions.compared_in_words(name, digits, colour)
    assert "ahead on digits, ahead in colour: **agree**." in before
    options = both[questions.COLOUR]["patch"]
    options["8 x 8"], options["4 x 4"] = options["4 x 4"], options["8 x 8"]
    digits, colour = questions.side_by_side(both)[name]
    assert digits[0] == -colour[0]
    after = questions.compared_in_words(name, digits, colour)
    assert f"ahead on digits, behind in colour: **disagree**. {questions.WHY[name]}." in after
    assert after in questions.beside_the_digits(both)


def test_what_is_within_the_noise_neither_agrees_nor_disagrees(questions, both):
    name = "random fixed positions against learned"
    text = questions.compared_in_words(name, *questions.side_by_side(both)[name])
    assert "ahead by less than the noise in colour: **cannot tell**." in text


def test_a_question_that_lacks_runs_in_colour_is_left_out_and_counted(questions, job, both):
    done = {}
    for model in questions.variants(questions.COLOUR_QUESTIONS):
        for trial in questions.trials(*model):
            done[job.plan_key(trial)] = {"val_loss": trial["learning_rate"]}
        for run in questions.final_runs(*model, done):
            done[job.plan_key(run)] = {"parameters": run}
    everything = questions.answered(questions.COLOUR_QUESTIONS, done)
    assert everything == questions.COLOUR_QUESTIONS
    assert "have their runs" in questions.left_in_words(everything, done)
    del done[next(key for key in done if "pos_embed" in key and '"seed": 2' in key)]
    found = questions.answered(questions.COLOUR_QUESTIONS, done)[questions.COLOUR]
    assert set(everything[questions.COLOUR]) - set(found) == {"positions"}
    said = questions.left_in_words(questions.COLOUR_QUESTIONS, done)
    assert "runs left: positions (1); in all 1," in said
    del both[questions.COLOUR]["positions"]
    left = set(questions.ON_DIGITS) - set(questions.side_by_side(both))
    assert left == {name for name in questions.ON_DIGITS if "positions" in name}
    assert questions.beside_the_digits({"digits": both["digits"]}) == ""


# ---------------------------------------------------------------- position embeddings

@pytest.mark.parametrize(("pool", "merge_at"), [("cls", ()), ("mean", (2,))])
@pytest.mark.parametrize("kind", ["sine", "short sine", "none", "random", None])
def test_fixed_position_embeddings(questions, models, kind, pool, merge_at):
    def fresh():
        torch.manual_seed(0)
        return models.ViT(8, 2, 1, 10, dims=(16, 16), head_dim=8, pool=pool, merge_at=merge_at)

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

def test_a_study_goes_on_after_a_line_that_was_cut_off(questions, job, tmp_path):
    path = tmp_path / "study.jsonl"
    plan = [{**MERGED, "pos_embed": "none", "seed": 1, "test": False}, {**TINY, "seed": 2}]

    def train():                    # what each process of a plan does, see test_sweep.py
        for run in plan:
            assert job.train_unless_taken(run, path, change=questions.fix_pos_embed,
                                          own=questions.OWN) is None
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


@pytest.fixture
def planned(questions, monkeypatch, tmp_path):
    """The calls of `train_plan`, (plan, options); it writes rows without any training."""
    calls = []

    def train_plan(plan, lines, **options):
        calls.append((plan, options))
        done = questions.job.read_lines(lines)
        with open(lines, "a") as file:
            for run in [run for run in plan if questions.job.plan_key(run) not in done]:
                row = {"parameters": run, "val_loss": run["learning_rate"], "test_accuracy": 0.5}
                file.write(json.dumps(row) + "\n")

    monkeypatch.setattr(questions.job, "train_plan", train_plan)
    monkeypatch.setattr(vit_helpers, "typed_path", lambda path: tmp_path)
    return calls


def test_the_study_is_two_calls_of_the_one_way_to_train(questions, job, planned, tmp_path):
    questions.run_study(tmp_path / "study.jsonl")
    assert len(planned) == 2
    options = {"change": questions.fix_pos_embed, "own": ("pos_embed",)}
    assert [each for _, each in planned] == [{**options, "wait": True}, options]
    questions.check_complete(questions.GREY_QUESTIONS, job.read_lines(tmp_path / "study.jsonl"))


def test_in_colour_all_minutes_come_first_and_then_one_question_after_the_other(
        questions, job, planned, tmp_path, monkeypatch):
    announced, announce = [], inspect.signature(job.announce)
    monkeypatch.setattr(job, "announce",
                        lambda *given: announced.append(announce.bind(*given).args))
    path = tmp_path / "colour.jsonl"
    lines = COLOUR.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:18]))                    # the first question is answered
    before = job.read_lines(path)
    questions.run_colour(path)
    (everything, missing, own, _), = announced
    assert (len(everything), own) == (54, ("pos_embed",))
    assert len(missing) == len(everything) - len(before)
    after = job.read_lines(path)
    assert set(before) <= set(after) and len(after) == len(everything)
    names = [name for plan, _ in planned[::2] for name in ("pos_embed", "patch_size", "pool")
             if len({run.get(name) for run in plan}) > 1]
    assert names == ["pool", "pos_embed", "patch_size"]
    planned.clear()
    questions.run_colour(path)
    assert not planned                                          # nothing is left to train
