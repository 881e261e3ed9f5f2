"""Attention contributions: layers against sources, and one layer's on the picture's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.labels import shorten, visible
from mmlens.plots.style import heat_scale, layout

if TYPE_CHECKING:
    from mmlens.attribution import AttentionContribution

MAX_LABELS = 40
#: more sources than this have no labels: they would not be readable


def plot_contribution(
    contribution: AttentionContribution, *, layer: int | None = None, image: int = 0
) -> go.Figure:
    """Mean contributions over destinations (and heads), by layer and source.

    Sources that are patches of `image` get a second panel, in which they lie as in the picture.

    Args:
        contribution: what to draw.
        layer: of the second panel; by default the one with the largest sum over sources.
        image: of the second panel.

    Raises:
        ValueError: the contribution was not computed for that layer.

    Example:
        >>> save_figure(plot_contribution(contribution, layer=0), "contribution.html")
    """
    if layer is not None and layer not in contribution.layers:
        raise ValueError(f"layer {layer} is not among {contribution.layers}")
    values = contribution.values.float().flatten(1, -2).mean(dim=1)
    seen = [patch[0] == image and patch[1] >= 0 for patch in contribution.source_patches]
    strongest = contribution.layers[int(values.sum(dim=1).argmax())]
    shown = strongest if layer is None else layer
    titles = ["by layer and source"] + [f"layer {shown}, on the picture"] * any(seen)
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles, horizontal_spacing=0.16)
    names = [
        shorten(f"{position} {visible(label)}", 18)
        for position, label in zip(contribution.source, contribution.source_labels, strict=True)
    ]
    figure.add_trace(
        _heatmap(values, x=names, y=list(contribution.layers), where="layer %{y}, source %{x}"),
        row=1,
        col=1,
    )
    figure.update_xaxes(showticklabels=len(names) <= MAX_LABELS, title_text="source", col=1)
    figure.update_yaxes(title_text="layer", col=1)
    if any(seen):
        grid = contribution.image_grid(image)[contribution.layers.index(shown)]
        grid = grid.float().flatten(0, -3).mean(dim=0)
        figure.add_trace(_heatmap(grid, where="row %{y}, column %{x}", bar_at=1.02), row=1, col=2)
        figure.update_yaxes(autorange="reversed", scaleanchor="x2", constrain="domain", col=2)
        figure.update_xaxes(constrain="domain", col=2)
    width = 520 * len(titles) + 60
    figure.update_layout(layout(width=width, height=460, margin={"t": 60, "r": 90}))
    return figure


def _heatmap(values: Any, where: str, bar_at: float | None = None, **axes: Any) -> go.Heatmap:
    """A heatmap of numbers from 0; NaN stays empty."""
    high = float(values.nan_to_num().max()) or 1e-6
    return go.Heatmap(
        z=values.tolist(),
        zmin=0,
        zmax=high,
        colorscale=heat_scale(0, high),
        showscale=bar_at is not None or "x" in axes,
        colorbar={"x": 0.42 if bar_at is None else bar_at, "thickness": 12},
        hovertemplate=f"{where}<br>%{{z:.4g}}<extra></extra>",
        **axes,
    )
