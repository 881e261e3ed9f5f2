"""VQA-Constraints (Basu et al. 2024): visual questions with the words that point at the image.

Three CSV files, told apart by their columns; the first column is an unnamed index:

- `okvqa.csv`: `question, main_entity, image_url`, one COCO image each;
- `multimodal_known.csv`: `question, subject, main_entity, image_url`, a folder of candidates each;
- `multimodal_movies.csv`: `question, director, main_entity, image_url`, a folder as well.

The files hold no answers, and `main_entity` is noisy: read `report()` first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion, choose_image, images_in
from mmlens.data.reading import RowError, csv_rows, sift

#: the data set of each header, and the column that says what the image shows
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
    """Read one of the three files of VQA-Constraints.

    A row with too few or too many fields, or without an image, is left out, and listed in
    `refused` and in `report()`.

    Args:
        path: the CSV file.
        images: the folder that `image_url` is relative to; by default the file's own. Where
            `image_url` is a folder of candidates, one is chosen by `seed` and the question; the
            choice is in `extra["image_choice"]`. Where there is none yet, `image` is the folder.
        annotations: OK-VQA's own questions (`mmlens.data.okvqa`), which have the answers to those
            of `okvqa.csv`: the same image and the same question.
        seed: of the choice among candidates.

    Raises:
        ValueError: the columns are those of none of the three, or none of the rows can be used.

    Example:
        >>> questions = vqa_constraints("multimodal_known.csv", "images", seed=1)
        >>> questions[0].visual_constraint, questions[0].image
        ('This building', PosixPath('images/A photo of Space Needle/3.jpg'))
    """
    path = Path(path)
    header, found = csv_rows(path)
    index, *columns = header
    if tuple(columns) not in DATA_SETS:
        known = "; ".join(", ".join(names) for names in DATA_SETS)
        raise ValueError(
            f"{path}: columns {', '.join(columns)} (after the index) are not those of a "
            f"VQA-Constraints file: {known}"
        )
    name, subject = DATA_SETS[tuple(columns)]
    rows, refused = sift(name, found, _checked, path)
    root = path.parent if images is None else Path(images)
    known_answers = (
        {} if annotations is None else {_key(known): known.answers for known in annotations}
    )

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        source = f"{name}/{fields[index]}"
        image = root / fields["image_url"]
        choice: dict[str, Any] = {}
        if candidates := images_in(image):
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

    return QuestionSet(name, list(rows), make, refused)


def _checked(row: dict[str, str]) -> dict[str, str]:
    """Return the row, which has an image."""
    if not row["image_url"].strip():
        raise RowError("image_url is empty")
    return row


def _key(question: VisualQuestion) -> tuple[str, str]:
    """Return what tells questions of OK-VQA apart: the image and the words."""
    return Path(question.image).name, " ".join(question.question.lower().split())
