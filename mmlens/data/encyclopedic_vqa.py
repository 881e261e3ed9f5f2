"""Encyclopedic-VQA (Mensink et al. 2023): questions about details of landmarks and species.

One CSV row per question, with up to five pictures that would do; columns as described by its
authors (google-research/google-research, encyclopedic_vqa/README.md). The pictures are those of
Google Landmarks v2 and iNaturalist 2021.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from mmlens.data.questions import QuestionSet, VisualQuestion, choose_image, demonstrative

__all__ = ["encyclopedic_vqa"]

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
    """The questions of `train.csv`, `val.csv` or `test.csv`, with one of their pictures each.

    The files name no visual constraint. It is the words in whose place `question_original` names
    the subject, else the first "this ..." of the question, else nothing;
    `extra["constraint_from"]` says which.

    Args:
        path: the CSV file.
        images: a folder with `landmarks/` (Google Landmarks v2, in its folders of three letters:
            `a/b/c/abc....jpg`) and `inaturalist/` (the file names of its json).
        inaturalist: iNaturalist's json that maps image ids to file names; needed for its questions.
        seed: of the choice among the pictures, which is recorded in `extra["image_choice"]`.

    Raises:
        ValueError: columns are missing; pictures of iNaturalist without its json, or with one that
            lacks some of them.
    """
    with Path(path).open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := COLUMNS - set(reader.fieldnames or ()):
            raise ValueError(f"{path} is no file of Encyclopedic-VQA: it lacks {sorted(missing)}")
        rows = [{name: row[name] for name in COLUMNS} for row in reader]
    root = Path(images)
    species = _inaturalist_files(rows, inaturalist)

    def make(row: int) -> VisualQuestion:
        fields = rows[row]
        source = f"encyclopedic_vqa/{fields['encyclopedic_vqa_split']}/{row}"
        image = None
        extra: dict[str, Any] = {}
        name = fields["dataset_name"]
        if fields["dataset_image_ids"]:
            chosen, extra = choose_image(fields["dataset_image_ids"].split("|"), seed, source)
            image = root / name / (species[chosen] if name == INATURALIST else _landmark(chosen))
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

    return QuestionSet("encyclopedic_vqa", len(rows), make)


def _landmark(image_id: str) -> str:
    return f"{image_id[0]}/{image_id[1]}/{image_id[2]}/{image_id}.jpg"


def _inaturalist_files(rows: list[dict[str, str]], index: str | Path | None) -> dict[str, str]:
    """The file of every image id of iNaturalist's among the rows."""
    ids = {
        image_id
        for row in rows
        if row["dataset_name"] == INATURALIST
        for image_id in row["dataset_image_ids"].split("|")
        if image_id
    }
    if not ids:
        return {}
    if index is None:
        raise ValueError(
            f"{len(ids)} pictures are iNaturalist's: give inaturalist=, its train.json or "
            "val.json, which maps image ids to file names"
        )
    images = json.loads(Path(index).read_text(encoding="utf-8"))["images"]
    files = {str(image["id"]): image["file_name"] for image in images if str(image["id"]) in ids}
    if missing := sorted(ids - files.keys()):
        raise ValueError(f"{index} lacks {len(missing)} of {len(ids)} pictures: {missing[:5]} ...")
    return files


def _constraint(question: str, original: str, subject: str) -> tuple[str, str]:
    """The words that stand for the subject, and how they were found."""
    before, named, after = original.lower().partition(subject.lower() or "\0")
    asked = question.lower()
    if named and asked.startswith(before) and asked.endswith(after):
        words = question[len(before) : len(question) - len(after)].strip()
        if words and words.lower() != named:
            return words, "question_original"
    found = demonstrative(question)
    return found, "demonstrative" if found else ""
