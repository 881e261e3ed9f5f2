"""COCO (Lin et al. 2014): images to describe, with the objects that they show.

Its files (cocodataset.org, `annotations/instances_val2014.json` and `captions_val2014.json`) have
boxes of 80 categories, and five captions by people. Scored by `mmlens.data.chair_scores`.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from mmlens.data.chair import SYNONYMS, objects_in
from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import Refused, RowError, expect, json_file, shown, sift
from mmlens.data.regions import Region
from mmlens.inputs.image_tokens import Box

DESCRIBE = "Please describe this image in detail."


def coco_captions(
    instances: str | Path,
    captions: str | Path | None = None,
    images: str | Path = ".",
    *,
    question: str = DESCRIBE,
) -> QuestionSet:
    """Read the images of COCO, each to be described.

    `extra["objects"]` are the categories in the image: those that are annotated, and those that
    people's captions name, as in CHAIR. `regions` are the annotated boxes. `extra["captions"]` are
    the captions. An entry that lacks something is left out: an image is listed in `refused`, an
    annotation or a caption in `parts`, and both in `report()`.

    Args:
        instances: `instances_val2014.json`.
        captions: `captions_val2014.json`; without it objects are those annotated.
        images: the folder of `COCO_val2014_000000310196.jpg` and the others.
        question: what is asked of each image.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without the entries that COCO's have, or none that can be used.

    Example:
        >>> questions = coco_captions("instances_val2014.json", "captions_val2014.json", "val2014")
        >>> questions[0].extra["objects"], questions[0].regions[0].box
    """
    name = Path(instances).stem
    content = _read(instances, "images", "annotations", "categories")
    rows, refused = sift(name, _places("image", content["images"]), _image, instances)
    categories, _ = sift(name, _places("category", content["categories"]), _category, instances)
    names = {each["id"]: each["name"] for each in categories.values()}

    def annotated(row: Any) -> tuple[int, Region]:
        return _annotation(row, names)

    boxes, parts = _by_image(f"{name}/annotations", content["annotations"], annotated, instances)
    said: dict[int, list[str]] = {}
    if captions is not None:
        listed = _read(captions, "annotations")["annotations"]
        said, more = _by_image(f"{name}/captions", listed, _caption, captions)
        parts = (*parts, *more)

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        regions, texts = boxes.get(fields["id"], []), said.get(fields["id"], [])
        objects = {region.name for region in regions}
        objects |= {each for text in texts for each in objects_in(text)}
        return VisualQuestion(
            question=question,
            image=Path(images) / fields["file_name"],
            source=f"{name}/{fields['id']}",
            extra={"objects": tuple(sorted(objects)), "captions": tuple(texts)},
            regions=tuple(regions),
        )

    return QuestionSet(name, list(rows), make, refused, parts)


def _read(path: str | Path, *keys: str) -> dict[str, Any]:
    content = json_file(path)
    try:
        for key in keys:
            expect(content, key, "a list")
    except RowError as error:
        raise ValueError(f"{path} is no such file of COCO's: it {error}") from error
    return content


def _places(what: str, rows: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{what} {number}", row) for number, row in enumerate(rows)]


def _by_image(
    name: str, rows: list[Any], check: Any, path: str | Path
) -> tuple[dict[int, list[Any]], tuple[Refused, ...]]:
    """Return what `check` makes of the rows, by the image that it says, and the refused ones."""
    good, refused = sift(name, _places("annotation", rows), check, path)
    found: dict[int, list[Any]] = defaultdict(list)
    for image, value in good.values():
        found[image].append(value)
    return found, refused


def _image(row: Any) -> dict[str, Any]:
    expect(row, "id", "a whole number")
    if not expect(row, "file_name", "a text").strip():
        raise RowError("file_name is empty")
    return row


def _category(row: Any) -> dict[str, Any]:
    expect(row, "id", "a whole number")
    if expect(row, "name", "a text") not in SYNONYMS:
        raise RowError(f"name {shown(row['name'])} is no category of COCO")
    return row


def _annotation(row: Any, names: dict[int, str]) -> tuple[int, Region]:
    """Return the image and the region of an annotation; its box is (x, y, width, height)."""
    image = expect(row, "image_id", "a whole number")
    category = expect(row, "category_id", "a whole number")
    if category not in names:
        raise RowError(f"category_id {category} is none of the file's")
    box = expect(row, "bbox", "a list")
    numbers = [each for each in box if isinstance(each, int | float) and each >= 0]
    if len(box) != 4 or len(numbers) != 4:
        raise RowError(f"bbox must be [x, y, width, height] in pixels, not {shown(box)}")
    x, y, width, height = map(float, numbers)
    return image, Region(names[category], Box(x, y, x + width, y + height))


def _caption(row: Any) -> tuple[int, str]:
    return expect(row, "image_id", "a whole number"), expect(row, "caption", "a text")
