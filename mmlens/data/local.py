"""Questions of your own: one json object per line, with the fields of `VisualQuestion`.

{"question": "Who built this bridge?", "image": "bridge.jpg",
 "visual_constraint": "this bridge", "answers": ["Gustave Eiffel"]}
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion, choose_image, images_in
from mmlens.data.reading import RowError, expect, json_lines, shown, sift
from mmlens.data.regions import read_regions

KNOWN = {field.name for field in fields(VisualQuestion)}
TEXTS = ("visual_constraint", "choice", "subject", "relation", "split", "source")
LISTS = ("text_constraints", "answers", "options")
KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TEXTS, ("a text",)),
    **dict.fromkeys(LISTS, ("a list of texts",)),
    "image": ("a text", "a list of texts"),
    "extra": ("an object",),
    "regions": ("a list",),
}
"""What each field but the question must be, if it is given."""


def local_questions(path: str | Path, *, seed: int = 0) -> QuestionSet:
    """Read a `.jsonl` file, or the `questions.jsonl` of a folder.

    A line that is no JSON object with a question, or has a field of another kind than
    `VisualQuestion` has, is left out and listed in `refused` and in `report()`. `null` is a field
    that is not given, but for `image`: a question without an image has none.

    Args:
        path: the file or the folder. Paths of images are relative to where the file is; one that
            is a folder stands for its images, of which one is chosen and recorded in
            `extra["image_choice"]`. Several images are a list. Regions are a list of objects with
            a name and a box, `[left, top, right, bottom]` in pixels. What is no field of
            `VisualQuestion` goes to `extra`.
        seed: of the choice.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none of the lines can be used; the message has the first one's number.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "questions.jsonl"
    rows, refused = sift(path.stem, json_lines(path), _checked, path)

    def make(row: int) -> VisualQuestion:
        found = rows[row]
        source = found.get("source", f"{path.stem}/{row}")
        extra = {**found.get("extra", {}), **{k: v for k, v in found.items() if k not in KNOWN}}
        image = found.get("image")
        if isinstance(image, list):
            image = tuple(path.parent / each for each in image)
        elif image is not None:
            image = path.parent / image
            if candidates := images_in(image):
                chosen, choice = choose_image(candidates, seed, source)
                image, extra = image / chosen, extra | choice
        given = {name: found[name] for name in KNOWN & found.keys()}
        given |= {name: tuple(given[name]) for name in LISTS if name in given}
        return VisualQuestion(**{**given, "image": image, "source": source, "extra": extra})

    return QuestionSet(path.stem, list(rows), make, refused)


def _checked(row: Any) -> dict[str, Any]:
    """Return the fields that are given, if there is a question and each is of its kind."""
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise RowError(f"no object with a question: {shown(row)}")
    if "image" in row and row["image"] in (None, "", []):
        raise RowError(
            f"image is {shown(row['image'])}; a question without an image has no such field"
        )
    given = {name: value for name, value in row.items() if value is not None}
    for name in KINDS.keys() & given.keys():
        expect(given, name, *KINDS[name])
    if "regions" in given:
        given["regions"] = read_regions(given["regions"])
    return given
