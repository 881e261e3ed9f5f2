"""The task `edit`: every case edited by some methods in some layers, and what that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from mmlens.attribution.where import layers_of
from mmlens.data import EditCase
from mmlens.editing import METHODS
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.sweeps.items import Item
from mmlens.sweeps.task import Asked, Carried, Columns, Task

if TYPE_CHECKING:
    from mmlens.editing.evaluation import Examination
    from mmlens.model import HookedMultimodalTransformer

MEASURED = ("probability", "score", "unchanged", "drift")
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
        **dict.fromkeys((*MEASURED, *BEFORE), pa.float32()),
        "seconds": pa.float32(),
    }
    measures: ClassVar[tuple[str, ...]] = MEASURED
    keys: ClassVar[tuple[str, ...]] = ("method", "group", "site", "role", "layer", "window")

    methods: tuple[str, ...] = ("multedit",)
    """Of `mmlens.editing.METHODS`, those that need nothing but a request."""
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
        """The cases that a name stands for; see `mmlens.editing.bench_settings.BenchSettings`."""
        from mmlens.editing.bench_settings import BenchSettings, open_cases

        folder = None if images is None else str(images)
        return open_cases(
            BenchSettings(data=str(data), images=folder, annotations=annotations, seed=seed)
        )

    def read(self, model: HookedMultimodalTransformer, item: Item) -> Asked:
        """The question that is edited; the others are read when they are asked.

        Raises:
            ValueError: a question without a case; or as `Task.read`.
        """
        if not isinstance(item, EditCase):
            raise ValueError("a question has no target: edit cases are needed (mmlens.data)")
        return replace(super().read(model, item.question), item=item)

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Raise a ValueError where the model lacks what the settings name."""
        layers_of(model, self.layers)

    def rows(
        self, model: HookedMultimodalTransformer, asked: Asked, carried: Carried
    ) -> list[dict[str, Any]]:
        """One row per method, layer and group of questions."""
        from mmlens.editing.asking import Examiner
        from mmlens.editing.evaluation import Examination

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
        return [
            common | {"method": method, "layer": layer} | row
            for method in self.methods
            for layer in layers_of(model, self.layers)
            for row in self.edited(model, examination, method, layer)
        ]

    def edited(
        self,
        model: HookedMultimodalTransformer,
        examination: Examination,
        method: str,
        layer: int,
    ) -> list[dict[str, Any]]:
        """The groups of one edit; where it cannot be made, of the model as it is."""
        from mmlens.editing.evaluation import measured, request_of

        given = self.method_settings.get(method, {})
        request = request_of(
            model,
            examination.case,
            n_key_questions=self.n_key_questions,
            n_kept=self.n_kept,
            template=self.template,
        )
        edit, seconds = None, None
        try:
            edit, seconds, _ = measured(
                model, lambda: METHODS[method](model, request, layer=layer, **given)
            )
        except ValueError:  # it has diverged, say
            edit = None
        with nullcontext() if edit is None else edit.applied(model):
            found = examination.after()
        about = {"edited": edit is not None, "seconds": seconds}
        return [row | about for row in by_group(found)]


def by_group(found: EditEvaluation) -> list[dict[str, Any]]:
    """Means over the questions of each group; None where a measure is not known."""
    table = found.to_dataframe()
    rows = []
    for group, each in table.groupby("group", sort=False):
        means = each[[*MEASURED, *BEFORE]].astype(float).mean()
        values = {name: None if isnan(mean) else float(mean) for name, mean in means.items()}
        rows.append({"group": str(group), "n_asked": len(each), **values})
    return rows
