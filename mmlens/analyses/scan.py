"""`Scan`: what is left of an answer without each part of a model, or of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.analyses.patch import Patched
from mmlens.analyses.result import long_table
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.statistics import bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Scan(Patched):
    """A metric with each part ablated, and its mean over prompts.

    Example:
        >>> scan.effect.flatten().argmin()       # the head that the answer needs most
        >>> scan.low, scan.high                  # of the effect, over the prompts of a data set
    """

    over: str = ""
    by: str = ""
    """What took the activations' place."""
    site: str = ""
    effects: Float[Tensor, "prompt ..."] | None = None
    """The effect in each prompt of a data set."""
    low: Float[Tensor, "*axis"] | None = None
    """Lower ends of the intervals of the mean effect: a bootstrap over clusters of prompts."""
    high: Float[Tensor, "*axis"] | None = None
    regions: tuple[tuple[int, ...], ...] = ()
    """The positions of each region, in the order of the values."""
    control: Float[Tensor, "region draw *measure"] | None = None
    """Effects of as many other visual tokens as each region has, drawn at random."""
    level: float = 0.95
    """Of the intervals."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per part: its coordinates, value, effect; low and high; the control's mean."""
        columns = {"value": self.values, "effect": self.effect}
        if self.low is not None and self.high is not None:
            columns |= {"low": self.low, "high": self.high}
        if self.control is not None:
            columns["control"] = self.control.mean(dim=1).reshape(self.values.shape)
        table = long_table(self.named_axes(), columns)
        return table.dropna(subset="value", ignore_index=True)

    def by_token(self, inputs: MultimodalInputs, image: int = 0) -> Float[Tensor, " visual_token"]:
        """Return the effect of the region of each visual token of an image, for `plots.overlay`.

        A token of several regions has their mean, one of none NaN.

        Raises:
            ValueError: a scan of something else than regions, or of a metric of several numbers.

        Example:
            >>> mmlens.plots.overlay(scan.by_token(inputs), inputs)
        """
        if not self.regions:
            raise ValueError(f"a scan over {self.over} has no visual tokens; one over regions has")
        if isinstance(self.baseline, tuple):
            raise ValueError(f"{self.metric!r} has {len(self.baseline)} numbers; a map is of one")
        total, count = torch.zeros(2, inputs.n_pos)
        for positions, effect in zip(self.regions, self.effect.flatten().tolist(), strict=True):
            total[list(positions)] += effect
            count[list(positions)] += 1
        return (total / count)[inputs.images[image].positions]


def in_numbers(baseline: Float[Tensor, " *measure"]) -> float | tuple[float, ...]:
    """Return a metric as a number, or as several."""
    return tuple(baseline.tolist()) if baseline.ndim else float(baseline)


def mean_scan(
    values: Float[Tensor, "prompt ..."],
    baselines: Float[Tensor, " prompt *measure"],
    there: Bool[Tensor, " prompt *axis"],
    clusters: list[str | int] | None,
    level: float,
) -> dict[str, Any]:
    """Return the fields of a scan that are means over prompts, and their intervals.

    A prompt without a cell (it has no positions of a role) counts in the other cells. A cell is NaN
    where the metric of one of the prompts is.

    Args:
        there: which cells each prompt has.
    """
    if len(values) == 1:
        return {"values": values[0], "baseline": in_numbers(baselines[0])}
    n, *measures = baselines.shape
    effects = values - baselines.view(n, *[1] * (values.ndim - baselines.ndim), *measures)
    mean, low, high = bootstrap_mean(effects, clusters, level=level)
    baseline = baselines.double().mean(dim=0)
    cells = there.view(*there.shape, *[1] * (values.ndim - there.ndim))
    broken = (values.isnan() & cells).any(dim=0)
    mean, low, high = (each.masked_fill(broken, torch.nan) for each in (mean, low, high))
    return {
        "values": (mean + baseline).to(values),
        "baseline": in_numbers(baseline),
        "effects": effects,
        "low": low.to(values),
        "high": high.to(values),
        "level": level,
    }
