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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from jaxtyping import Int
from torch import Tensor

from mmlens.aggregation import role_positions
from mmlens.data import VisualQuestion, open_questions
from mmlens.inputs import MultimodalInputs
from mmlens.passes import is_out_of_memory
from mmlens.spans import SpanNotFoundError
from mmlens.sweeps.items import Item, question_of

if TYPE_CHECKING:
    from mmlens.branching import Recording
    from mmlens.model import HookedMultimodalTransformer

__all__ = [
    "COMMON",
    "ROLES",
    "Asked",
    "Carried",
    "Columns",
    "ImpossibleTask",
    "Task",
    "UnreadableImage",
    "reason_of",
]

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
    *("image", "before constraint", "constraint", "constraint first", "constraint last"),
    *("after constraint", "last token", "text constraint"),
)
"""What `Asked.roles` may give."""


class ImpossibleTask(ValueError):
    """Settings that no question of this model could be asked with."""


class UnreadableImage(ValueError):
    """A picture that is not there or cannot be decoded."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question put to a model: what the reading thread hands to the computing one."""

    item: Item
    inputs: MultimodalInputs

    @property
    def question(self) -> VisualQuestion:
        """The question itself."""
        return question_of(self.item)

    def roles(self) -> dict[str, Int[Tensor, " _"]]:
        """Positions by their role (see `mmlens.role_positions`), a text constraint among them.

        Raises:
            ValueError: the question names no visual constraint.
        """
        if "constraint" not in self.inputs.spans[0]:
            raise ValueError("the question names no visual constraint")
        roles = dict(role_positions(self.inputs))
        if "text_constraint" in self.inputs.spans[0]:
            roles["text constraint"] = self.inputs.span("text_constraint").cpu()
        return roles


@dataclass
class Carried:
    """What is carried from one question of a shard to the next."""

    like: Recording | None = None
    """Of the question before, which this one may begin like: the same picture is read once."""
    batch_rows: int | None = None
    """The most rows computed at once; set when memory ran out."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings of an analysis, and how it makes rows of a question."""

    name: ClassVar[str]
    columns: ClassVar[Columns]
    """What rows have behind those of `COMMON`."""
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

    def read(self, model: HookedMultimodalTransformer, item: Item) -> Asked:
        """Open the question's pictures and put it to the model; runs in the reading thread.

        Raises:
            UnreadableImage: (a ValueError) a picture is missing or damaged.
            SpanNotFoundError: (a ValueError) a constraint is not in the question.
        """
        question = question_of(item)
        spans = question.spans()
        try:
            pictures = question.open_images()
        except (ValueError, TypeError, OSError) as error:
            raise UnreadableImage(str(error)) from error
        inputs = model.prepare(
            question.prompt(), pictures or None, spans=spans, template=self.template
        )
        return Asked(item, replace(inputs, images=None))

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
        return {name: as_json(value) for name, value in asdict(self).items()}

    def is_right(self, model: HookedMultimodalTransformer, asked: Asked) -> bool | None:
        """Whether the greedy continuation is an accepted answer; None where none is known."""
        if not asked.question.answers or not self.max_new_tokens:
            return None
        said = str(model.generate(asked.inputs, max_new_tokens=self.max_new_tokens))
        return asked.question.is_right(said)

    def check_finite(self, rows: Iterable[Row]) -> None:
        """Raise a FloatingPointError where a measure is NaN or infinite."""
        for row in rows:
            for name in self.measures:
                if row[name] is not None and not math.isfinite(row[name]):
                    where = ", ".join(f"{key} {row.get(key)}" for key in self.keys)
                    raise FloatingPointError(f"{name} is {row[name]} at {where}")


def as_json(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    if isinstance(value, Mapping):
        return {str(name): as_json(each) for name, each in value.items()}
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value


def described(question: VisualQuestion, images: Sequence[str]) -> Row:
    """The columns of a row that say which question it is about."""
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
    if isinstance(error, UnreadableImage):
        return "unreadable image"
    if isinstance(error, SpanNotFoundError):
        return "constraint not found"
    if isinstance(error, FloatingPointError):
        return "not finite"
    if isinstance(error, Exception) and is_out_of_memory(error):
        return "out of memory"
    return "cannot be asked" if isinstance(error, ValueError | LookupError) else "error"
