"""The task `edit`: every case edited by some methods in some layers, and what that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from mmlens.analyses.arguments import layers_of
from mmlens.data import EditCase
from mmlens.data.open import open_cases
from mmlens.editing import METHODS
from mmlens.editing.edit_evaluation import MEASURES, EditEvaluation
from mmlens.editing.evaluation import Examination, request_of
from mmlens.editing.examiner import Examiner
from mmlens.inputs.processor import Processor
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.items import Item
from mmlens.sweeps.task import Asked, Carried, Columns, Task

BEFORE = ("probability_before", "score_before")


@dataclass(frozen=True, kw_only=True)
class EditTask(Task):
    """Edits of every case, one at a time, each on the unedited model; see `mmlens.editing`.

    A row is the mean over the questions of a group: "efficacy" is the question itself, then there
    are paraphrases, other images, neighbours by their kind, portability. Measures are those of
    `mmlens.editing.edit_evaluation`.
    """

    name: ClassVar[str] = "edit"
    columns: ClassVar[Columns] = {
        "method": pa.string(),
        "group": pa.string(),
        "target": pa.string(),
        "n_asked": pa.int32(),
        "edited": pa.bool_(),
        **dict.fromkeys((*MEASURES, *BEFORE), pa.float32()),
        "seconds": pa.float32(),
    }
    measures: ClassVar[tuple[str, ...]] = MEASURES
    keys: ClassVar[tuple[str, ...]] = ("method", "group", "site", "role", "layer", "window")

    methods: tuple[str, ...] = ("multedit",)
    """Editing methods, like multedit,fine_tune: those that need nothing but a request."""
    layers: tuple[int, ...] | None = None
    """Each is edited by itself; by default all."""
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arguments by the method's name: {"multedit": {"steps": 20}}."""
    n_key_questions: int = 0
    """How many of a case's `key_questions` a method is given."""
    n_kept: int = 0
    """How many of its `kept` neighbours."""

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
            if method in ("rome", "memit"):
                raise ValueError(f"{method} needs a covariance: use `mmlens edit-bench`")

    def open(
        self,
        data: str | Path,
        images: str | Path | None,
        annotations: tuple[str, str] | None,
        seed: int,
    ) -> Sequence[Item]:
        """The cases that a name stands for; see `mmlens.data.open.open_cases`."""
        return open_cases(data, images, seed=seed)

    def read(self, processor: Processor, item: Item) -> Asked:
        """The question that is edited; the others are read when they are asked.

        Raises:
            ValueError: a question without a case; or as `Task.read`.
        """
        if not isinstance(item, EditCase):
            raise ValueError("a question has no target: edit cases are needed (mmlens.data)")
        return replace(super().read(processor, item.question), item=item)

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Raise a ValueError where the model lacks what the settings name."""
        layers_of(model, self.layers)

    def rows(
        self, model: HookedMultimodalTransformer, asked: Asked, carried: Carried
    ) -> list[dict[str, Any]]:
        """One row per method, layer and group of questions."""
        assert isinstance(asked.item, EditCase)
        examination = Examination(Examiner(model, template=self.template), asked.item)
        before = examination.before
        common = {
            "answer": before[0].said,
            "is_right": None if isnan(before[0].score) else before[0].score > 0.5,
            "target": asked.item.target,
            "site": "mlp_out",
            "role": "constraint last" if "constraint" in asked.inputs.spans[0] else "question last",
            "window": 1,
        }
        request = request_of(
            model,
            asked.item,
            n_key_questions=self.n_key_questions,
            n_kept=self.n_kept,
            template=self.template,
        )
        rows = []
        for method in self.methods:
            given = dict(self.method_settings.get(method, {}))
            if method == "multedit":  # its own references may be among what is asked
                given.setdefault("references", None)
            for layer in layers_of(model, self.layers):
                edit = partial(METHODS[method], model, request, layer=layer, **given)
                where = {"method": method, "layer": layer}
                rows += [common | where | row for row in by_group(examination.of(edit))]
        return rows


def by_group(found: EditEvaluation) -> list[dict[str, Any]]:
    """Means over the questions of each group; None where a measure is not known."""
    about = {"edited": not found.metadata["failed"], "seconds": known(found.seconds.item())}
    rows = []
    for group, each in found.to_dataframe().groupby("group", sort=False):
        means = each[[*MEASURES, *BEFORE]].astype(float).mean()
        values = {name: known(float(mean)) for name, mean in means.items()}
        rows.append({"group": str(group), "n_asked": len(each), **values, **about})
    return rows


def known(number: float) -> float | None:
    """Return a number, and None in the place of NaN."""
    return None if isnan(number) else number
