"""`ImagePair`: the same question about two images that differ in what the answer depends on.

    pairs = image_pairs("pairs.jsonl", "images")
    clean, corrupted = pairs[0].inputs(model, fit=True)
    trace = causal_trace(model, clean, corrupted, answer=pairs[0].clean.expected[0])

Rows have the names of `COLUMNS`, or those of Visual-CounterFact or WHOOPS-AHA. What'sUp, whose
rows are single images, has a reader of its own: `mmlens.data.whats_up`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mmlens.data.parquet import ParquetFile, StoredImage
from mmlens.data.question_sets import Rows
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import RowError, csv_rows, expect, json_lines, literal, shown, sift
from mmlens.data.report import Report, check_questions
from mmlens.inputs.image_tokens import check_same_cells
from mmlens.inputs.images import fitted
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor


@runtime_checkable
class PreparesInputs(Protocol):
    """A model, as far as a pair of images needs it."""

    def prepare(
        self, text: Any, image: Any = None, *, spans: Any = None, template: Any = "auto"
    ) -> MultimodalInputs:
        """Return text and images as inputs."""
        ...


@dataclass(frozen=True)
class ImagePair:
    """A question about an image, and the same question about a counterfactual one.

    Example:
        >>> pair = ImagePair.of("What color is this strawberry?", "red.png", "red",
        ...                     "blue.png", "blue")
        >>> causal_trace(model, *pair.inputs(model), answer="red", contrast="blue")
    """

    clean: VisualQuestion
    """With the image as it usually is, and the answers to it."""
    counterfactual: VisualQuestion
    """The same words about the other image, with the answers to that one."""

    @classmethod
    def of(
        cls, question: str, image: Any, answer: str, counterfactual: Any, other_answer: str
    ) -> ImagePair:
        """Return the pair of two images, a path or a PIL image each, with an answer to each."""
        about = VisualQuestion(question, image, answers=(answer,))
        return cls(about, replace(about, image=counterfactual, answers=(other_answer,)))

    @property
    def questions(self) -> tuple[VisualQuestion, VisualQuestion]:
        """Both questions, the clean one first."""
        return self.clean, self.counterfactual

    @property
    def source(self) -> str:
        """Data set and row."""
        return self.clean.source

    def inputs(
        self, model: PreparesInputs | Processor, *, fit: bool = False, template: Any = "auto"
    ) -> tuple[MultimodalInputs, MultimodalInputs]:
        """Return the clean and the corrupted inputs, which differ in the image alone.

        The corrupted ones are what `swap_image(model, clean, counterfactual, fit=fit)` gives.

        Args:
            model: a model, anything with its `prepare`, or a processor.
            fit: scale the counterfactual image to the clean one's size first, so that both have
                the same patches in families whose number of visual tokens depends on the image.
            template: what stands around the question, see `model.prepare`.

        Raises:
            ValueError: an image that cannot be read, or images that have other patches.
        """
        image, other = (question.open_image() for question in self.questions)
        if fit:
            other = fitted(other, image.size)
        prepare: Any = getattr(model, "prepare", model)
        clean, corrupted = (
            prepare(self.clean.prompt(), each, spans=self.clean.spans() or None, template=template)
            for each in (image, other)
        )
        try:
            check_same_cells(corrupted.images[0], clean.images[0])
        except ValueError as error:
            raise ValueError(f"{self.source or 'the pair'}: {error}") from None
        return clean, corrupted


class PairSet(Rows[ImagePair]):
    """The pairs of a data set, made when they are asked for."""

    def report(self) -> Report:
        """Count and list the problems of rows and of both questions; see `mmlens.data.report`."""
        return check_questions(flat(self), self.name, rows=self)


def flat(pairs: Iterable[ImagePair]) -> Iterable[VisualQuestion]:
    """Yield the questions of all pairs: each pair's clean one, then its counterfactual one."""
    return (question for pair in pairs for question in pair.questions)


# Rows of a file

COLUMNS: Mapping[str, str] = {
    "question": "question",
    "image": "image",
    "counterfactual_image": "counterfactual_image",
    "answers": "answers",
    "counterfactual_answers": "counterfactual_answers",
}
"""What a pair needs, and how the columns are called in a file of your own. One answer may be in
`answer` and `counterfactual_answer` instead. `options`, `visual_constraint`, `subject`, `relation`
and `split` may be there as well, as in `VisualQuestion`."""
LAYOUTS: Mapping[str, Mapping[str, str]] = {
    # the data set mgolov/Visual-Counterfact, README.md
    "counterfact_image": {
        **COLUMNS,
        "image": "original_image",
        "counterfactual_image": "counterfact_image",
        "answers": "correct_answer",
        "counterfactual_answers": "incorrect_answer",
    },
    # francescortu/Seeing-Knowing, whose images have no usual counterpart: that one is the user's
    "factual_tokens": {
        **COLUMNS,
        "question": "text",
        "image": "original_image",
        "counterfactual_image": "image_filename",
        "answers": "factual_tokens",
        "counterfactual_answers": "counterfactual_tokens",
    },
}
"""Columns of published data sets, by the one that tells them from others."""
OTHER_NAMES: Mapping[str, str] = {
    "answers": "answer",
    "counterfactual_answers": "counterfactual_answer",
    "image_filename": "image",
}
"""Columns that may stand for others, where those are not there."""
TEXTS = ("visual_constraint", "subject", "relation", "split")
FIELD = re.compile(r"\{(\w+)\}")


def image_pairs(
    path: str | Path, images: str | Path | None = None, *, question: str | None = None
) -> PairSet:
    """Read pairs of images from a `.csv`, a `.jsonl` or a `.parquet` file.

    A row that lacks something is left out, and listed in `refused` and in `report()`. Several
    answers are a list, or a text as Python writes one: "['red', 'crimson']". Images are names of
    files; in a parquet file also the images themselves, as the hub has them (bytes, or structs of
    `bytes` and `path`), which are read when a pair is asked for.

    Args:
        path: with the columns `question`, `image`, `counterfactual_image`, `answers` and
            `counterfactual_answers`; or those of Visual-CounterFact (`original_image`,
            `counterfact_image`, `correct_answer`, `incorrect_answer`, `object`), or of WHOOPS-AHA
            (`image_filename` or `image`, `text`, `factual_tokens`, `counterfactual_tokens`), which
            has counterfactual images alone: a column `original_image` of your own says which image
            is the clean one.
        images: the folder of the images; by default the file's own.
        question: what is asked where rows have no question, as in Visual-CounterFact; a column in
            braces stands for what a row has there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or none of the rows can be used.

    Example:
        >>> colors = image_pairs("color-00000-of-00001.parquet",
        ...                      question="What color is this {object}?")
        >>> colors[0].clean.question, colors[0].clean.answers, colors[0].counterfactual.answers
        ('What color is this strawberry?', ('red',), ('blue',))
    """
    path = Path(path)
    stored = ParquetFile(path) if path.suffix == ".parquet" else None
    if stored is not None:
        found = stored.rows()
    elif path.suffix in (".csv", ".jsonl"):
        found = csv_rows(path)[1] if path.suffix == ".csv" else json_lines(path)
    else:
        raise ValueError(f"{path}: pairs of images are a .csv, a .jsonl or a .parquet file")
    rows, refused = sift(path.stem, found, lambda row: _checked(row, question), path)
    folder = path.parent if images is None else Path(images)

    def image(value: Any) -> Any:
        if stored is not None and isinstance(value, StoredImage):
            value = stored.image(value)
        return folder / value if isinstance(value, str) else value

    def make(row: int) -> ImagePair:
        fields = rows[row]
        about = VisualQuestion(
            question=fields["question"],
            image=image(fields["image"]),
            answers=fields["answers"],
            options=fields["options"],
            source=f"{path.stem}/{row}",
            **{name: fields[name] for name in TEXTS},
        )
        other = image(fields["counterfactual_image"])
        return ImagePair(
            about, replace(about, image=other, answers=fields["counterfactual_answers"])
        )

    return PairSet(path.stem, list(rows), make, refused)


def _checked(row: Any, question: str | None) -> dict[str, Any]:
    """Return a row's fields by the names of `COLUMNS`, if all that is needed is there."""
    if not isinstance(row, dict):
        raise RowError(f"must be an object, not {shown(row)}")
    row = {name: value for name, value in row.items() if value is not None}
    telling = next((name for name in LAYOUTS if name in row), None)
    columns = COLUMNS if telling is None else LAYOUTS[telling]
    checked: dict[str, Any] = {}
    for name, column in columns.items():
        if column not in row and OTHER_NAMES.get(column) in row:
            column = OTHER_NAMES[column]
        if name == "question" and column not in row:
            checked[name] = _filled(question, row)
        elif name in ("answers", "counterfactual_answers"):
            checked[name] = _texts(row, column)
        elif name.endswith("image") and isinstance(row.get(column), StoredImage):
            checked[name] = row[column]
            continue
        else:
            checked[name] = expect(row, column, "a text")
        value = checked[name]
        if not all(each.strip() for each in ([value] if isinstance(value, str) else value or [""])):
            raise RowError(f"{column} is empty")
    checked["options"] = _texts({"options": [], **row}, "options")
    subject = {"subject": row["object"]} if telling and "object" in row else {}
    return checked | {
        name: expect(dict.fromkeys(TEXTS, "") | subject | row, name, "a text") for name in TEXTS
    }


def _texts(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return one text or several; in a csv a list is written as Python writes it."""
    value = expect(row, name, "a text", "a list of texts")
    if isinstance(value, str):
        value = literal(name, value) if value.lstrip().startswith("[") else [value] * bool(value)
    return tuple(value)


def _filled(question: str | None, row: dict[str, Any]) -> str:
    """Return the question with what a row has in the columns that it names in braces."""
    if question is None:
        raise RowError('lacks question; image_pairs(..., question="What color is this {object}?")')
    return FIELD.sub(lambda found: expect(row, found[1], "a text"), question)
