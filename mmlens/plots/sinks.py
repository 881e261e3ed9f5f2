"""Attention sinks: what every position receives, over how long its values are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plotly import graph_objects as go

from mmlens.plots.figure import Figure
from mmlens.plots.labels import visible
from mmlens.plots.style import GRID, LINES, layout

if TYPE_CHECKING:
    from mmlens.analyses.attention_sinks import AttentionSinks


def plot_sinks(found: AttentionSinks) -> Figure:
    """Draw attention received over the length of values, means over layers; sinks stand out.

    Example:
        >>> attention_sinks(model, inputs).plot().save("sinks.html")
    """
    table = found.to_dataframe()
    figure = Figure()
    for is_sink, line, name in ((False, LINES[0], "other positions"), (True, LINES[1], "sinks")):
        some = table[table["sink"] == is_sink]
        figure.add_trace(
            go.Scatter(
                x=some["value_norm"],
                y=some["received"],
                text=[visible(label) for label in some["label"]],
                mode="markers",
                name=name,
                marker={"color": line.color, "symbol": line.symbol, "size": 8},
                hovertemplate="%{text}<br>%{x:.3g}<br>%{y:.3g}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="length of the values", gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title_text="attention received", gridcolor=GRID, rangemode="tozero")
    figure.update_layout(layout(width=640, height=420, margin={"t": 75}), showlegend=True)
    figure.update_layout(title_text=f"{len(found.sinks)} attention sinks")
    return figure
