"""The task `steer`, its scores, and `mmlens steer`: against answers that are asked by hand."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from question_files import write_okvqa, write_pope
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from small_models import picture
from sweep_cases import in_order, made_model
from test_chair import write_coco
from typer.testing import CliRunner

from mmlens import (
    HookedMultimodalTransformer,
    SteeringScores,
    SteeringVector,
    VisualQuestion,
    demo_questions,
    steering_scores,
    steering_vector,
)
from mmlens.analyses.steering_scores import kind_of, scored
from mmlens.cli.app import app
from mmlens.data import (
    chair_scores,
    objects_in,
    okvqa,
    open_questions,
    pope,
    says_yes,
    soft_accuracy,
)
from mmlens.sweeps import ImpossibleTask, OtherSettings, SteerTask, Sweep, sweep

SCALES = (-3.0, 0.0, 8.0)


@pytest.fixture
def model(seed: int) -> Any:
    return made_model(seed)


@pytest.fixture
def vector(model: Any, seed: int, tmp_path: Path) -> Path:
    """From two pairs of images, in both layers."""
    prompts = [model.prepare("what is this", picture(seed + n)) for n in range(4)]
    found = steering_vector(model, prompts[:2], prompts[2:])
    return found.save(tmp_path / "v.safetensors")


def made_images(folder: Path, names: list[str]) -> None:
    for n, name in enumerate(names):
        picture(n).save(folder / name)


def asked_by_hand(
    model: Any,
    path: Path,
    question: VisualQuestion,
    layer: int,
    scale: float,
    n: int,
    **options: Any,
) -> str:
    """The answer with hooks that add the layer's vector where the answer's tokens are chosen."""
    vector = SteeringVector.load(path)
    inputs = model.prepare(question.prompt(), question.open_images())
    added = scale * vector.vectors[vector.layers.index(layer)]
    last = inputs.n_pos - 1

    def edit(resid: Any, hook: Any, positions: Any = None) -> Any:
        where = torch.arange(resid.shape[1]) if positions is None else positions
        resid[:, where >= last] += added.to(resid)
        return resid

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", edit)]):
        return str(model.generate(inputs, n, do_sample=False))


def test_answers_are_those_asked_by_hand(model: Any, vector: Path, tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(3)]
    made_images(tmp_path, names)
    asked = [(f"thing {n}", names[n % 3], ("yes", "no")[n % 2]) for n in range(5)]
    path = write_pope(tmp_path, asked)
    options = {"vector": str(vector), "scales": SCALES, "max_new_tokens": 4, "shard_size": 2}
    found = sweep("steer", model, f"pope:{path}", tmp_path / "out", progress=False, **options)
    table = in_order(found)
    assert found.n_failed == 0 and len(table) == 5 * 2 * len(SCALES)
    questions = pope(path, tmp_path)
    for row in table.itertuples():
        question = questions[row.question]
        said = asked_by_hand(model, vector, question, row.layer, row.scale, 4)
        assert row.said == said
        assert row.says_yes == says_yes(said) and row.is_yes == (question.answers[0] == "yes")
        assert row.score == float(row.says_yes == row.is_yes)
    unsteered = table[table["scale"] == 0].set_index(["question", "layer"])
    for row in table.itertuples():
        right = bool(unsteered.loc[(row.question, row.layer), "score"] == 1)
        assert row.is_right == right
    assert set(found.summarize(samples=50).table["measure"]) == {"score"}

    scores = steering_scores({"POPE": found.results()})
    assert scores.layers == (0, 1) and scores.scales == SCALES
    for i, layer in enumerate(scores.layers):
        for s, scale in enumerate(SCALES):
            cell = table[(table["layer"] == layer) & (table["scale"] == scale)]
            says, truth = cell["says_yes"].astype(bool), cell["is_yes"].astype(bool)
            expected = {
                "accuracy": accuracy_score(truth, says),
                "precision": precision_score(truth, says, zero_division=np.nan),
                "recall": recall_score(truth, says, zero_division=np.nan),
                "f1": f1_score(truth, says, zero_division=np.nan),
                "yes_rate": says.mean(),
            }
            for measure, value in expected.items():
                got = float(scores.of("POPE", measure)[i, s])
                assert got == pytest.approx(value, nan_ok=True), measure
    assert (scores.n == 5).all()
    assert len(scores.to_dataframe()) == 5 * 2 * 3
    assert len(scores.plot().data) == 5 * 2
    again = SteeringScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert torch.equal(again.n, scores.n) and again.scales == SCALES
    with pytest.raises(ValueError, match="no chair_i of POPE"):
        scores.of("POPE", "chair_i")


def extremes(measure: Any, rows: list[Any]) -> tuple[float, float, float]:
    """A measure of all rows, and the ends of its interval where two images are drawn from.

    A resample is one image twice (with a chance of 1/4 each), or both; 1 in 40 are beyond an end.
    Resamples in which the measure is not defined do not count.
    """
    images = sorted({row["cluster"] for row in rows})
    assert len(images) == 2
    drawn = [[row for row in rows if row["cluster"] == each] for each in images]
    found = [measure(each) for each in (rows, *drawn)]
    return found[0], float(np.nanmin(found)), float(np.nanmax(found))


def test_intervals_draw_images(seed: int) -> None:
    """Of yes and no, and of captions, against sklearn's measures of each resample."""
    chance = random.Random(seed)
    place = {"layer": 3, "scale": 0.0}
    rows = [
        {"kind": "yes or no", "cluster": image, "says_yes": yes, "is_yes": wanted} | place
        for image, wanted in zip("aabbab", (True, False) * 3, strict=True)
        for yes in [chance.random() < 0.5]
    ]
    rows[0]["says_yes"] = True  # precision is defined of all together, and perhaps of one alone
    chance.shuffle(rows)
    scores = steering_scores(pd.DataFrame(rows))
    measures = {
        "accuracy": accuracy_score,
        "precision": partial(precision_score, zero_division=np.nan),
        "recall": partial(recall_score, zero_division=np.nan),
        "f1": partial(f1_score, zero_division=np.nan),
        "yes_rate": lambda wanted, says: np.mean(says),
    }
    for at, name in enumerate(scores.measures):

        def of_rows(some: list[Any], name: str = name) -> float:
            return measures[name](
                [row["is_yes"] for row in some], [row["says_yes"] for row in some]
            )

        found = [float(each[at, 0, 0]) for each in (scores.values, scores.low, scores.high)]
        assert found == pytest.approx(extremes(of_rows, rows), abs=1e-12), name

    objects = {"a": ("dog", "couch"), "b": ("cat",)}
    said = ["A dog.", "A cat and a dog.", "Nothing.", "A cat on a couch."]
    captions = [
        scored(VisualQuestion("What?", None, extra={"objects": objects[image]}), text)
        | {"cluster": image, "said": text}
        | place
        for image, text in zip("aabb", chance.sample(said, 4), strict=True)
    ]
    scores = steering_scores({"COCO": pd.DataFrame(captions)})
    for name in ("chair_i", "chair_s", "recall"):

        def of_captions(some: list[Any], name: str = name) -> float:
            there = [objects[row["cluster"]] for row in some]
            return getattr(chair_scores([row["said"] for row in some], there), name)

        at = scores.measures.index(name)
        found = [float(each[at, 0, 0]) for each in (scores.values, scores.low, scores.high)]
        assert found == pytest.approx(extremes(of_captions, captions), abs=1e-12), name
    assert {"low", "high"} <= set(scores.to_dataframe().columns)
    assert len(scores.plot().data[0].error_y.array) == 1
    # One image alone says nothing about others.
    alone = steering_scores(pd.DataFrame([row | {"cluster": "a"} for row in rows]))
    assert bool(alone.low.isnan().all())
    assert torch.equal(alone.values[0], scores_of(rows, "accuracy"))


def scores_of(rows: list[Any], measure: str) -> Any:
    """A measure of rows without images: each question is drawn by itself."""
    table = pd.DataFrame(rows).drop(columns="cluster")
    scores = steering_scores(table)
    low, value, high = (
        each[scores.measures.index(measure)] for each in (scores.low, scores.values, scores.high)
    )
    assert bool((low <= value).all()) and bool((value <= high).all())
    return value


def test_a_data_set_with_several_kinds_of_questions(seed: int) -> None:
    """Both kinds have an accuracy, and one took the other's place."""
    chance = random.Random(seed)
    yes = VisualQuestion("Is it?", None, answers=("yes",))
    what = VisualQuestion("What?", None, answers=("dog",))
    place = {"layer": 3, "scale": 2.0}
    given = [scored(yes, chance.choice(["yes", "no"])) for _ in range(5)]
    given += [scored(what, chance.choice(["dog", "cat"])) for _ in range(4)]
    rows = pd.DataFrame([each | place for each in given])
    scores = steering_scores({"GQA": rows, "plain": rows[rows["kind"] == "answer"]})
    for data, kind in (
        ("GQA (yes or no)", "yes or no"),
        ("GQA (answer)", "answer"),
        ("plain", "answer"),
    ):
        right = [each["score"] for each in given if each["kind"] == kind]
        assert float(scores.of(data, "accuracy")) == pytest.approx(sum(right) / len(right))
        at = list(zip(scores.data, scores.measures, strict=True)).index((data, "accuracy"))
        assert int(scores.n[at]) == len(right)


def test_a_sweep_goes_on_and_knows_its_vector(model: Any, vector: Path, tmp_path: Path) -> None:
    made_images(tmp_path, ["0.jpg"])
    path = write_pope(tmp_path, [(f"thing {n}", "0.jpg", "yes") for n in range(3)])
    options: dict[str, Any] = {"scales": (0.0, 1.0), "max_new_tokens": 2, "shard_size": 1}
    where: Any = (f"pope:{path}", tmp_path / "out")
    first = sweep("steer", model, *where, vector=str(vector), progress=False, **options)
    files = sorted((tmp_path / "out" / "results").iterdir())
    kept = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    moved = vector.rename(tmp_path / "moved.safetensors")
    again = sweep("steer", model, *where, vector=str(moved), progress=False, **options)
    assert [f.stat().st_mtime_ns for f in files][::2] == kept[::2]
    pd.testing.assert_frame_equal(in_order(again), in_order(first))
    other = SteeringVector.load(moved)
    changed = SteeringVector(
        vectors=other.vectors + 1e-3,
        activation_norms=other.activation_norms,
        margins=other.margins,
        layers=other.layers,
        site=other.site,
        method=other.method,
    )
    changed.save(moved)
    with pytest.raises(OtherSettings, match="vector"):
        sweep("steer", model, *where, vector=str(moved), progress=False, **options)


def test_captions_and_what_it_costs_elsewhere(model: Any, vector: Path, tmp_path: Path) -> None:
    coco, vqa = write_coco(tmp_path), write_okvqa(tmp_path, [("What?", 42), ("Who?", 42)])
    made_images(tmp_path, [f"COCO_val2014_{n:012d}.jpg" for n in (7, 8, 9)])
    (tmp_path / "val2014").mkdir()
    made_images(tmp_path / "val2014", ["COCO_val2014_000000000042.jpg"])
    options = {"vector": str(vector), "scales": (0.0, 4.0), "layers": (1,), "max_new_tokens": 5}
    found = {
        "COCO": sweep("steer", model, f"coco:{coco}", tmp_path / "a", progress=False, **options),
        "OK-VQA": sweep(
            "steer", model, okvqa(*vqa, tmp_path), tmp_path / "b", progress=False, **options
        ),
    }
    assert all(each.n_failed == 0 for each in found.values())
    scores = steering_scores({name: each.results() for name, each in found.items()})
    assert scores.data == ("COCO",) * 4 + ("OK-VQA",)
    questions = open_questions(f"coco:{coco}")
    for s, scale in enumerate(scores.scales):
        said = [asked_by_hand(model, vector, each, 1, scale, 5) for each in questions]
        expected = chair_scores(said, [each.extra["objects"] for each in questions])
        for measure in ("chair_i", "chair_s", "recall"):
            got = float(scores.of("COCO", measure)[0, s])
            assert got == pytest.approx(getattr(expected, measure), nan_ok=True)
        assert float(scores.of("COCO", "objects")[0, s]) == expected.n_named / 3
        right = [
            soft_accuracy(
                asked_by_hand(model, vector, each, 1, scale, 5), each.answers, leave_one_out=True
            )
            for each in okvqa(*vqa, tmp_path)
        ]
        assert float(scores.of("OK-VQA", "accuracy")[0, s]) == pytest.approx(np.mean(right))
    assert scores.n[:, 0, 0].tolist() == [3, 3, 3, 3, 2]
    scores.plot()


def test_how_each_kind_of_answer_is_scored() -> None:
    caption = VisualQuestion("Describe it", None, extra={"objects": ("dog", "couch")})
    assert scored(caption, "A dog and a cat.") == {
        "kind": "caption", "score": 0.5, "named": 2, "hallucinated": 1, "there": 2, "found": 1,
    }  # fmt: skip
    assert scored(caption, "Nothing")["score"] is None
    choice = VisualQuestion("Which?", None, answers=("a cat",), options=("a dog", "a cat"))
    assert scored(choice, "(B)") == {"kind": "answer", "score": 1.0}
    assert scored(choice, "(A)")["score"] == 0.0
    annotated = VisualQuestion(
        "What?", None, answers=("a", "a", "b", "c"), extra={"raw_answers": ("a", "a", "b", "c")}
    )
    assert scored(annotated, "a")["score"] == soft_accuracy("a", ("a", "a", "b", "c"),
                                                            leave_one_out=True)  # fmt: skip
    assert kind_of(VisualQuestion("Is it?", None, answers=("No",))) == "yes or no"
    # Neither annotators who say yes or no make it POPE's, nor options that read so.
    said = ("yes", "yes", "yes", "no")
    disputed = VisualQuestion("Is it?", None, answers=said, extra={"raw_answers": said})
    expected = soft_accuracy("no", said, leave_one_out=True)
    assert scored(disputed, "no") == {"kind": "answer", "score": expected}
    options = VisualQuestion("Is it?", None, answers=("No",), options=("Yes", "No"), choice="B")
    assert scored(options, "B") == {"kind": "answer", "score": 1.0}
    of_mmmu = VisualQuestion("Is it?", None, answers=("Yes",), extra={"difficulty": "Easy"})
    assert scored(of_mmmu, "Perhaps")["score"] == 0.0
    with pytest.raises(ValueError, match="has no answer to score by"):
        kind_of(VisualQuestion("What?", None, source="mine/1"))
    assert objects_in("no objects") == []


def test_what_cannot_be_swept_is_refused(model: Any, vector: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steer needs a vector"):
        SteerTask()
    with pytest.raises(ValueError, match="each once"):
        SteerTask(vector=str(vector), scales=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"layers \[5\]: the vector of .* has \[0, 1\]"):
        SteerTask(vector=str(vector), layers=(5,))
    other = SteeringVector(
        vectors=torch.ones(1, 3),
        activation_norms=torch.ones(1),
        margins=torch.ones(1, 1),
        layers=(0,),
        site="mlp_out",
        method="pca",
    )
    path = other.save(tmp_path / "other.safetensors")
    questions = [VisualQuestion("Is it?", None, answers=("yes",))]
    with pytest.raises(ImpossibleTask, match=r"a vector of \(3,\) for mlp_out"):
        sweep("steer", model, questions, tmp_path / "out", vector=str(path), progress=False)
    with pytest.raises(ValueError, match="no rows of a sweep of the task steer"):
        steering_scores(pd.DataFrame({"question": [1]}))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.slow
def test_steer_and_sweep_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the demo model, loaded once, with a vector of words."""
    model = HookedMultimodalTransformer.from_pretrained("demo")
    monkeypatch.setattr(
        HookedMultimodalTransformer, "from_pretrained", lambda *names, **options: model
    )
    question = demo_questions(relation="capital")[0]
    question.open_images()[0].save(tmp_path / "flag.png")
    texts = ["Paris is nice", "Rome is nice"], ["A dog is nice", "A tree is nice"]
    found = steering_vector(model, *texts, layers=[12, 20])
    path = found.save(tmp_path / "v.safetensors")
    image = tmp_path / "flag.png"
    result = run(
        "steer", image, question.question, "--vector", path, "--scale", "-2", "--layers", "20",
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    inputs = model.prepare(question.question, image)
    steered = found.of_answers(inputs, -2, layers=[20])
    for interventions in ([], steered):
        said = model.generate(inputs, 4, do_sample=False, interventions=interventions)
        assert str(said).strip() in result.output.replace("\n", " ")
    assert "resid_post, layers 20" in result.output
    wrong = run("steer", image, "What?", "--vector", tmp_path / "none.safetensors")
    assert wrong.exit_code != 0 and "no such file" in str(wrong.exception)
    wrong = run("steer", image, "What?", "--vector", path, "--positions", "sky")
    assert wrong.exit_code != 0 and "no span is called 'sky'" in str(wrong.exception)
    row = {"question": question.question, "image": "flag.png", "answers": list(question.answers)}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    result = run(
        "sweep", "steer", "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "out",
        "--vector", path, "--scales", "-1,0,1", "--layers", "20", "--max-new-tokens", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(Sweep(tmp_path / "out").results()["scale"]) == [-1.0, 0.0, 1.0]
    wrong = run("sweep", "steer", "--out", tmp_path / "x", "--vector", path, "--scales", "a,b")
    assert wrong.exit_code != 0 and "--scales: numbers" in str(wrong.exception)
