"""What steering does to answers: POPE, CHAIR, and what it costs elsewhere, by layer and scale.

    pope = "pope:coco_pope_random.json"
    found = mmlens.sweep("steer", model, pope, "runs/pope", vector="v.safetensors")
    steering_scores({"POPE": found.results()}).plot()

Each answer is scored by itself (`scored`), as a sweep goes; `steering_scores` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.result import SavedResult
from mmlens.data import VisualQuestion
from mmlens.data.chair import chair_counts
from mmlens.data.metrics import says_yes, soft_accuracy
from mmlens.data.pope import YES_NO
from mmlens.utils.statistics import MeanInterval, bootstrap_ratio

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
        >>> scores.low[0], scores.high[0]        # of the first measure, [layer, scale]
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
    """Which data set each measure is of, and of which kind of questions, where it has several."""
    measures: tuple[str, ...]
    """Of yes or no: accuracy, precision, recall, f1 and yes_rate. Of captions: chair_i, chair_s and
    recall, and objects, how many a caption names. Of other answers: accuracy."""
    layers: tuple[int, ...]
    scales: tuple[float, ...]
    """Ascending; 0 is the model as it is."""
    metadata: dict[str, Any] = field(default_factory=dict)
    low: Float[Tensor, "measure layer scale"] | None = None
    """Lower ends of the intervals: a bootstrap over images (or subjects), whose questions are drawn
    together. NaN where there is one of them only."""
    high: Float[Tensor, "measure layer scale"] | None = None
    level: float = 0.95
    """Of the intervals."""

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
        """One row per data set, measure, layer and scale: value, low, high, how many questions."""
        import pandas as pd

        columns = {"value": self.values}
        if self.low is not None and self.high is not None:
            columns |= {"low": self.low, "high": self.high}
        return pd.DataFrame(
            [
                {"data": data, "measure": measure, "layer": layer, "scale": scale}
                | {name: float(each[m, i, s]) for name, each in columns.items()}
                | {"n": int(self.n[m, i, s])}
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
    # One of several options, or an answer of OK-VQA's or MMMU's, is no yes or no of POPE's.
    is_pope = not question.options and not {"raw_answers", "difficulty"} & question.extra.keys()
    said = {each.lower() for each in question.answers}
    return "yes or no" if is_pope and said <= set(YES_NO) else "answer"


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


def steering_scores(
    rows: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> SteeringScores:
    """Put the results of sweeps `steer` together: every measure, by layer and scale.

    The intervals are of a bootstrap over the rows' column `cluster`, in which questions about one
    image (or subject) are drawn together; without that column each question is drawn by itself.

    Args:
        rows: `Sweep.results()`, or several of them by the name of their data set. Where one has
            questions of several kinds, its name is followed by theirs: "GQA (yes or no)".
        samples: resamples.
        level: of the intervals.
        seed: of the resampling.

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
    options: dict[str, Any] = {"samples": samples, "level": level, "seed": seed}
    found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for name, table in tables.items():
        cells = dict(list(table.groupby(["layer", "scale"], observed=True)))
        kinds = sorted(set(table["kind"]))
        for kind in kinds:
            label = name if len(kinds) == 1 else f"{name} ({kind})"
            for measure in MEASURES[kind]:
                empty = torch.full((3, len(layers), len(scales)), torch.nan, dtype=torch.float64)
                found[label, measure] = empty, torch.zeros_like(empty[0], dtype=torch.long)
            for (layer, scale), cell in cells.items():
                at = layers.index(layer), scales.index(scale)
                of_kind = cell[cell["kind"] == kind]
                if not len(of_kind):
                    continue
                intervals = torch.stack(measured(kind, of_kind, **options))
                for measure, values in zip(MEASURES[kind], intervals.T, strict=True):
                    found[label, measure][0][:, *at] = values
                    found[label, measure][1][at] = len(of_kind)
    values, low, high = torch.stack([each for each, _ in found.values()], dim=1)
    return SteeringScores(
        values=values,
        low=low,
        high=high,
        level=level,
        n=torch.stack([n for _, n in found.values()]),
        data=tuple(name for name, _ in found),
        measures=tuple(measure for _, measure in found),
        layers=tuple(map(int, layers)),
        scales=tuple(map(float, scales)),
    )


def measured(kind: str, rows: pd.DataFrame, **options: Any) -> MeanInterval:
    """Return the measures of the answers in one cell, see `MEASURES`, and their intervals."""
    above, below = (
        torch.from_numpy(np.stack(each, axis=1).astype(float))
        for each in zip(*terms(kind, rows).values(), strict=True)
    )
    clusters = rows["cluster"].tolist() if "cluster" in rows else None
    return bootstrap_ratio(above, below, clusters, **options)


def terms(kind: str, rows: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what each measure is a ratio of, for every answer: sums of the one by the other's."""
    one = np.ones(len(rows))
    if kind == "yes or no":
        says, wanted = (rows[name].to_numpy(dtype=float) for name in ("says_yes", "is_yes"))
        both = says * wanted
        return {
            "accuracy": (says == wanted, one),
            "precision": (both, says),
            "recall": (both, wanted),
            "f1": (2 * both, says + wanted),
            "yes_rate": (says, one),
        }
    if kind == "caption":
        named, hallucinated, there, found = (rows[name].to_numpy(dtype=float) for name in COUNTS)
        return {
            "chair_i": (hallucinated, named),
            "chair_s": (hallucinated > 0, one),
            "recall": (found, there),
            "objects": (named, one),
        }
    return {"accuracy": (rows["score"].to_numpy(dtype=float), one)}
