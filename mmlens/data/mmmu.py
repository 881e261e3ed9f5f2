"""MMMU (Yue et al. 2024): college exam questions with up to seven images and options.

Read by Hugging Face's `datasets`, from the hub or from a folder of the same files. Scored by
`VisualQuestion.is_right` (`parse_choice` for options).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmlens.data.parquet import embedded_image
from mmlens.data.question_sets import QuestionSet
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import RowError, expect, literal, sift

MENTION = re.compile(r"<image (\d)>")
N_IMAGES = 7
TEXTS = ("id", "question", "options", "answer", "subfield", "topic_difficulty")


def mmmu(
    subject: str,
    split: str = "validation",
    *,
    path: str | Path = "MMMU/MMMU",
    revision: str | None = None,
) -> QuestionSet:
    """Read the questions of one subject of MMMU.

    `<image 2>` in question or options becomes `<image>`, and `image` has the images in the order
    in which they are mentioned; images that are mentioned nowhere come first.

    Args:
        subject: a configuration of the data set: "Art", "Physics", ...
        split: "dev", "validation" or "test" (whose answers are not public).
        path: a name on the Hugging Face hub, or a folder with `{subject}/{split}-*.parquet`.
        revision: branch, tag or commit on the hub.

    A row without its texts, or whose options are no list, is left out, and listed in `refused` and
    in `report()`.

    Raises:
        ValueError: `datasets` knows no such subject or split; or none of the rows can be used.
        FileNotFoundError: a folder that lacks the subject's files.

    Example:
        >>> questions = mmmu("Physics")
        >>> inputs = model.prepare(questions[0].prompt(), questions[0].open_images())
    """
    import datasets

    folder = Path(path) / subject
    if Path(path).is_dir():
        files = sorted(map(str, folder.glob(f"{split}-*.parquet")))
        if not files:
            raise FileNotFoundError(f"no {split}-*.parquet in {folder}")
        rows = datasets.Dataset.from_parquet(files)
    else:
        rows = datasets.load_dataset(str(path), subject, split=split, revision=revision)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):  # images stay as files until they are opened
            rows = rows.cast_column(name, datasets.Image(decode=False))

    if missing := set(TEXTS) - set(rows.features):
        raise ValueError(f"{path}/{subject} is no file of MMMU's: it lacks {sorted(missing)}")
    texts = rows.select_columns(list(TEXTS))
    places = ((f"row {number}", row) for number, row in enumerate(texts))
    good, refused = sift(f"mmmu/{subject}", places, _checked, f"{path}/{subject}")

    def make(row: int) -> VisualQuestion:
        return _question(rows[row], split)

    return QuestionSet(f"mmmu/{subject}", list(good), make, refused)


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row, whose texts are there and can be read."""
    for name in TEXTS:
        expect(row, name, "a text")
    literal("options", row["options"] or "[]")
    return row


def _question(fields: dict[str, Any], split: str) -> VisualQuestion:
    options = literal("options", fields["options"] or "[]")
    images = {
        str(index): embedded_image(encoded)
        for index in range(1, N_IMAGES + 1)
        if (encoded := fields.get(f"image_{index}")) is not None
    }
    text = "\n".join([fields["question"], *options])
    mentioned = [index for index in MENTION.findall(text) if index in images]
    silent = [index for index in images if index not in mentioned]
    question, *options = (
        MENTION.sub(lambda found: "<image>" if found[1] in images else found[0], part)
        for part in (fields["question"], *options)
    )
    answers = _answers(fields["answer"], options)
    return VisualQuestion(
        question="<image>\n" * len(silent) + question,
        image=tuple(images[index] for index in [*silent, *mentioned]),
        answers=answers,
        options=tuple(options),
        choice=fields["answer"] if options and answers else "",
        relation=fields["subfield"],
        split=split,
        source=f"mmmu/{fields['id']}",
        extra={"answer": fields["answer"], "difficulty": fields["topic_difficulty"]},
    )


def _answers(answer: str, options: list[str]) -> tuple[str, ...]:
    """Return accepted answers: a letter's option; for an open question, one text or several."""
    if options:
        right = ord(answer) - ord("A") if len(answer) == 1 else -1
        return (options[right],) if 0 <= right < len(options) else ()
    if answer.startswith("["):
        try:
            return tuple(literal("answer", answer))
        except RowError:  # an interval, say: "[0, 1)"
            return (answer,)
    return (answer,) if answer not in ("", "?") else ()
