"""Encyclopedic-VQA (Mensink et al. 2023): questions about details of landmarks and species.

One CSV row per question, with up to five images that would do; columns as described by its
authors (google-research/google-research, encyclopedic_vqa/README.md). The images are those of
Google Landmarks v2 and iNaturalist 2021.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion, choose_image, demonstrative
from mmlens.data.reading import RowError, csv_rows, expect, json_file, sift

COLUMNS = {
    *("question", "answer", "dataset_name", "dataset_image_ids", "question_original"),
    *("question_type", "wikipedia_title", "encyclopedic_vqa_split"),
}
INATURALIST = "inaturalist"


def encyclopedic_vqa(
    path: str | Path,
    images: str | Path,
    *,
    inaturalist: str | Path | None = None,
    seed: int = 0,
) -> QuestionSet:
    """Read `train.csv`, `val.csv` or `test.csv`, and choose one image for each question.

    The files name no visual constraint. It is the words in whose place `question_original` names
    the subject, else the first "this ..." of the question, else nothing;
    `extra["constraint_from"]` says which.

    Args:
        path: the CSV file.
        images: a folder with `landmarks/` (Google Landmarks v2, in its folders of three letters:
            `a/b/c/abc....jpg`) and `inaturalist/` (the file names of its json).
        inaturalist: iNaturalist's json that maps image ids to file names; needed for its questions.
        seed: of the choice among the images, which is recorded in `extra["image_choice"]`.

    A row with too few or too many fields, or with an image that iNaturalist's json lacks, is left
    out, and listed in `refused` and in `report()`.

    Raises:
        ValueError: columns are missing; images of iNaturalist without its json; or none of the
            rows can be used.
    """
    columns, found = csv_rows(path)
    if missing := COLUMNS - set(columns):
        raise ValueError(f"{path} is no file of Encyclopedic-VQA: it lacks {sorted(missing)}")
    listed = list(found)
    species = _inaturalist_files(listed, inaturalist)
    rows, refused = sift("encyclopedic_vqa", listed, lambda row: _checked(row, species), path)
    root = Path(images)

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        source = f"encyclopedic_vqa/{fields['encyclopedic_vqa_split']}/{row}"
        image = None
        extra: dict[str, Any] = {}
        name = fields["dataset_name"]
        if fields["dataset_image_ids"].strip("|"):
            choices = [each for each in fields["dataset_image_ids"].split("|") if each]
            chosen, extra = choose_image(choices, seed, source)
            file = species[chosen] if name == INATURALIST else _landmark(chosen)
            image = root / name / file
        subject = fields["wikipedia_title"].split("|")[0]
        constraint, found = _constraint(fields["question"], fields["question_original"], subject)
        lists = [answer.split("&&") for answer in fields["answer"].split("|")]
        return VisualQuestion(
            question=fields["question"],
            image=image,
            visual_constraint=constraint,
            answers=tuple(part.strip() for each in lists for part in each),
            subject=subject,
            relation=fields["question_type"],
            split=fields["encyclopedic_vqa_split"],
            source=source,
            extra={"constraint_from": found, "answer_lists": lists, **extra},
        )

    return QuestionSet("encyclopedic_vqa", list(rows), make, refused)


def _landmark(image_id: str) -> str:
    return f"{image_id[0]}/{image_id[1]}/{image_id[2]}/{image_id}.jpg"


def _checked(row: dict[str, str], species: dict[str, str]) -> dict[str, str]:
    """Return the fields of a row that are used, if each of its images has a file."""
    for image_id in filter(None, row["dataset_image_ids"].split("|")):
        if row["dataset_name"] != INATURALIST and len(image_id) < 3:
            raise RowError(f"{image_id!r} is no image id of Google Landmarks v2")
        if row["dataset_name"] == INATURALIST and image_id not in species:
            raise RowError(f"iNaturalist's json lacks its image {image_id!r}")
    return {name: row[name] for name in COLUMNS}


def _inaturalist_files(rows: list[tuple[str, Any]], index: str | Path | None) -> dict[str, str]:
    """Return the file of every image id of iNaturalist's among the rows."""
    ids = {
        image_id
        for _, row in rows
        if not isinstance(row, RowError) and row["dataset_name"] == INATURALIST
        for image_id in row["dataset_image_ids"].split("|")
        if image_id
    }
    if not ids:
        return {}
    if index is None:
        raise ValueError(
            f"{len(ids)} images are iNaturalist's: give inaturalist=, its train.json or "
            "val.json, which maps image ids to file names"
        )
    try:
        images = expect(json_file(index), "images", "a list")
        files = {str(each["id"]): expect(each, "file_name", "a text") for each in images}
    except (RowError, LookupError, TypeError) as error:
        raise ValueError(f"{index} is no json of iNaturalist's: {error}") from error
    return {image_id: files[image_id] for image_id in ids & files.keys()}


def _constraint(question: str, original: str, subject: str) -> tuple[str, str]:
    """Return the words that stand for the subject, and how they were found."""
    before, named, after = original.lower().partition(subject.lower() or "\0")
    asked = question.lower()
    if named and asked.startswith(before) and asked.endswith(after):
        words = question[len(before) : len(question) - len(after)].strip()
        if words and words.lower() != named:
            return words, "question_original"
    found = demonstrative(question)
    return found, "demonstrative" if found else ""
