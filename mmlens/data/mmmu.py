"""MMMU (Yue et al. 2024): college exam questions with up to seven pictures and options.

Read by Hugging Face's `datasets`, from the hub or from a folder of the same files. Scored by
`VisualQuestion.is_right` (`parse_choice` for options).
"""

from __future__ import annotations

import ast
import re
from io import BytesIO
from pathlib import Path
from typing import Any

from mmlens.data.questions import QuestionSet, VisualQuestion

__all__ = ["mmmu"]

MENTION = re.compile(r"<image (\d)>")
N_IMAGES = 7


def mmmu(
    subject: str,
    split: str = "validation",
    *,
    path: str | Path = "MMMU/MMMU",
    revision: str | None = None,
) -> QuestionSet:
    """The questions of one subject.

    `<image 2>` in question or options becomes `<image>`, and `image` has the pictures in the order
    in which they are mentioned; pictures that are mentioned nowhere come first.

    Args:
        subject: a configuration of the data set: "Art", "Physics", ...
        split: "dev", "validation" or "test" (whose answers are not public).
        path: a name on the Hugging Face hub, or a folder with `{subject}/{split}-*.parquet`.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: `datasets` knows no such subject or split.
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
        if isinstance(feature, datasets.Image):  # pictures stay as files until they are opened
            rows = rows.cast_column(name, datasets.Image(decode=False))

    def make(row: int) -> VisualQuestion:
        return _question(rows[row], split)

    return QuestionSet(f"mmmu/{subject}", len(rows), make)


def _question(fields: dict[str, Any], split: str) -> VisualQuestion:
    options = [str(option) for option in ast.literal_eval(fields["options"] or "[]")]
    pictures = {
        str(index): _picture(encoded)
        for index in range(1, N_IMAGES + 1)
        if (encoded := fields.get(f"image_{index}")) is not None
    }
    text = "\n".join([fields["question"], *options])
    mentioned = [index for index in MENTION.findall(text) if index in pictures]
    silent = [index for index in pictures if index not in mentioned]
    question, *options = (
        MENTION.sub(lambda found: "<image>" if found[1] in pictures else found[0], part)
        for part in (fields["question"], *options)
    )
    answers = _answers(fields["answer"], options)
    return VisualQuestion(
        question="<image>\n" * len(silent) + question,
        image=tuple(pictures[index] for index in [*silent, *mentioned]),
        answers=answers,
        options=tuple(options),
        choice=fields["answer"] if options and answers else "",
        relation=fields["subfield"],
        split=split,
        source=f"mmmu/{fields['id']}",
        extra={"answer": fields["answer"], "difficulty": fields["topic_difficulty"]},
    )


def _picture(encoded: dict[str, Any]) -> Any:
    """A picture that is not decoded yet, or the path of its file."""
    from PIL import Image

    return encoded["path"] if encoded["bytes"] is None else Image.open(BytesIO(encoded["bytes"]))


def _answers(answer: str, options: list[str]) -> tuple[str, ...]:
    """Accepted answers: the option of a letter; of an open question, one text or a list of them."""
    if options:
        right = ord(answer) - ord("A") if len(answer) == 1 else -1
        return (options[right],) if 0 <= right < len(options) else ()
    if answer.startswith("["):
        return tuple(map(str, ast.literal_eval(answer)))
    return (answer,) if answer not in ("", "?") else ()
