"""Right and wrong answers: what the last token receives from the constraint, layer by layer.

The paper: more in right answers, in layers 16 and 17 of 32. What it receives from the picture is
shown beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.attribution import attention_contribution
from mmlens.plots.profile import plot_layer_profile
from mmlens.reproduce.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.reproduce.study import Study

SOURCES = ("constraint", "image")


@dataclass(frozen=True, eq=False)
class Answers:
    """Contributions to the last token, and whether the answer was right."""

    contributions: dict[str, Float[Tensor, "question layer"]]
    """By source; means over its positions."""
    confidence: Float[Tensor, " question"]
    right: Bool[Tensor, " question"]
    clusters: tuple[str, ...]
    counts: dict[str, int]

    def raw(self) -> pd.DataFrame:
        """One row per question, source and layer."""
        import pandas as pd

        tables = []
        for source, values in self.contributions.items():
            index = pd.MultiIndex.from_product(
                [range(values.shape[0]), range(values.shape[1])], names=["question", "layer"]
            )
            table = pd.DataFrame({"contribution": values.flatten().numpy()}, index=index)
            table = table.reset_index().assign(source=source)
            table["right"] = self.right.numpy()[table["question"]]
            table["confidence"] = self.confidence.numpy()[table["question"]]
            tables.append(table)
        return pd.concat(tables, ignore_index=True)


def answers(study: Study) -> Answers:
    """Ask `Settings.asked` questions; made once for each study.

    Raises:
        ValueError: a question without known answers; answers all right or all wrong.
    """
    if study.answers is None:
        study.answers = asked_answers(study)
    return study.answers


def asked_answers(study: Study) -> Answers:
    """`answers`, anew."""
    chosen, counts = study.choose(limit=study.settings.asked, corruptions=(), only_right=False)
    asked = [each["seen"] for each in chosen]
    if unknown := sum(not each.question.answers for each in asked):
        raise ValueError(f"{unknown} of {len(asked)} questions have no answers to compare with")
    right, found = [], {source: [] for source in SOURCES}  # type: ignore[var-annotated]
    for each in study.progress(asked, "contributions"):
        right.append(bool(each.right))
        for source in SOURCES:
            values = attention_contribution(study.model, each.inputs, source, "last").values
            found[source].append(values.double().mean(dim=(1, 2)))
    if all(right) or not any(right):
        raise ValueError(f"{sum(right)} of {len(right)} answers are right: both kinds are needed")
    return Answers(
        contributions={source: torch.stack(values) for source, values in found.items()},
        confidence=torch.tensor([each.confidence for each in asked], dtype=torch.float64),
        right=torch.tensor(right),
        clusters=tuple(each.cluster for each in asked),
        counts=counts | {"right": sum(right)},
    )


def correctness(study: Study) -> Figure:
    """Mean contributions of right and of wrong answers, by layer."""
    import pandas as pd

    known = answers(study)
    tables = []
    for source, values in known.contributions.items():
        for name, members in (("right", known.right), ("wrong", ~known.right)):
            index = members.nonzero().flatten().tolist()
            means = study.bootstrap(values[index], [known.clusters[i] for i in index])
            lines = {"model": name, "site": f"{source} → last token", "role": ""}
            columns = {"layer": range(values.shape[1]), **means, "n": len(index)}
            tables.append(pd.DataFrame({**lines, **columns}))
    table = pd.concat(tables)
    n_right = int(known.right.sum())
    figure = plot_layer_profile(
        table,
        y_title="contribution",
        title="What the last token receives, in right and in wrong answers",
        subtitle=study.describe(f"{n_right} right and {len(known.right) - n_right} wrong"),
        share_y="none",
    )
    return Figure("correctness", figure, {"table": table}, known.raw(), known.counts)
