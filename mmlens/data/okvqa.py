"""OK-VQA (Marino et al. 2019): questions about COCO images that need outside knowledge.

Its files have the form of VQA's (okvqa.allenai.org, visualqa.org): one json of questions, one of
annotations with ten answers to each. Scored by `mmlens.data.soft_accuracy`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import Refused, RowError, expect, json_file, sift


def okvqa(
    questions: str | Path, annotations: str | Path | None = None, images: str | Path = "."
) -> QuestionSet:
    """Read OK-VQA's questions with all ten answers each, repetitions included.

    Args:
        questions: `OpenEnded_mscoco_val2014_questions.json`, or that of train2014.
        annotations: `mscoco_val2014_annotations.json`; without it the questions have no answers.
            The answers are the processed ones; `extra["raw_answers"]` has them as they were given.
        images: the folder that holds COCO's `val2014/` or `train2014/`.

    An entry that lacks something is left out: a question is listed in `refused`, an annotation in
    `parts` (its question has no answers then), and both in `report()`.

    Raises:
        ValueError: a file without the entries that OK-VQA's have, or none that can be used.

    Example:
        >>> held_out = okvqa("OpenEnded_mscoco_val2014_questions.json",
        ...                  "mscoco_val2014_annotations.json", "coco")
        >>> soft_accuracy(model_answer, held_out[0].answers)
    """
    asked = _read(questions, "questions")
    rows, refused = sift("okvqa", _places("question", asked["questions"]), _question, questions)
    answered: dict[int, dict[str, Any]] = {}
    parts: tuple[Refused, ...] = ()
    if annotations is not None:
        listed = _read(annotations, "annotations")["annotations"]
        place = _places("annotation", listed)
        known, parts = sift("okvqa/annotations", place, _annotation, annotations)
        answered = {each["question_id"]: each for each in known.values()}
    subtype = asked["data_subtype"]
    folder = Path(images) / subtype

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        known = answered.get(fields["question_id"], {})
        given = known.get("answers", [])
        return VisualQuestion(
            question=fields["question"],
            image=folder / f"COCO_{subtype}_{fields['image_id']:012d}.jpg",
            answers=tuple(answer["answer"] for answer in given),
            relation=known.get("question_type", ""),
            split=subtype,
            source=f"okvqa/{fields['question_id']}",
            extra={"raw_answers": tuple(answer.get("raw_answer", "") for answer in given)},
        )

    return QuestionSet("okvqa", list(rows), make, refused, parts)


def _read(path: str | Path, key: str) -> dict[str, Any]:
    content = json_file(path)
    if not isinstance(content, dict) or not {key, "data_subtype"} <= content.keys():
        raise ValueError(f"{path} is no file of OK-VQA's {key}: it lacks {key!r} or 'data_subtype'")
    try:
        expect(content, key, "a list")
        expect(content, "data_subtype", "a text")
    except RowError as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def _places(what: str, rows: list[Any]) -> Iterable[tuple[str, Any]]:
    return ((f"{what} {number}", row) for number, row in enumerate(rows))


def _question(row: Any) -> dict[str, Any]:
    """Return a question that has all that is needed."""
    expect(row, "question", "a text")
    expect(row, "image_id", "a whole number")
    expect(row, "question_id", "a whole number")
    return row


def _annotation(row: Any) -> dict[str, Any]:
    """Return an annotation that has all that is needed."""
    expect(row, "question_id", "a whole number")
    for answer in expect(row, "answers", "a list"):
        expect(answer, "answer", "a text")
        expect({"raw_answer": "", **answer}, "raw_answer", "a text")
    expect({"question_type": "", **row}, "question_type", "a text")
    return row
