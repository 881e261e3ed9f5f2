"""POPE (Li et al. 2023): is there such an object in the image? Yes or no.

Its files (RUCAIBox/POPE, output/coco/coco_pope_random.json, and those of popular and adversarial
objects) have one json object per line. Scored by `mmlens.data.yes_no_scores`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import RowError, expect, json_lines, shown, sift

YES_NO = ("yes", "no")


def pope(path: str | Path, images: str | Path = ".") -> QuestionSet:
    """Read a file of POPE's questions.

    A row that lacks something is left out, and listed in `refused` and in `report()`. A row without
    a label is a question without an answer.

    Args:
        path: such as `coco_pope_adversarial.json`; what comes after the last "_" is the split.
        images: the folder of `COCO_val2014_000000310196.jpg` and the others.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none of the lines can be used.

    Example:
        >>> questions = pope("coco_pope_random.json", "val2014")
        >>> questions[0].question, questions[0].answers
        ('Is there a snowboard in the image?', ('yes',))
    """
    path = Path(path)
    rows, refused = sift(path.stem, json_lines(path), _checked, path)
    split = path.stem.rpartition("_")[2]

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        return VisualQuestion(
            question=fields["text"],
            image=Path(images) / fields["image"],
            answers=(fields["label"],) if "label" in fields else (),
            split=fields.get("category", split),
            source=f"{path.stem}/{fields.get('question_id', row)}",
        )

    return QuestionSet(path.stem, list(rows), make, refused)


def _checked(row: Any) -> dict[str, Any]:
    """Return the row with its label in lower case, if it has all that is needed."""
    for name in ("text", "image"):
        if not expect(row, name, "a text").strip():
            raise RowError(f"{name} is empty")
    expect({"category": "", **row}, "category", "a text")
    expect({"question_id": 0, **row}, "question_id", "a whole number", "a text")
    if "label" not in row:
        return row
    label = expect(row, "label", "a text").strip().lower()
    if label not in YES_NO:
        raise RowError(f"label must be yes or no, not {shown(row['label'])}")
    return {**row, "label": label}
