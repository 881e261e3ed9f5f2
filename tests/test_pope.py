"""POPE: its questions, and the scores of answers yes and no against its own formulas."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from PIL import Image
from question_files import write_pope

from mmlens.data import open_questions, pope, says_yes, yes_no_scores

SAID = (
    ("Yes", True),
    ("No", False),
    ("no", False),
    ("Yes, there is a dog in the image.", True),
    ("No, there is no dog.", False),
    ("There is not a dog in the image. Yes.", False),
    ("Yes. No, wait", True),
    ("A dog, not a cat", False),
    ("I see nothing", True),
    ("", True),
    ("No\n", False),
)


def by_hand(said: list[str], labels: list[str]) -> dict[str, float]:
    """What RUCAIBox/POPE's evaluate.py counts, for answers without line ends."""
    pairs = []
    for text, label in zip(said, labels, strict=True):
        words = text.split(".")[0].replace(",", "").split(" ")
        pairs.append(("No" not in words and "not" not in words and "no" not in words, label))
    right = sum(yes == (label == "yes") for yes, label in pairs)
    both = sum(yes and label == "yes" for yes, label in pairs)
    n_yes, n_label = sum(yes for yes, _ in pairs), labels.count("yes")
    precision = both / n_yes if n_yes else math.nan
    recall = both / n_label if n_label else math.nan
    f1 = 2 * both / (n_yes + n_label) if n_yes + n_label else math.nan
    return {
        "accuracy": right / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_rate": n_yes / len(pairs),
        "n": len(pairs),
    }


def test_questions_answers_and_images(tmp_path, seed):
    asked = [(f"thing {n}", f"{n}.jpg", random.choice(["yes", "no"])) for n in range(7)]
    path = write_pope(tmp_path, asked, "coco_pope_adversarial.json")
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (5, 3)).save(tmp_path / "val2014" / "4.jpg")
    questions = open_questions(f"pope:{path}", tmp_path / "val2014")
    assert [q.question for q in questions] == [f"Is there a {x} in the image?" for x, _, _ in asked]
    assert [(q.image.name, q.answers) for q in questions] == [(x, (y,)) for _, x, y in asked]
    assert {q.split for q in questions} == {"adversarial"}
    assert questions[4].source == "coco_pope_adversarial/5"
    assert questions[4].open_image().size == (5, 3)
    assert questions.report().counts == {("image", "missing"): 6}
    assert questions[0].is_right(f"{asked[0][2].capitalize()}, I think")


def test_bad_rows_are_named(tmp_path):
    good = {"text": "Is there a dog?", "image": "a.jpg", "label": "No"}
    rows: list[object] = [
        good,
        {**good, "label": "maybe"},
        {**good, "label": True},
        {**good, "text": " "},
        {**good, "image": ["a.jpg"]},
        {**good, "question_id": 1.5},
        ["text"],
        {"text": "Is there a cat?", "image": "a.jpg", "category": "popular", "question_id": "x"},
    ]
    path = tmp_path / "mine_pope_random.json"
    path.write_text("\n".join([*map(json.dumps, rows), "{"]))
    found = pope(path)
    assert [(q.answers, q.split, q.source) for q in found] == [
        (("no",), "random", "mine_pope_random/0"),
        ((), "popular", "mine_pope_random/x"),
    ]
    whys = [each.why for each in found.refused]
    assert whys[:6] == [
        "line 2: label must be yes or no, not 'maybe'",
        "line 3: label must be a text, not True",
        "line 4: text is empty",
        "line 5: image must be a text, not ['a.jpg']",
        "line 6: question_id must be a whole number or a text, not 1.5",
        "line 7: must be an object, not ['text']",
    ]
    assert whys[6].startswith("line 9: no json")
    path.write_text("[]")
    with pytest.raises(ValueError, match="none of 1 rows can be used"):
        pope(path)


@pytest.mark.parametrize(("said", "yes"), SAID)
def test_what_means_yes(said, yes):
    assert says_yes(said) is yes


def test_scores_are_those_of_pope(seed):
    choices = [said for said, _ in SAID if "\n" not in said]
    for n in (1, 2, 3, 37, 200):
        said = random.choices(choices, k=n)
        labels = random.choices(["yes", "no"], k=n)
        found = vars(yes_no_scores(said, labels))
        # Two divisions of numbers up to n, and a product: a few roundings of float64.
        assert found == pytest.approx(by_hand(said, labels), rel=1e-14, nan_ok=True)


def test_what_has_no_precision_or_recall():
    found = yes_no_scores(["no", "No"], ["yes", "no"])
    assert math.isnan(found.precision) and found.recall == 0 and found.accuracy == 0.5
    assert math.isnan(yes_no_scores(["no"], ["no"]).recall)


@pytest.mark.parametrize(
    ("said", "labels"), [([], []), (["yes"], ["yes", "no"]), (["yes", "no"], ["yes", "maybe"])]
)
def test_what_cannot_be_scored(said, labels):
    with pytest.raises(ValueError, match=r"\d answers of a model and \d right ones"):
        yes_no_scores(said, labels)


def test_the_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        pope(Path(tmp_path / "coco_pope_random.json"))
