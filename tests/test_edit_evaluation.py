"""Evaluation of edits: replies and metrics against plain runs; known numbers on planted facts."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from planted_edits import PlantedEdits
from planted_models import N_ENTITIES
from small_models import picture, worded_model
from transformers import GenerationConfig

from mmlens.data import EditCase, VisualQuestion
from mmlens.editing import Edit, LowRank, SequentialEditor
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.editing.evaluation import (
    Examination,
    Unrelated,
    evaluate,
    evaluate_sequence,
    request_of,
)
from mmlens.editing.examiner import IMAGES_KEPT, Examiner, score

TEXTS = (
    "The capital of this country is the city of",
    "The flag of this nation is",
    "Which of the countries is larger, the first or",
)
ANSWERS = ("Paris", "red, white", "the second country", "first")


@pytest.fixture
def model(seed):
    return worded_model(seed).double()


def some_questions(seed, n_images=2):
    chance = random.Random(seed)
    images = [picture(seed + i) for i in range(n_images)] + [None]
    return [
        VisualQuestion(
            text,
            image,
            answers=tuple(chance.sample(ANSWERS, 2)),
            subject=f"subject {index}",
            source=f"test/{index}/{text[:9]}",
        )
        for index, image in enumerate(images)
        for text in TEXTS
    ]


def random_edit(model, layer, size=0.5):
    weight = model.blocks[layer].mlp.down.weight
    left = size * torch.randn(weight.shape[0], 2, dtype=weight.dtype)
    right = torch.randn(2, weight.shape[1], dtype=weight.dtype)
    return Edit.of(
        model, {f"blocks.{layer}.mlp.down.weight": LowRank(left, right)}, method="random"
    )


def by_hand(model, examiner, question):
    """Greedy tokens, the joint probability and log probabilities, each by whole forward passes."""
    inputs = examiner.prepared(question)
    with torch.no_grad():
        log_probs = model(inputs)[0, -1].log_softmax(-1)
        ids = [
            model.tokenizer(f" {a}", add_special_tokens=False).input_ids for a in question.answers
        ]
        probability = 1.0
        for n, token in enumerate(ids[0]):
            logits = model(inputs.append(torch.tensor(ids[0][:n])) if n else inputs)[0, -1]
            probability *= float(logits.softmax(-1)[token])
        n_tokens = max(map(len, ids)) + 1
        tokens = model.generate(inputs, n_tokens, return_type="tokens")[0, inputs.n_pos :].tolist()
    ends = [n for n, token in enumerate(tokens) if token in model.cfg.eos_token_ids]
    return tuple(tokens[: ends[0]] if ends else tokens), probability, log_probs


def test_replies_are_those_of_plain_runs(seed, model):
    examiner, questions = Examiner(model), some_questions(seed)
    replies = examiner.ask(questions)
    drafts = [replace(reply, tokens=(*reply.tokens[:1], 5)) for reply in replies]
    again = examiner.ask(questions, drafts)
    for question, reply, other in zip(questions, replies, again, strict=True):
        tokens, probability, log_probs = by_hand(model, examiner, question)
        assert reply.tokens == other.tokens == tokens
        assert reply.said == model.to_string(tokens, skip_special_tokens=True)
        assert reply.probability == pytest.approx(probability, rel=1e-6)
        assert reply.score == float(question.is_right(reply.said))
        torch.testing.assert_close(reply.log_probs, log_probs, rtol=1e-6, atol=1e-9)
        assert reply.drift(reply) == pytest.approx(0.0, abs=1e-12)


def test_replies_are_greedy_under_the_checkpoints_settings(seed, model):
    """A penalty on what the row holds depends on what came before each token."""
    examiner, questions = Examiner(model), some_questions(seed)
    plain = examiner.ask(questions)
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "do_sample": True}
    model.generation_config = GenerationConfig(**settings)
    replies = examiner.ask(questions, plain)
    assert [reply.tokens for reply in replies] != [reply.tokens for reply in plain]
    for question, reply in zip(questions, replies, strict=True):
        inputs = examiner.prepared(question)
        tokens = model.generate(
            inputs, len(reply.tokens), do_sample=False, return_type="tokens", stop_at_eos=False
        )
        assert list(reply.tokens) == tokens[0, inputs.n_pos :].tolist()


def test_images_are_encoded_once(seed, model, monkeypatch):
    encoded = []
    forward = model.vision.forward
    monkeypatch.setattr(
        model.vision,
        "forward",
        lambda pixels, *more: encoded.append(len(pixels)) or forward(pixels, *more),
    )
    examiner, questions = Examiner(model), some_questions(seed)
    before = examiner.ask(questions)
    with random_edit(model, 1).applied(model):
        examiner.ask(questions, before)
    assert sum(encoded) == 2 < IMAGES_KEPT


def test_scores():
    plain = VisualQuestion("?", None, answers=("Rome",))
    assert (score(plain, "Rome, Italy"), score(plain, "Romeo")) == (1.0, 0.0)
    assert np.isnan(score(replace(plain, answers=()), "Rome"))
    choice = replace(plain, answers=("a dog",), options=("a cat", "a dog"))
    assert (score(choice, "B"), score(choice, "A")) == (1.0, 0.0)
    vqa = replace(plain, source="okvqa/1", answers=("cat", "cat", "dog"))
    assert score(vqa, "cat.\nand more") == pytest.approx(2 / 3)


def some_case(seed):
    questions = some_questions(seed)
    return EditCase(
        question=questions[0],
        target="Paris",
        paraphrases=(questions[1],),
        other_images=(replace(questions[0], image=picture(seed + 9)),),
        neighbours={"same image": (questions[2],), "text": (questions[6],)},
        portability=(questions[7],),
    )


def test_an_evaluation_is_what_plain_runs_say(seed, model):
    case, layer = some_case(seed), random.randrange(model.cfg.n_layers)
    edit = random_edit(model, layer)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    others = some_questions(seed + 20, 1)
    found = evaluate(model, [edit], [case], unrelated={"others": others}, n_unrelated=2)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    table = found.to_dataframe()
    assert table["group"].tolist() == [
        *("efficacy", "paraphrases", "other images", "same image", "text", "portability"),
        *("unrelated: others",) * 2,
    ]
    asked = [each for group in case.groups().values() for each in group]
    asked += [next(q for q in others if q.source == s) for s in table["question"][len(asked) :]]
    examiner = Examiner(model)
    before = [by_hand(model, examiner, question) for question in asked]
    with edit.applied(model):
        after = [by_hand(model, examiner, question) for question in asked]
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        assert table["probability_before"][row] == pytest.approx(old[1], rel=1e-6)
        assert table["probability"][row] == pytest.approx(new[1], rel=1e-6)
        assert table["said"][row] == model.tokenizer.decode(new[0], skip_special_tokens=True)
        assert table["unchanged"][row] == (old[0] == new[0])
        divergence = float((old[2].exp() * (old[2] - new[2])).sum())
        assert table["drift"][row] == pytest.approx(divergence, rel=1e-6, abs=1e-9)


def test_the_target_is_what_is_expected(seed, model):
    groups = some_case(seed).groups()
    for name in ("efficacy", "paraphrases", "other images"):
        assert all(question.answers == ("Paris",) for question in groups[name])
    assert groups["same image"] == some_case(seed).neighbours["same image"]


def made_up(n_edits=5, n_rows=40, **changes):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    values = {
        "edit": torch.arange(n_rows) % n_edits,
        "group": tuple(("efficacy", "others")[i % 2] for i in range(n_rows)),
        "question": tuple(map(str, range(n_rows))),
        "said_before": ("a",) * n_rows,
        "said": ("b",) * n_rows,
        "probability": torch.rand(n_rows, 2, generator=generator).double(),
        "score": (torch.rand(n_rows, 2, generator=generator) < 0.5).double(),
        "unchanged": torch.rand(n_rows, generator=generator) < 0.5,
        "drift": torch.rand(n_rows, generator=generator).double(),
        "case": tuple(f"case {i}" for i in range(n_edits)),
        "cluster": tuple(f"cluster {i % 3}" for i in range(n_edits)),
        "target": ("x",) * n_edits,
        "n_edits": torch.ones(n_edits, dtype=torch.long),
        "seconds": torch.rand(n_edits, generator=generator).double(),
        "memory": torch.randint(100, (n_edits,), generator=generator),
        "metadata": {"method": "made up"},
    }
    return EditEvaluation(**{**values, **changes})


def test_summaries_are_means_over_questions(seed, tmp_path):
    found = made_up()
    found.score[::4] = torch.nan  # no answer is known
    table = found.summary(samples=50).set_index(["group", "measure"])
    rows = found.to_dataframe()
    for group, part in rows.groupby("group"):
        for measure in ("probability", "score", "unchanged", "drift"):
            line = table.loc[group, measure]
            assert line["mean"] == pytest.approx(part[measure].mean())
            assert line["low"] <= line["mean"] <= line["high"]
            if measure in ("probability", "score"):
                change = (part[measure] - part[f"{measure}_before"]).mean()
                assert line["before"] == pytest.approx(part[f"{measure}_before"].mean())
                assert line["change"] == pytest.approx(change)
    costs = found.costs()
    for measure in ("seconds", "memory"):
        assert table.loc["cost", measure]["mean"] == pytest.approx(costs[measure].mean())
    again = EditEvaluation.load(found.save(tmp_path / "found.safetensors"))
    assert again.summary(samples=50).equals(found.summary(samples=50))
    assert again.metadata == found.metadata and again.said == found.said


def test_an_edit_that_breaks_the_model_is_not_left_out(seed):
    """The means were those of the other edits."""
    found = made_up()
    at = random.randrange(0, 40, 2)  # of the group "efficacy"
    found.probability[at, 1] = found.drift[at] = torch.nan
    table = found.summary(samples=50).set_index(["group", "measure"])
    for measure in ("probability", "drift"):
        line = table.loc["efficacy", measure]
        assert line[["mean", "low", "high", "change"]].isna().all()
        assert table.loc["others", measure]["mean"] > 0
    expected = found.probability[::2, 0].mean()
    assert table.loc["efficacy", "probability"]["before"] == pytest.approx(float(expected))
    assert table.loc["efficacy", "score"].drop(["n_edits", "edits", "questions"]).notna().all()


def test_clusters_without_a_known_score_leave_the_interval_as_it_is(seed):
    found = made_up(n_edits=6, n_rows=60)  # edits 0 and 3 are cluster 0
    lost = found.edit % 3 == 0
    found.score[lost] = torch.nan
    kept = (~lost).nonzero().flatten().tolist()
    alone = replace(
        found,
        edit=found.edit[kept],
        group=tuple(found.group[i] for i in kept),
        question=tuple(found.question[i] for i in kept),
        said_before=found.said_before[: len(kept)],
        said=found.said[: len(kept)],
        **{name: getattr(found, name)[kept] for name in ("probability", "score")},
        **{name: getattr(found, name)[kept] for name in ("unchanged", "drift")},
    )
    tables = [
        each.summary(samples=50)
        .query("measure == 'score'")
        .drop(columns=["edits", "questions"])
        .set_index("group")
        .sort_index()
        for each in (found, alone)
    ]
    assert tables[0].notna().all(axis=None)
    assert tables[0].equals(tables[1])


def test_evaluations_are_joined_edit_by_edit(seed):
    one, other = made_up(2, 6), made_up(3, 8)
    both = EditEvaluation.joined([one, other], layer=3)
    tables = [each.to_dataframe() for each in (one, other)]
    found = both.to_dataframe()
    assert found["case"].tolist() == [case for table in tables for case in table["case"]]
    assert found["edit"].tolist() == [*tables[0]["edit"], *(tables[1]["edit"] + 2)]
    assert both.metadata == {"method": "made up", "layer": 3}
    with pytest.raises(ValueError, match="no evaluations"):
        EditEvaluation.joined([])


def test_figures_show_every_group_and_measure(seed):
    figure = made_up().plot()
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert [list(bar.x) for bar in bars] == [["efficacy", "others"]] * 2
    summary = made_up().summary(samples=20)
    sequence = replace(made_up(), n_edits=torch.tensor([1, 1, 2, 2, 2])).plot("mine")
    assert {trace.name for trace in sequence.data if trace.name} == {"mine", "before"}
    assert len([trace for trace in sequence.data if trace.name]) == 8  # groups x measures x lines
    from mmlens.plots.editing import plot_edits

    with pytest.raises(ValueError, match="method"):
        plot_edits(summary)


def test_unrelated_questions_are_not_about_the_subject(seed):
    questions = some_questions(seed)
    case = EditCase(question=questions[0], target="Paris")
    drawn = Unrelated({"all": questions}, n=100).drawn(case)
    assert {row for _, row in drawn} == set(range(3, 9))
    assert drawn == Unrelated({"all": questions}, n=100).drawn(case)
    assert len(Unrelated({"all": questions}, n=4).drawn(case)) == 4


# Planted facts


def test_planted_facts_have_the_known_numbers(seed):
    world = PlantedEdits(seed)
    planted = world.planted
    cases = [world.case(entity) for entity in range(N_ENTITIES)]
    unrelated = {"others": [world.question(entity) for entity in range(N_ENTITIES)]}
    found = evaluate(world.model, world.edit_of, cases, unrelated=unrelated)
    table = found.to_dataframe()
    edited = table["group"].isin(["efficacy", "paraphrases", "other images"])
    assert len(table[edited]) == 4 * N_ENTITIES
    assert (table[edited]["score"] == 1).all() and (table[edited]["score_before"] == 0).all()
    assert table[edited]["probability"].min() >= planted.least
    assert table[edited]["probability_before"].max() <= planted.most
    kept = table[~edited]
    assert len(kept) == 4 * N_ENTITIES  # two neighbours, and two unrelated ones
    for when in ("", "_before"):
        assert (kept[f"score{when}"] == 1).all()
        assert kept[f"probability{when}"].min() >= planted.least
    # -log of what is left to all but the answer bounds the divergence from a sure distribution.
    assert kept["drift"].max() <= -np.log(planted.least) + 1e-6
    assert table[edited]["drift"].min() > kept["drift"].max()
    assert bool((found.seconds > 0).all())


def test_planted_facts_stay_while_others_are_edited(seed):
    world = PlantedEdits(seed)
    cases = [world.case(entity) for entity in range(N_ENTITIES)]
    by_target = {id(case): case for case in cases}
    order = iter(by_target.values())

    def method(model, request):
        return world.edit_of(next(order))

    stopped = []
    with SequentialEditor(world.model, method) as editor:
        found = evaluate_sequence(
            editor,
            lambda case: request_of(world.model, case),
            cases,
            at=(1, 2),
            found=lambda number, each: stopped.append((number, len(each.case))),
        )
    assert stopped == [(1, 1), (2, 2), (3, 3)]
    assert found.n_edits.tolist() == [1, 2, 2, 3, 3, 3]
    table = found.to_dataframe()
    rows = table["group"].isin(["efficacy", "paraphrases", "other images"])
    assert (table[rows]["score"] == 1).all()
    assert table[rows]["probability"].min() >= world.planted.least
    with SequentialEditor(world.model, method) as editor:  # all is known: nothing is edited
        parts = {n: Examination(Examiner(world.model), cases[0]).after() for n in (1, 2, 3)}
        evaluate_sequence(editor, pytest.fail, cases, at=(1, 2), done=parts)
        assert editor.edits == []


def test_requests_say_nothing_that_is_asked(seed):
    world = PlantedEdits(seed)
    case = replace(world.case(0), key_questions=(world.question(0),), kept=(world.question(1),))
    request = request_of(world.model, case, n_key_questions=1, n_kept=1)
    assert (request.target, request.span) == (case.target, "constraint")
    assert (len(request.key_prompts), len(request.neighbours)) == (1, 1)
    assert not request_of(world.model, case).key_prompts
    last = max(request.inputs.span("constraint").tolist())
    assert request.position(request.inputs) == last
    unnamed = replace(case, question=replace(case.question, visual_constraint=""))
    assert request_of(world.model, unnamed).span == "question"
    assert request_of(world.model, case, target_end=" .").target == f"{case.target} ."


def test_bars_of_many_methods_look_different():
    from mmlens.plots.editing import bars_of

    points = pd.DataFrame(
        {"mean": [0.5], "high": [0.6], "low": [0.4], "before": [0.1]}, ["efficacy"]
    )
    bars = [bars_of(points, str(n), n, in_legend=True).marker for n in range(12)]
    assert len({(each.color, each.pattern.shape) for each in bars}) == 12


def test_edits_and_cases_must_be_as_many(seed):
    world = PlantedEdits(seed)
    with pytest.raises(ValueError, match="1 edits for 2 cases"):
        evaluate(world.model, [world.edit(0, 20)], [world.case(0), world.case(1)])
