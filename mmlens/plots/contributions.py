"""Attention contributions: sources against layers, and every layer's on the picture's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.figure import Figure
from mmlens.plots.labels import shorten, visible
from mmlens.plots.panels import heatmap
from mmlens.plots.positions import Visual
from mmlens.plots.style import SLIDER_PIXELS, color_axis, color_bar, layout
from mmlens.plots.trace import described

if TYPE_CHECKING:
    from mmlens.attribution import AttentionContribution

VALUE_TITLE = "norm of what is received"


def plot_contribution(
    contribution: AttentionContribution, *, visual: Visual = "rows", title: str | None = None
) -> Figure:
    """Mean contributions over destinations (and heads): sources downwards, layers to the right.

    A row of several visual tokens shows their sum; the whole picture's would outshine all words.

    Args:
        contribution: what to draw.
        visual: how visual tokens are shown, see `mmlens.plots.heatmap`.
        title: instead of the destinations.

    Example:
        >>> attention_contribution(model, inputs, "image", "constraint").plot().save("it.pdf")
    """
    return heatmap(
        mean_by_layer(contribution).T,
        rows=contribution.source_labels,
        columns=contribution.layers,
        value_title=VALUE_TITLE,
        fold="sum",
        visual=visual,
        title=title or f"received by “{received_by(contribution)}”",
        subtitle=described(contribution.metadata),
    )


def plot_grid(
    contribution: AttentionContribution,
    *,
    layer: int | None = None,
    image: int = 0,
    title: str | None = None,
) -> Figure:
    """Mean contributions of one layer where they lie in the picture, with a slider over layers.

    It needs no picture; `mmlens.plots.overlay` draws the same over one.

    Args:
        contribution: what to draw.
        layer: the first one shown; by default the one with the largest sum over patches.
        image: which picture.
        title: instead of the destinations.

    Raises:
        ValueError: no patches of that image among the sources, or a layer that was not computed.

    Example:
        >>> plot_grid(contribution, layer=0).save("grid.png")
    """
    if layer is not None and layer not in contribution.layers:
        raise ValueError(f"layer {layer} is not among {contribution.layers}")
    grids = contribution.image_grid(image).float().flatten(1, -3).mean(dim=1).numpy()
    strongest = int(np.nansum(grids, axis=(1, 2)).argmax())
    first = strongest if layer is None else contribution.layers.index(layer)
    figure: Figure = make_subplots(figure=Figure(), rows=1, cols=1)
    for index, grid in enumerate(grids):
        where = f"layer {contribution.layers[index]}<br>row %{{y}}, column %{{x}}"
        figure.add_trace(
            go.Heatmap(
                z=grid,
                visible=index == first,
                coloraxis="coloraxis",
                hovertemplate=f"{where}<br>%{{z:.4g}}<extra></extra>",
            )
        )
    n_rows, n_columns = grids.shape[1:]
    height = round(400 * min(2.0, n_rows / n_columns)) + 140 + SLIDER_PIXELS
    steps = [_step(index, len(grids), grid, contribution) for index, grid in enumerate(grids)]
    figure.update_xaxes(title_text="column", constrain="domain", showgrid=False, zeroline=False)
    figure.update_layout(xaxis_title_font_size=13, yaxis_title_font_size=13)
    figure.update_yaxes(
        title_text="row", autorange="reversed", scaleanchor="x", constrain="domain", showgrid=False
    )
    figure.update_layout(
        layout(width=560, height=height, margin={"t": 80, "r": 90, "b": 60 + SLIDER_PIXELS}),
        title_text=title or f"received by “{received_by(contribution)}”",
        coloraxis=color_axis(grids[first]) | {"colorbar": color_bar(VALUE_TITLE)},
        sliders=[
            {
                "active": first,
                "steps": steps,
                "currentvalue": {"prefix": "layer ", "font": {"size": 12}},
                "pad": {"t": 45},
                "font": {"size": 10},
            }
        ],
    )
    return figure


def _step(
    index: int, n_layers: int, grid: Float[np.ndarray, "row column"], it: AttentionContribution
) -> dict[str, Any]:
    """The slider's step to one layer, with a colour scale of its own."""
    axis = {f"coloraxis.{name}": value for name, value in color_axis(grid).items()}
    seen = [other == index for other in range(n_layers)]
    return {"label": str(it.layers[index]), "method": "update", "args": [{"visible": seen}, axis]}


def mean_by_layer(contribution: AttentionContribution) -> Float[np.ndarray, "layer source"]:
    """The mean over destinations (and heads)."""
    return contribution.values.float().flatten(1, -2).mean(dim=1).numpy()


def received_by(contribution: AttentionContribution) -> str:
    """The destinations in words."""
    return shorten(visible("".join(contribution.destination_labels).strip()), 40)
