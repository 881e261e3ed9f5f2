"""GQA (Hudson and Manning 2019): questions made from an image's scene graph.

Its files (cs.stanford.edu/people/dorarad/gqa) are one json object a split, from a question's id to
its fields, a folder of images that are named by `imageId`, and one json object of scene graphs a
split, which has the boxes of the objects that the questions name. Scored by
`mmlens.data.exact_match`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import Refused, RowError, expect, json_file, shown, sift
from mmlens.data.regions import Region, box_of

TEXTS = ("question", "answer", "fullAnswer")
"""Whose words `annotations` link to objects, in the order in which regions are listed."""
ARGUMENT = re.compile(r"\(([\d,\s]+)\)\s*$")
"""The objects of a step of `semantic`: "_,on,s (722335)". "(-)" is an object that is not there."""


def gqa(
    path: str | Path, images: str | Path = ".", scene_graphs: str | Path | None = None
) -> QuestionSet:
    """Read a file of GQA's questions, with the boxes of the objects that they name.

    A question that lacks something is left out, and listed in `refused` and in `report()`. An
    object without a box leaves its question without that region, and is listed in `parts`.

    Args:
        path: such as `val_balanced_questions.json`; those of the test splits have no answers.
        images: the folder of `2370799.jpg` and the others.
        scene_graphs: such as `val_sceneGraphs.json`; by default the split's file beside `path`,
            where there is one. Without scene graphs questions have no `regions`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is no JSON object of questions, or of scene graphs; or none of the
            questions can be used.

    Example:
        >>> questions = gqa("val_balanced_questions.json", "images")
        >>> questions[0].question, [region.name for region in questions[0].regions]
        ('What is on the white wall?', ['wall', 'pipe'])
        >>> inputs.patches(questions[0].regions[0].box)
    """
    asked = _objects(path, "questions")
    rows, refused = sift(
        "gqa", ((f"question {key}", row) for key, row in asked.items()), _checked, path
    )
    keys, split = list(asked), Path(path).name.partition("_")[0]
    beside = Path(path).parent / f"{split}_sceneGraphs.json"
    if scene_graphs is None and beside.is_file():
        scene_graphs = beside
    regions: dict[int, tuple[Region, ...]] = {}
    parts: list[Refused] = []
    if scene_graphs is not None:
        graphs = _objects(scene_graphs, "scene graphs")
        for row, fields in rows.items():
            regions[row], lost = _regions(fields, graphs.get(fields["imageId"]))
            where = f"question {keys[row]}"
            parts += [Refused(row, f"gqa/{keys[row]}", f"{where}: {why}") for why in lost]

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        return VisualQuestion(
            question=fields["question"],
            image=Path(images) / f"{fields['imageId']}.jpg",
            answers=(fields["answer"],) if "answer" in fields else (),
            relation=fields.get("types", {}).get("semantic", ""),
            split=split,
            source=f"gqa/{keys[row]}",
            extra={"fullAnswer": fields.get("fullAnswer", "")},
            regions=regions.get(row, ()),
        )

    return QuestionSet("gqa", list(rows), make, refused, parts)


def _objects(path: str | Path, what: str) -> dict[str, Any]:
    """Return a json object, from ids to questions or to scene graphs."""
    found = json_file(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no object of GQA's {what}: {shown(found)}")
    return found


def _checked(row: Any) -> dict[str, Any]:
    """Return a question that has all that is needed."""
    expect(row, "question", "a text")
    expect(row, "imageId", "a text")
    for name in ("answer", "fullAnswer"):
        expect({name: "", **row}, name, "a text")
    types = expect({"types": {}, **row}, "types", "an object")
    expect({"semantic": "", **types}, "semantic", "a text")
    return row


def _regions(fields: dict[str, Any], graph: Any) -> tuple[tuple[Region, ...], list[str]]:
    """Return the regions of the objects that a question names, and why some have none."""
    named: dict[str, str] = {}
    found: list[Region] = []
    lost: list[str] = []
    try:
        for key, place in _named(fields):
            named.setdefault(key, place)
        if named and graph is None:
            raise RowError(f"there is no scene graph of its image {shown(fields['imageId'])}")
        boxes = expect(graph, "objects", "an object") if named else {}
    except RowError as error:
        return (), [str(error)]
    for key, place in named.items():
        try:
            found.append(_region(expect(boxes, key, "an object"), place))
        except RowError as error:
            lost.append(f"object {key}: {error}" if key in boxes else f"the scene graph {error}")
    return tuple(found), lost


def _named(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (object id, where it is named): by words, then by steps of the semantic program."""
    annotations = expect({"annotations": {}, **fields}, "annotations", "an object")
    for place in TEXTS:
        words = expect({place: {}, **annotations}, place, "an object")
        for word in words:
            for key in expect(words, word, "a text").split(","):
                yield key.strip(), place
    for step in expect({"semantic": [], **fields}, "semantic", "a list"):
        if objects := ARGUMENT.search(expect(step, "argument", "a text")):
            for key in objects[1].split(","):
                yield key.strip(), "semantic"


def _region(fields: dict[str, Any], place: str) -> Region:
    """Return the box of an object of a scene graph: its corner, its width and its height."""
    x, y, width, height = (expect(fields, name, "a whole number") for name in "xywh")
    return Region(expect(fields, "name", "a text"), box_of((x, y, x + width, y + height)), place)
