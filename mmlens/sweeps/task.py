"""What a sweep does with each question: a `Task`.

A task is a frozen dataclass of its settings with a name, columns and `rows(model, asked, carried)`.
To sweep an analysis of your own, write one and give it to `mmlens.sweep`:

    @dataclass(frozen=True, kw_only=True)
    class Confidence(Task):
        name: ClassVar[str] = "confidence"
        columns: ClassVar[Columns] = {"confidence": pa.float32()}
        measures: ClassVar[tuple[str, ...]] = ("confidence",)

        def rows(self, model, asked, carried):
            most = model(asked.inputs)[0, -1].softmax(-1).max()
            where = {"site": "logits", "role": "last token", "layer": 0, "window": 1}
            return [where | {"confidence": float(most)}]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import torch
from jaxtyping import Int
from torch import Tensor

from mmlens.analyses.aggregation import role_positions
from mmlens.analyses.greedy_answer import answers_rightly
from mmlens.branching.recording import Recording
from mmlens.data import ImagePair, VisualQuestion, open_questions
from mmlens.data.reading import shown
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.inputs.spans import SpanNotFoundError
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.items import Item, question_of
from mmlens.utils.memory import is_out_of_memory
from mmlens.utils.resumable import as_json

Columns = Mapping[str, pa.DataType]
Row = dict[str, Any]

# The columns of every task's rows. `question`, `shard` and all that describes the question is
# filled in by the worker, the rest of them by the task.
COMMON: Columns = {
    "question": pa.int32(),
    "source": pa.string(),
    "image": pa.string(),
    "cluster": pa.string(),
    "relation": pa.string(),
    "split": pa.string(),
    "answer": pa.string(),
    "is_right": pa.bool_(),
    "site": pa.string(),
    "role": pa.string(),
    "layer": pa.int32(),
    "window": pa.int32(),
}


ROLES = (
    *(
        "image",
        "after image",
        "before constraint",
        "constraint",
        "constraint first",
        "constraint last",
    ),
    *("after constraint", "last token", "text constraint"),
)
"""What `Asked.roles` may give."""


class ImpossibleTask(ValueError):
    """Settings that no question of this model could be asked with."""


class UnreadableImage(ValueError):
    """An image that is not there or cannot be decoded."""


class UnusableRow(ValueError):
    """A row of the data set that its reader could not use, or with fields of another kind."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question put to a model: what the reading thread hands to the computing one."""

    item: Item
    inputs: MultimodalInputs
    corrupted: MultimodalInputs | None = None
    """Of a pair of images: the same prompt with the counterfactual one."""

    @property
    def question(self) -> VisualQuestion:
        """The question itself."""
        return question_of(self.item)

    def roles(self) -> dict[str, Int[Tensor, " _"]]:
        """Positions by their role (see `mmlens.role_positions`), a text constraint among them.

        Raises:
            ValueError: the question names no visual constraint.
        """
        named = "constraint" in self.inputs.spans[0]
        if self.corrupted is not None:
            return image_roles(self.inputs) | (roles_of(self.inputs) if named else {})
        if not named:
            raise ValueError("the question names no visual constraint")
        return roles_of(self.inputs)


@dataclass
class Carried:
    """What is carried from one question of a shard to the next."""

    earlier: list[Recording] = field(default_factory=list)
    """Of the question before, which this one may begin like: the same image is read once."""
    batch_rows: int | None = None
    """The most rows computed at once; set when memory ran out."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings of an analysis, and how it makes rows of a question."""

    name: ClassVar[str]
    columns: ClassVar[Columns]
    """What rows have after those of `COMMON`."""
    measures: ClassVar[tuple[str, ...]]
    """Columns that must be finite, and are averaged by `mmlens summarize`."""
    keys: ClassVar[tuple[str, ...]] = ("site", "role", "layer", "window")
    """Columns that tell the rows of a question apart."""

    template: str | None = "auto"
    """What stands around the question, see `model.prepare`."""
    max_new_tokens: int = 6
    """Of the answer that is right or wrong, where answers are known; 0 asks for none."""

    def open(
        self,
        data: str | Path,
        images: str | Path | None,
        annotations: tuple[str, str] | None,
        seed: int,
    ) -> Sequence[Item]:
        """What a name of data stands for; see `mmlens.data.open_questions`."""
        return open_questions(data, images, annotations, seed=seed)

    def check(self, model: HookedMultimodalTransformer) -> None:  # noqa: B027 (nothing to check)
        """Raise a ValueError where the model lacks what the settings name."""

    def read(self, processor: Processor, item: Item) -> Asked:
        """Open the question's images and make inputs of it; runs in the reading thread.

        Args:
            processor: the model's, with a tokenizer that only the reading thread uses.
            item: what is read.

        Raises:
            UnreadableImage: (a ValueError) an image is missing or damaged.
            SpanNotFoundError: (a ValueError) a constraint is not in the question.
        """
        if isinstance(item, ImagePair):
            raise ValueError(f"{self.name} takes questions, not pairs of images; trace takes pairs")
        question = question_of(item)
        spans = question.spans()
        try:
            images = question.open_images()
        except (ValueError, TypeError, OSError) as error:
            raise UnreadableImage(str(error)) from error
        inputs = processor(question.prompt(), images or None, spans=spans, template=self.template)
        return Asked(item, inputs.without_images())

    @abstractmethod
    def rows(self, model: HookedMultimodalTransformer, asked: Asked, carried: Carried) -> list[Row]:
        """What becomes of a question: `site`, `role`, `layer`, `window` and the task's `columns`.

        A row may give `answer` and `is_right` as well. Whatever is raised makes the question a
        failure.
        """

    def schema(self) -> pa.Schema:
        """Of the parquet files."""
        return pa.schema([*COMMON.items(), *self.columns.items()])

    def check_roles(self, roles: Iterable[str]) -> None:
        """Raise a ValueError for roles that no question can have."""
        unknown = [role for role in roles if role not in ROLES]
        if unknown:
            raise ValueError(f"no roles {', '.join(unknown)}; there are {', '.join(ROLES)}")

    def settings(self) -> dict[str, Any]:
        """What rows depend on, as JSON holds it."""
        return as_json(asdict(self))

    def is_right(self, model: HookedMultimodalTransformer, asked: Asked) -> bool | None:
        """Whether the greedy continuation is an accepted answer; None where none is known."""
        return answers_rightly(model, asked.question, asked.inputs, self.max_new_tokens)

    def check_finite(self, rows: Iterable[Row]) -> None:
        """Raise a FloatingPointError where a measure is NaN or infinite."""
        for row in rows:
            for name in self.measures:
                if row[name] is not None and not math.isfinite(row[name]):
                    where = ", ".join(f"{key} {row.get(key)}" for key in self.keys)
                    raise FloatingPointError(f"{name} is {row[name]} at {where}")


def roles_of(inputs: MultimodalInputs) -> dict[str, Int[Tensor, " _"]]:
    """The positions of the roles of a prompt with a constraint, as `Asked.roles` gives them."""
    roles = dict(role_positions(inputs))
    if "text_constraint" in inputs.spans[0]:
        roles["text constraint"] = inputs.span("text_constraint").cpu()
    return roles


def image_roles(inputs: MultimodalInputs) -> dict[str, Int[Tensor, " _"]]:
    """The positions of a prompt by what a changed image can change: itself, and what follows it.

    `image`; `after image`, the words between it and the last token; `last token`.
    """
    image, last = inputs.is_image[0].cpu().nonzero().flatten(), inputs.span("last").cpu()
    words = inputs.span("text").cpu()
    after = words[(words > image.max()) & ~torch.isin(words, last)]
    roles = {"image": image, "after image": after, "last token": last}
    return {role: positions for role, positions in roles.items() if len(positions)}


def question_columns(question: VisualQuestion, images: Sequence[str]) -> Row:
    """The columns of a row that say which question it is about; all are texts."""
    for name in ("source", "subject", "relation", "split"):
        if not isinstance(getattr(question, name), str):
            raise UnusableRow(f"{name} must be a text, not {shown(getattr(question, name))}")
    image = " ".join(images)
    return {
        "source": question.source,
        "image": image,
        "cluster": question.subject or image or question.source,
        "relation": question.relation,
        "split": question.split,
    }


def reason_of(error: BaseException) -> str:
    """Why a question failed, in a few words."""
    if isinstance(error, UnusableRow):
        return "unusable row"
    if isinstance(error, UnreadableImage):
        return "unreadable image"
    if isinstance(error, SpanNotFoundError):
        return "constraint not found"
    if isinstance(error, FloatingPointError):
        return "not finite"
    if isinstance(error, Exception) and is_out_of_memory(error):
        return "out of memory"
    return "cannot be asked" if isinstance(error, ValueError | LookupError) else "error"
