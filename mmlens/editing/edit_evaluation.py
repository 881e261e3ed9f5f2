"""`EditEvaluation`: what was asked about edits, before and after, and what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.resampling import bootstrap_mean
from mmlens.results import SavedResult

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.plots.figure import Figure

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
        rows = []
        entries = self.n_edits[self.edit]
        for n_edits in self.n_edits.unique().tolist():
            for group in dict.fromkeys(self.group):
                here = torch.tensor([name == group for name in self.group]) & (entries == n_edits)
                index = here.nonzero().flatten()
                if not len(index):
                    continue
                edits = self.edit[index].tolist()
                where = {
                    "n_edits": n_edits,
                    "group": group,
                    "edits": len(set(edits)),
                    "questions": len(edits),
                }
                clusters = [self.cluster[i] for i in edits]
                for measure in MEASURES:
                    pair = self._before_and_after(measure)[index]
                    rows.append({**where, "measure": measure, **changed(pair, clusters, bootstrap)})
            rows += self._cost_rows(n_edits, bootstrap)
        return pd.DataFrame(rows)

    def _before_and_after(self, measure: str) -> Float[Tensor, "row 2"]:
        """A measure; NaN before the edit for those that compare with it."""
        values = getattr(self, measure).double()
        if values.ndim == 2:
            return values
        return torch.stack([torch.full_like(values, torch.nan), values], dim=1)

    def _cost_rows(self, n_edits: int, bootstrap: dict[str, Any]) -> list[dict[str, Any]]:
        index = (self.n_edits == n_edits).nonzero().flatten()
        clusters = [self.cluster[i] for i in index.tolist()]
        where = {"n_edits": n_edits, "group": "cost", "edits": len(index), "questions": 0}
        rows = []
        for measure in COSTS:
            values = getattr(self, measure)[index].double()
            pair = torch.stack([torch.full_like(values, torch.nan), values], dim=1)
            rows.append({**where, "measure": measure, **changed(pair, clusters, bootstrap)})
        return rows

    def plot(self, name: str | None = None) -> Figure:
        """Every group's probability and score with intervals; over the number of edits if several.

        Args:
            name: in the legend; by default the method's.
        """
        from mmlens.plots.editing import plot_edits, plot_sequences

        table = self.summary().assign(method=name or self.metadata.get("method", "edit"))
        several = len(self.n_edits.unique()) > 1
        return plot_sequences(table) if several else plot_edits(table)


def changed(
    pair: Float[Tensor, "row 2"], clusters: Sequence[str], bootstrap: dict[str, Any]
) -> dict[str, float]:
    """Mean before, mean and interval after, and those of the paired change; NaN where unknown."""
    values = torch.cat([pair, (pair[:, 1] - pair[:, 0])[:, None]], dim=1)
    found: dict[str, float] = {}
    names = (("before", "", ""), ("mean", "low", "high"), ("change", "change_low", "change_high"))
    for column, kinds in zip(values.T, names, strict=True):
        # Clusters without any value are left out: a resample of nothing else would have no mean.
        known = (~column.isnan()).nonzero().flatten().tolist()
        numbers = (
            bootstrap_mean(column[known], [clusters[i] for i in known], **bootstrap)
            if known
            else (torch.tensor(torch.nan),) * 3
        )
        found |= {kind: float(x) for kind, x in zip(kinds, numbers, strict=True) if kind}
    return found
