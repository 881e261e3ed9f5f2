"""VQA-Constraints (Basu et al. 2024): visual questions with the words that point at the picture.

Three CSV files, told apart by their columns; the first column is an unnamed index:

- `okvqa.csv`: `question, main_entity, image_url`, one COCO picture each;
- `multimodal_known.csv`: `question, subject, main_entity, image_url`, a folder of candidates each;
- `multimodal_movies.csv`: `question, director, main_entity, image_url`, a folder as well.

The files hold no answers, and `main_entity` is noisy: look at `report()` first.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmlens.data.questions import QuestionSet, VisualQuestion, choose_image, pictures_in

__all__ = ["vqa_constraints"]

#: the data set of each header, and the column that says what the picture shows
DATA_SETS = {
    ("question", "main_entity", "image_url"): ("okvqa", None),
    ("question", "subject", "main_entity", "image_url"): ("multimodal_known", "subject"),
    ("question", "director", "main_entity", "image_url"): ("multimodal_movies", "director"),
}


def vqa_constraints(
    path: str | Path,
    images: str | Path | None = None,
    *,
    annotations: QuestionSet | None = None,
    seed: int = 0,
) -> QuestionSet:
    """The questions of one of the three files.

    Args:
        path: the CSV file.
        images: the folder that `image_url` is relative to; by default the file's own. Where
            `image_url` is a folder of candidates, one is chosen by `seed` and the question; the
            choice is in `extra["image_choice"]`. Where there is none yet, `image` is the folder.
        annotations: OK-VQA's own questions (`mmlens.data.okvqa`), which have the answers to those
            of `okvqa.csv`: the same picture and the same question.
        seed: of the choice among candidates.

    Raises:
        ValueError: the columns are those of none of the three.

    Example:
        >>> questions = vqa_constraints("multimodal_known.csv", "pictures", seed=1)
        >>> questions[0].visual_constraint, questions[0].image
        ('This building', PosixPath('pictures/A photo of Space Needle/3.jpg'))
    """
    path = Path(path)
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = tuple(reader.fieldnames or ())[1:]
        if columns not in DATA_SETS:
            known = "; ".join(", ".join(names) for names in DATA_SETS)
            raise ValueError(
                f"{path}: columns {', '.join(columns)} (behind the index) are not those of a "
                f"VQA-Constraints file: {known}"
            )
        index = (reader.fieldnames or ("",))[0]
        rows = list(reader)
    name, subject = DATA_SETS[columns]
    root = path.parent if images is None else Path(images)
    known_answers = (
        {} if annotations is None else {_key(known): known.answers for known in annotations}
    )

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        source = f"{name}/{fields[index]}"
        image = root / fields["image_url"]
        choice: dict[str, Any] = {}
        if candidates := pictures_in(image):
            chosen, choice = choose_image(candidates, seed, source)
            image = image / chosen
        question = VisualQuestion(
            question=fields["question"],
            image=image,
            visual_constraint=fields["main_entity"],
            subject=fields[subject] if subject else "",
            source=source,
            extra=choice,
        )
        answers = known_answers.get(_key(question), ())
        return replace(question, answers=answers) if answers else question

    return QuestionSet(name, len(rows), make)


def _key(question: VisualQuestion) -> tuple[str, str]:
    """What tells questions of OK-VQA apart: the picture and the words."""
    return Path(question.image).name, " ".join(question.question.lower().split())
