"""What steering does to answers: POPE, CHAIR, and what it costs elsewhere, by layer and scale.

    pope = "pope:coco_pope_random.json"
    found = mmlens.sweep("steer", model, pope, "runs/pope", vector="v.safetensors")
    steering_scores({"POPE": found.results()}).plot()

Each answer is scored by itself (`scored`), as a sweep goes; `steering_scores` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.result import SavedResult
from mmlens.data import VisualQuestion
from mmlens.data.chair import ChairCounts, chair_counts, pooled
from mmlens.data.metrics import says_yes, soft_accuracy, yes_no_scores
from mmlens.data.pope import YES_NO

if TYPE_CHECKING:
    import pandas as pd

MEASURES = {
    "yes or no": ("accuracy", "precision", "recall", "f1", "yes_rate"),
    "caption": ("chair_i", "chair_s", "recall", "objects"),
    "answer": ("accuracy",),
}
"""What is measured of each kind of question."""
COUNTS = ("named", "hallucinated", "there", "found")
"""Those of `ChairCounts`."""


@dataclass(frozen=True, eq=False)
class SteeringScores(SavedResult):
    """Measures of steered answers, for each layer and scale.

    Example:
        >>> scores.of("POPE", "f1")[0]           # of the first layer, by scale
        >>> scores.to_dataframe().pivot_table("value", ["data", "measure"], ["layer", "scale"])
    """

    SIZES: ClassVar[dict[str, str]] = {
        "data": "measure",
        "measures": "measure",
        "layers": "layer",
        "scales": "scale",
    }

    values: Float[Tensor, "measure layer scale"]
    """NaN where a measure is not defined, or no question was asked."""
    n: Int[Tensor, "measure layer scale"]
    """How many questions each is of."""
    data: tuple[str, ...]
    """Which data set each measure is of."""
    measures: tuple[str, ...]
    """Of yes or no: accuracy, precision, recall, f1 and yes_rate. Of captions: chair_i, chair_s and
    recall, and objects, how many a caption names. Of other answers: accuracy."""
    layers: tuple[int, ...]
    scales: tuple[float, ...]
    """Ascending; 0 is the model as it is."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def of(self, data: str, measure: str) -> Float[Tensor, "layer scale"]:
        """Return one measure of a data set.

        Raises:
            ValueError: there is no such measure of it.
        """
        pairs = list(zip(self.data, self.measures, strict=True))
        if (data, measure) not in pairs:
            raise ValueError(f"no {measure} of {data}; there are {pairs}")
        return self.values[pairs.index((data, measure))]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per data set, measure, layer and scale: the value, and of how many questions."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"data": data, "measure": measure, "layer": layer, "scale": scale}
                | {"value": float(self.values[m, i, s]), "n": int(self.n[m, i, s])}
                for m, (data, measure) in enumerate(zip(self.data, self.measures, strict=True))
                for i, layer in enumerate(self.layers)
                for s, scale in enumerate(self.scales)
            ]
        )


def kind_of(question: VisualQuestion) -> str:
    """Return which of `MEASURES` are taken of a question.

    Raises:
        ValueError: its answer is not known.
    """
    if "objects" in question.extra:
        return "caption"
    if not question.answers:
        raise ValueError(f"{question.source} has no answer to score by")
    return "yes or no" if {each.lower() for each in question.answers} <= set(YES_NO) else "answer"


def scored(question: VisualQuestion, said: str) -> dict[str, Any]:
    """Return what an answer scores, with all that scores of many answers are made of.

    `score` is 1 for a right answer; of OK-VQA's it is `soft_accuracy`, of a caption the share of
    the objects it names that are there (None where it names none).
    """
    kind = kind_of(question)
    if kind == "caption":
        counts = chair_counts(said, question.extra["objects"])
        there = 1 - counts.hallucinated / counts.named if counts.named else None
        return {"kind": kind, "score": there} | {name: getattr(counts, name) for name in COUNTS}
    if kind == "yes or no":
        yes = says_yes(said)
        wanted = question.answers[0].lower() == "yes"
        return {"kind": kind, "score": float(yes == wanted), "says_yes": yes, "is_yes": wanted}
    if "raw_answers" in question.extra:  # of several annotators
        return {"kind": kind, "score": soft_accuracy(said, question.answers, leave_one_out=True)}
    return {"kind": kind, "score": float(question.is_right(said))}


def steering_scores(rows: pd.DataFrame | Mapping[str, pd.DataFrame]) -> SteeringScores:
    """Put the results of sweeps `steer` together: every measure, by layer and scale.

    Args:
        rows: `Sweep.results()`, or several of them by the name of their data set.

    Raises:
        ValueError: no rows, or rows of another task.

    Example:
        >>> found = {name: mmlens.Sweep(f"runs/{name}").results() for name in ("pope", "okvqa")}
        >>> steering_scores(found).to_dataframe()
    """
    import pandas as pd

    tables = rows if isinstance(rows, Mapping) else {"questions": rows}
    for name, table in tables.items():
        if not len(table) or not {"scale", "kind", "layer"} <= set(table.columns):
            raise ValueError(f"{name}: no rows of a sweep of the task steer")
    every = pd.concat(tables.values())
    layers, scales = sorted(set(every["layer"])), sorted(set(every["scale"]))
    found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for name, table in tables.items():
        cells = dict(list(table.groupby(["layer", "scale"], observed=True)))
        for kind in sorted(set(table["kind"])):
            for measure in MEASURES[kind]:
                empty = torch.full((len(layers), len(scales)), torch.nan, dtype=torch.float64)
                found[name, measure] = empty, torch.zeros_like(empty, dtype=torch.long)
            for (layer, scale), cell in cells.items():
                at = layers.index(layer), scales.index(scale)
                of_kind = cell[cell["kind"] == kind]
                for measure, value in measured(kind, of_kind).items() if len(of_kind) else ():
                    found[name, measure][0][at], found[name, measure][1][at] = value, len(of_kind)
    return SteeringScores(
        values=torch.stack([values for values, _ in found.values()]),
        n=torch.stack([n for _, n in found.values()]),
        data=tuple(name for name, _ in found),
        measures=tuple(measure for _, measure in found),
        layers=tuple(map(int, layers)),
        scales=tuple(map(float, scales)),
    )


def measured(kind: str, rows: pd.DataFrame) -> dict[str, float]:
    """Return the measures of the answers in one cell, see `MEASURES`."""
    if kind == "yes or no":
        said, wanted = (
            ["yes" if yes else "no" for yes in rows[name]] for name in ("says_yes", "is_yes")
        )
        scores = yes_no_scores(said, wanted)
        return {name: getattr(scores, name) for name in MEASURES[kind]}
    if kind == "caption":
        counts: Sequence[ChairCounts] = [
            ChairCounts(*map(int, row)) for row in rows[list(COUNTS)].itertuples(index=False)
        ]
        chair = pooled(counts)
        objects = chair.n_named / chair.n
        return {
            "chair_i": chair.chair_i,
            "chair_s": chair.chair_s,
            "recall": chair.recall,
            "objects": objects,
        }
    return {"accuracy": float(rows["score"].mean())}
