"""Attention contributions: sources against layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmlens.plots.figure import Figure
from mmlens.plots.folding import Visual
from mmlens.plots.heatmap import heatmap
from mmlens.plots.labels import shorten, visible
from mmlens.plots.trace import subtitle_of

if TYPE_CHECKING:
    from mmlens.analyses.attention_contribution import AttentionContribution

VALUE_TITLE = "norm of what is received"


def plot_contribution(
    contribution: AttentionContribution, *, visual: Visual = "rows", title: str | None = None
) -> Figure:
    """Draw mean contributions over destinations (and heads): sources down, layers to the right.

    A row of several visual tokens shows their sum; the whole image's would outshine all words.

    Args:
        contribution: what to draw.
        visual: how visual tokens are shown, see `mmlens.plots.heatmap`.
        title: instead of the destinations.

    Example:
        >>> attention_contribution(model, inputs, "image", "constraint").plot().save("it.pdf")
    """
    words = shorten(visible("".join(contribution.destination_labels).strip()), 40)
    return heatmap(
        contribution.values.float().flatten(1, -2).mean(dim=1).T,
        rows=contribution.source_labels,
        columns=contribution.layers,
        value_title=VALUE_TITLE,
        fold="sum",
        visual=visual,
        title=title or f"received by “{words}”",
        subtitle=subtitle_of(contribution.metadata),
    )
