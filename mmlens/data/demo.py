"""The demo questions: 197 countries by their flags, in the form of VQA-Constraints.

    for question in demo_questions(split="held_out", relation="capital"):
        inputs = model.prepare(question.question, question.open_image(),
                               spans={"constraint": question.visual_constraint})

The images are a rendering of the flags that the demo model was never trained on.
"""

from __future__ import annotations

import csv
from functools import cache

from mmlens.data.questions import VisualQuestion
from mmlens.demo import FOLDER

SPLITS = ("train", "held_out")


def demo_questions(
    split: str | None = None, relation: str | None = None, *, answered: bool | None = None
) -> list[VisualQuestion]:
    """Return the embedded questions, in a fixed order.

    Args:
        split: "train" for countries whose facts were used in choosing the questions' wording,
            "held_out" for those of which only the name was ever used; None for both.
        relation: "capital", "continent", "language", ...; None for all.
        answered: True for the questions that the shipped demo model answers rightly, False for
            those that it does not; None for both.

    Raises:
        ValueError: there is no such split or relation.
    """
    questions = _read()
    relations = sorted({question.relation for question in questions})
    if split is not None and split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if relation is not None and relation not in relations:
        raise ValueError(f"no relation {relation!r}; there are {', '.join(relations)}")
    return [
        question
        for question in questions
        if split in (None, question.split)
        and relation in (None, question.relation)
        and answered in (None, question.extra["answered"])
    ]


@cache
def _read() -> tuple[VisualQuestion, ...]:
    with (FOLDER / "questions.csv").open(encoding="utf-8", newline="") as stream:
        return tuple(_question(row) for row in csv.DictReader(stream))


def _question(row: dict[str, str]) -> VisualQuestion:
    return VisualQuestion(
        question=row["question"],
        image=FOLDER / row["image_url"],
        visual_constraint=row["visual_constraint"],
        text_constraints=tuple(part for part in row["text_constraint"].split("|") if part),
        answers=tuple(row["answers"].split("|")),
        subject=row["subject"],
        relation=row["relation"],
        split=row["split"],
        source=f"demo/{row['id']}",
        extra={
            "main_entity": row["main_entity"],
            "told": row["told"] == "right",
            "answered": row["answered"] == "right",
        },
    )
