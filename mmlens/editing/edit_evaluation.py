"""`EditEvaluation`: what was asked about edits, before and after, and what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.analyses.result import SavedResult
from mmlens.utils.statistics import bootstrap_mean, known_values

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["MEASURES", "EditEvaluation"]

MEASURES = ("probability", "score", "unchanged", "drift")
COSTS = ("seconds", "memory")


@dataclass(frozen=True, eq=False)
class EditEvaluation(SavedResult):
    """Questions about some edits: one row per question and edit.

    Of each edit come `efficacy` (the question itself), `paraphrases`, `other images`, neighbours by
    their kind ("same image", "same question"), `portability`, and unrelated questions by the name
    of their set. See `mmlens.editing.evaluation`.

    Example:
        >>> found.summary().query("group == 'efficacy'")[["measure", "mean", "low", "high"]]
        >>> found.to_dataframe().query("group == 'same image' and not unchanged")
    """

    SIZES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("group", "question", "said_before", "said"), "row"),
        **dict.fromkeys(("case", "cluster", "target"), "edit"),
    }

    edit: Int[Tensor, " row"]
    """Which of the edits below."""
    group: tuple[str, ...]
    """What the question tells."""
    question: tuple[str, ...]
    """Its source."""
    said_before: tuple[str, ...]
    """The greedy answer without the edit."""
    said: tuple[str, ...]
    """The greedy answer with it."""
    probability: Float[Tensor, "row 2"]
    """Of the expected answer, before and after; NaN where none is known."""
    score: Float[Tensor, "row 2"]
    """1 where the greedy answer is right (on OK-VQA its VQA accuracy), before and after."""
    unchanged: Bool[Tensor, " row"]
    """Whether the greedy answer is the same, token by token."""
    drift: Float[Tensor, " row"]
    """KL(before || after) of the next token, in nats."""
    case: tuple[str, ...]
    """Per edit: data set and row of its question."""
    cluster: tuple[str, ...]
    """Per edit: what it is about; clusters are resampled together."""
    target: tuple[str, ...]
    """Per edit."""
    n_edits: Int[Tensor, " edit"]
    """Per edit: how many the model had when the questions were asked; 1 for single edits."""
    seconds: Float[Tensor, " edit"]
    """Per edit: what making it took; NaN where it was there already."""
    memory: Int[Tensor, " edit"]
    """Per edit: the most bytes held at once while it was made."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Method, layer, settings: whatever tells one evaluation from another."""

    @classmethod
    def joined(cls, evaluations: Sequence[EditEvaluation], **metadata: Any) -> EditEvaluation:
        """All edits of some evaluations, in their order.

        Raises:
            ValueError: none.
        """
        if not evaluations:
            raise ValueError("no evaluations to join: no edit was evaluated")
        values: dict[str, Any] = {}
        for name in (each.name for each in fields(cls)):
            parts = [getattr(each, name) for each in evaluations]
            if isinstance(parts[0], Tensor):
                values[name] = torch.cat(parts)
            elif isinstance(parts[0], tuple):
                values[name] = tuple(value for part in parts for value in part)
        offset, shifted = 0, []
        for each in evaluations:
            shifted.append(each.edit + offset)
            offset += len(each.case)
        values["edit"] = torch.cat(shifted)
        return cls(**values, metadata={**evaluations[0].metadata, **metadata})

    def to_dataframe(self) -> pd.DataFrame:
        """One row per question and edit."""
        import pandas as pd

        edit = self.edit.numpy()
        per_edit = {"case": self.case, "cluster": self.cluster, "target": self.target}
        columns = {name: [values[i] for i in edit] for name, values in per_edit.items()}
        return pd.DataFrame(
            {
                "edit": edit,
                **columns,
                "n_edits": self.n_edits.numpy()[edit],
                "group": self.group,
                "question": self.question,
                "said_before": self.said_before,
                "said": self.said,
                "probability_before": self.probability[:, 0].numpy(),
                "probability": self.probability[:, 1].numpy(),
                "score_before": self.score[:, 0].numpy(),
                "score": self.score[:, 1].numpy(),
                "unchanged": self.unchanged.numpy(),
                "drift": self.drift.numpy(),
            }
        )

    def costs(self) -> pd.DataFrame:
        """One row per edit: seconds and bytes."""
        import pandas as pd

        return pd.DataFrame(
            {
                "case": self.case,
                "target": self.target,
                "n_edits": self.n_edits.numpy(),
                "seconds": self.seconds.numpy(),
                "memory": self.memory.numpy(),
            }
        )

    def summary(self, *, samples: int = 2000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Means over questions by group and measure, with bootstrap intervals over clusters.

        Measures are `MEASURES`, and "seconds" and "memory" of the group "cost". `mean`, `low`,
        `high` are after the edit, `before` is before it, and `change`, `change_low`, `change_high`
        their paired difference: a specificity loss is a negative change of the score.

        Args:
            samples: resamples.
            level: of the intervals.
            seed: of the resampling.
        """
        import pandas as pd

        bootstrap = {"samples": samples, "level": level, "seed": seed}
        table, rows = self.to_dataframe(), []
        costs = self.costs().assign(edit=range(len(self.case)), cluster=self.cluster)
        parts = [(group, table[table["group"] == group]) for group in dict.fromkeys(self.group)]
        for n_edits in self.n_edits.unique().tolist():
            for group, part in [*parts, ("cost", costs)]:
                here = part[part["n_edits"] == n_edits]
                where = {
                    "n_edits": n_edits,
                    "group": group,
                    "edits": here["edit"].nunique(),
                    "questions": 0 if part is costs else len(here),
                }
                for measure in COSTS if part is costs else MEASURES:
                    if len(here):
                        means = with_change(here, measure, bootstrap)
                        rows.append({**where, "measure": measure, **means})
        return pd.DataFrame(rows)


def with_change(table: pd.DataFrame, measure: str, bootstrap: dict[str, Any]) -> dict[str, float]:
    """Return means before and after and the paired change, with intervals; NaN where unknown.

    And NaN where one of the edits broke the model, which then gives NaN for what was a number: left
    out, it would make an edit better.
    """
    after = torch.tensor(table[measure].to_numpy(dtype=float))
    before = torch.full_like(after, torch.nan)
    if f"{measure}_before" in table:
        before = torch.tensor(table[f"{measure}_before"].to_numpy(dtype=float))
    found = {"before": float(before.nanmean())}
    broke = bool((after.isnan() & (~before.isnan() | (measure == "drift"))).any())
    names = (("mean", "low", "high"), ("change", "change_low", "change_high"))
    for column, kinds in zip((after, after - before), names, strict=True):
        values, clusters = known_values(column, list(table["cluster"]))
        unknown = (torch.tensor(torch.nan),) * 3
        known = bool(clusters) and not broke
        numbers = bootstrap_mean(values, clusters, **bootstrap) if known else unknown
        found |= {kind: float(x) for kind, x in zip(kinds, numbers, strict=True)}
    return found
