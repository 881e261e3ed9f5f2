"""OK-VQA (Marino et al. 2019): questions about COCO pictures that need outside knowledge.

Its files have the form of VQA's (okvqa.allenai.org, visualqa.org): one json of questions, one of
annotations with ten answers to each. Scored by `mmlens.data.soft_accuracy`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmlens.data.questions import QuestionSet, VisualQuestion

__all__ = ["okvqa"]


def okvqa(
    questions: str | Path, annotations: str | Path | None = None, images: str | Path = "."
) -> QuestionSet:
    """OK-VQA's questions with all ten answers each, repetitions included.

    Args:
        questions: `OpenEnded_mscoco_val2014_questions.json`, or that of train2014.
        annotations: `mscoco_val2014_annotations.json`; without it the questions have no answers.
            The answers are the processed ones; `extra["raw_answers"]` has them as they were given.
        images: the folder that holds COCO's `val2014/` or `train2014/`.

    Raises:
        ValueError: a file without the entries that OK-VQA's have.

    Example:
        >>> held_out = okvqa("OpenEnded_mscoco_val2014_questions.json",
        ...                  "mscoco_val2014_annotations.json", "coco")
        >>> soft_accuracy(model_answer, held_out[0].answers)
    """
    asked = _read(questions, "questions")
    answered: dict[int, dict[str, Any]] = {}
    if annotations is not None:
        answered = {
            each["question_id"]: each for each in _read(annotations, "annotations")["annotations"]
        }
    subtype = asked["data_subtype"]
    folder = Path(images) / subtype

    def make(row: int) -> VisualQuestion:
        fields = asked["questions"][row]
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

    return QuestionSet("okvqa", len(asked["questions"]), make)


def _read(path: str | Path, key: str) -> dict[str, Any]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {key, "data_subtype"} <= content.keys():
        raise ValueError(f"{path} is no file of OK-VQA's {key}: it lacks {key!r} or 'data_subtype'")
    return content
