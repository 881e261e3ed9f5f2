"""Attention knockout: the answer's probability with each window of layers cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plotly import graph_objects as go

from mmlens.plots.labels import visible
from mmlens.plots.style import GRID, INK, LINES, layout

if TYPE_CHECKING:
    from mmlens.attribution import AttentionKnockout


def plot_knockout(knockout: AttentionKnockout) -> go.Figure:
    """P(answer) by the centre of the window; the dashed line is the run with nothing cut.

    Example:
        >>> save_figure(plot_knockout(cut), "knockout.html")
    """
    line = go.Scatter(
        x=list(knockout.layers),
        y=knockout.probability.tolist(),
        mode="lines+markers",
        line={"color": LINES[0].color, "width": 2},
        marker={"symbol": LINES[0].symbol, "size": 6},
        hovertemplate="layer %{x}<br>%{y:.4f}<extra></extra>",
    )
    figure = go.Figure(line)
    figure.add_hline(y=knockout.clean, line={"color": INK, "width": 1, "dash": "dash"})
    cut = "one layer" if knockout.window == 1 else f"{knockout.window} layers"
    figure.update_xaxes(title_text=f"layer ({cut} cut)", gridcolor=GRID, zeroline=False)
    figure.update_yaxes(
        title_text=f"P({visible(knockout.answer.strip())})", gridcolor=GRID, rangemode="tozero"
    )
    figure.update_layout(layout(width=640, height=400, margin={"t": 30}))
    return figure
