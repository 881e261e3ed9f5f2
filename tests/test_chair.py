"""CHAIR: objects found in captions, scores by hand, and COCO's files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlens.data import chair_scores, coco_captions, objects_in, open_questions
from mmlens.data.chair import SYNONYMS, singulars, words_of

CAPTIONS = {
    "A hot dog on a plate next to a dog.": ["hot dog", "dog"],
    "Two puppies and three kitties sit on sofas.": ["dog", "cat", "couch"],
    "A man's surf-board leans on a motor bike.": ["person", "surfboard", "motorcycle"],
    "People ride buses past benches and traffic lights.": ["person", "bus", "bench",
                                                           "traffic light"],
    "A teddy bear holds a remote control.": ["teddy bear", "remote"],
    "The baseball player swings a baseball bat in the baseball field.": ["person",
                                                                         "baseball bat"],
    "Toilet paper beside the toilet, and a train on the train tracks.": ["toilet", "train"],
    "An orange shirt. A bowl of oranges!": ["bowl", "orange"],
    "Sheep, geese, mice, knives, calves and glasses of wine": ["sheep", "bird", "mouse", "knife",
                                                               "cow"],
    "WINE GLASSES; cell-phones; scissors; skis": ["wine glass", "cell phone", "scissors", "skis"],
    "The carpet is catalogued, buses are driven, a caring bearer.": ["bus"],
    "": [],
}  # fmt: skip


@pytest.mark.parametrize("caption", CAPTIONS)
def test_objects_of_captions(caption: str) -> None:
    assert objects_in(caption) == CAPTIONS[caption]


def test_every_name_is_one_of_its_category() -> None:
    assert len(SYNONYMS) == 80
    for category, others in SYNONYMS.items():
        names = [category, *filter(None, map(str.strip, others.split(",")))]
        if category == "orange":
            names.remove("orange")
        for name in names:
            assert objects_in(f"there is a {name} here") == [category], name


def test_no_name_is_of_two_categories() -> None:
    names: dict[tuple[str, ...], str] = {}
    for category, others in SYNONYMS.items():
        for name in [category, *filter(None, map(str.strip, others.split(",")))]:
            words = tuple(words_of(name))
            assert names.setdefault(words, category) == category, name


@pytest.mark.parametrize(
    ("plural", "singular"),
    [("benches", "bench"), ("dogs", "dog"), ("puppies", "puppy"), ("glasses", "glass"),
     ("buses", "bus"), ("vases", "vase"), ("zebras", "zebra"), ("couches", "couch")],
)  # fmt: skip
def test_plurals(plural: str, singular: str) -> None:
    assert singular in singulars(plural)


def by_hand(captions: list[list[str]], objects: list[set[str]]) -> tuple[float, float, float]:
    """Rohrbach et al. 2018, equations 1 and 2, and the recall; of names that are found."""
    named = wrong = sentences = there = found = 0
    for mentioned, truth in zip(captions, objects, strict=True):
        named += len(mentioned)
        bad = [each for each in mentioned if each not in truth]
        wrong += len(bad)
        sentences += bool(bad)
        there += len(truth)
        found += len([each for each in truth if each in mentioned])
    return (
        wrong / named if named else math.nan,
        sentences / len(captions),
        found / there if there else math.nan,
    )


def test_scores_are_those_by_hand(seed: int) -> None:
    names = sorted(SYNONYMS.keys() - {"orange"})
    for _ in range(20):
        n = random.randint(1, 6)
        mentioned = [random.choices(names, k=random.randint(0, 5)) for _ in range(n)]
        objects = [set(random.sample(names, random.randint(0, 5))) for _ in range(n)]
        captions = ["I see " + ". Then ".join(f"a {each}" for each in row) for row in mentioned]
        scores = chair_scores(captions, objects)
        expected = by_hand(mentioned, objects)
        got = (scores.chair_i, scores.chair_s, scores.recall)
        assert got == pytest.approx(expected, nan_ok=True)
        assert (scores.n, scores.n_named) == (n, sum(map(len, mentioned)))


def test_scores_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="0 captions of 0 images"):
        chair_scores([], [])
    with pytest.raises(ValueError, match="1 captions of 2 images"):
        chair_scores(["a"], [set(), set()])
    with pytest.raises(ValueError, match="no categories of COCO: wolf"):
        chair_scores(["a dog"], [{"dog", "wolf"}])


def write_coco(folder: Path, **changes: Any) -> Path:
    """COCO's two files for three images, of which the third has nothing in it."""
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (7, 8, 9)]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    boxes = [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1.5, 2, 3, 4], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 18, "bbox": [0, 0, 5, 5], "iscrowd": 0},
        {"id": 3, "image_id": 8, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 1},
    ]
    said = [
        {"id": 1, "image_id": 7, "caption": "A puppy on a couch."},
        {"id": 2, "image_id": 7, "caption": "A dog sleeps."},
    ]
    content = {"images": images, "categories": categories, "annotations": boxes, **changes}
    (folder / "instances_val2014.json").write_text(json.dumps(content))
    captions = changes.get("captions", said)
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    return folder / "instances_val2014.json"


def test_images_and_their_objects(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    Image.new("RGB", (6, 4)).save(tmp_path / "COCO_val2014_000000000007.jpg")
    questions = open_questions(f"coco:{path}")
    assert [q.extra["objects"] for q in questions] == [("couch", "dog"), ("person",), ()]
    assert [q.source for q in questions] == [f"instances_val2014/{n}" for n in (7, 8, 9)]
    assert questions[0].open_image().size == (6, 4)
    assert [(r.name, tuple(r.box)) for r in questions[0].regions] == [
        ("dog", (1.5, 2, 4.5, 6)),
        ("dog", (0, 0, 5, 5)),
    ]
    assert questions[0].extra["captions"] == ("A puppy on a couch.", "A dog sleeps.")
    (tmp_path / "captions_val2014.json").unlink()
    assert open_questions(f"coco:{path}")[0].extra["objects"] == ("dog",)


def test_bad_entries_are_named(tmp_path: Path) -> None:
    box = {"image_id": 7, "category_id": 18, "bbox": [0, 0, 1, 1]}
    path = write_coco(
        tmp_path,
        images=[{"id": 7, "file_name": "a.jpg"}, {"id": "8", "file_name": "b.jpg"}, {"id": 9}],
        annotations=[box, {**box, "bbox": [0, 0, -1, 1]}, {**box, "category_id": 5}, [1]],
        captions=[{"image_id": 7, "caption": "A cat"}, {"image_id": 7}],
    )
    found = coco_captions(path, tmp_path / "captions_val2014.json")
    assert [q.extra["objects"] for q in found] == [("cat", "dog")]
    assert [each.why for each in found.refused] == [
        "image 1: id must be a whole number, not '8'",
        "image 2: lacks file_name",
    ]
    assert [each.why for each in found.parts] == [
        "annotation 1: bbox must be [x, y, width, height] in pixels, not [0, 0, -1, 1]",
        "annotation 2: category_id 5 is none of the file's",
        "annotation 3: must be an object, not [1]",
        "annotation 1: lacks caption",
    ]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is no such file of COCO's: it lacks images"):
        coco_captions(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no such file of COCO's: it must be an object"):
        coco_captions(tmp_path / "list.json")
