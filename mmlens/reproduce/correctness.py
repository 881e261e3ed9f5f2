"""Right and wrong answers: what the last token receives from the constraint, layer by layer.

The paper: more in right answers, in layers 16 and 17 of 32. What it receives from the image is
shown beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.analyses.attention_contribution import AttentionContribution, attention_contribution
from mmlens.analyses.result import long_table
from mmlens.plots.figure_folder import FigureWithTables
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.reproduce.study import Study, StudyQuestion

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
        tables = []
        for source, values in self.contributions.items():
            axes = {"question": range(values.shape[0]), "layer": range(values.shape[1])}
            table = long_table(axes, {"contribution": values}).assign(source=source)
            table["right"] = self.right.numpy()[table["question"]]
            table["confidence"] = self.confidence.numpy()[table["question"]]
            table["cluster"] = [self.clusters[question] for question in table["question"]]
            tables.append(table)
        return pd.concat(tables, ignore_index=True)


def answers(study: Study) -> Answers:
    """Ask `Settings.asked` questions; made once for each study.

    Raises:
        ValueError: a question without known answers; answers all right or all wrong.
    """
    if "answers" in study.shared:
        return study.shared["answers"]
    chosen, counts = study.choose(limit=study.settings.asked, corruptions=(), only_right=False)
    asked = [each["seen"] for each in chosen]
    if unknown := sum(not each.question.answers for each in asked):
        raise ValueError(f"{unknown} of {len(asked)} questions have no answers to compare with")
    right, contributions = [bool(each.right) for each in asked], {}
    for source in SOURCES:

        def received(each: StudyQuestion, source: str = source) -> AttentionContribution:
            return attention_contribution(each.model, each.inputs, source, "last")

        what = ["contributions", source, "last"]
        found = study.of_each(asked, what, AttentionContribution, received)
        means = [each.values.double().mean(dim=(1, 2)) for each in found]
        contributions[source] = torch.stack(means)
    if all(right) or not any(right):
        raise ValueError(f"{sum(right)} of {len(right)} answers are right: both kinds are needed")
    study.shared["answers"] = Answers(
        contributions=contributions,
        confidence=torch.tensor([each.confidence for each in asked], dtype=torch.float64),
        right=torch.tensor(right),
        clusters=tuple(each.cluster for each in asked),
        counts=counts | {"right": sum(right)},
    )
    return study.shared["answers"]


def correctness_figure(study: Study) -> FigureWithTables:
    """Mean contributions of right and of wrong answers, by layer."""
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
    return FigureWithTables("correctness", figure, {"table": table}, known.raw(), known.counts)
