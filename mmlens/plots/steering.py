"""Steering vectors: where they generalise, and what steering does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.figure import Figure
from mmlens.plots.labels import visible
from mmlens.plots.style import GRID, INK, LINES, layout, site_title, spaced

if TYPE_CHECKING:
    from mmlens.analyses.steering_scores import SteeringScores
    from mmlens.analyses.steering_vector import SteeringVector


def plot_steering_vector(vector: SteeringVector, *, title: str | None = None) -> Figure:
    """Draw how far apart the other pairs' direction puts each pair, layer by layer.

    Distances are shares of the activations' mean norm in the layer. Above the line the direction
    that was found without a pair is right about it.

    Args:
        vector: the result of `mmlens.steering_vector`.
        title: instead of the site and the method.

    Example:
        >>> steering_vector(model, positive, negative).plot().save("vector.html")
    """
    shares = vector.margins / vector.activation_norms[:, None]
    figure = Figure(
        go.Scatter(
            x=[layer for layer in vector.layers for _ in range(shares.shape[1])],
            y=shares.flatten().tolist(),
            mode="markers",
            name="a pair",
            marker={"color": LINES[0].fill(0.45), "size": 6},
            hovertemplate="layer %{x}<br>%{y:.4f}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=list(vector.layers),
        y=shares.mean(dim=1).tolist(),
        mode="lines+markers",
        name="mean",
        line={"color": LINES[1].color, "dash": LINES[1].dash},
        marker={"symbol": LINES[1].symbol, "size": 6},
        customdata=vector.held_out.tolist(),
        hovertemplate="layer %{x}<br>mean %{y:.4f}<br>right: %{customdata:.0%}<extra></extra>",
    )
    figure.add_hline(y=0, line={"color": INK, "width": 1, "dash": "dash"})
    figure.update_xaxes(
        title_text="layer",
        tickvals=[vector.layers[index] for index in spaced(vector.layers)],
        gridcolor=GRID,
        zeroline=False,
    )
    figure.update_yaxes(title_text="distance, share of the norm", gridcolor=GRID, zeroline=False)
    figure.update_layout(layout(width=640, height=400, margin={"t": 75, "r": 95}))
    how = vector.method.replace("_", " ")
    figure.update_layout(
        title_text=title or f"{site_title(vector.site)}: pairs along the others’ {how}"
    )
    return figure


COLUMNS = 3
"""Panels beside each other."""
MEASURE_TITLES = {
    "yes_rate": "share of yes",
    "f1": "F1",
    "chair_i": "CHAIR<sub>i</sub> (less is better)",
    "chair_s": "CHAIR<sub>s</sub> (less is better)",
    "recall": "recall",
    "objects": "objects per caption",
}


def interval_bars(scores: SteeringScores, measure: int, layer: int) -> dict[str, Any] | None:
    """Return the error bars of a line; None where the scores have no intervals."""
    if scores.low is None or scores.high is None:
        return None
    values, low, high = (each[measure, layer] for each in (scores.values, scores.low, scores.high))
    ends = {"array": (high - values).tolist(), "arrayminus": (values - low).tolist()}
    return {"type": "data", "symmetric": False, "thickness": 1, "width": 3, **ends}


def plot_steering_scores(scores: SteeringScores, *, title: str | None = None) -> Figure:
    """Draw each measure by scale, a line per layer, with the ends of the bootstrap intervals.

    Scale 0 is the model as it is.

    Args:
        scores: the result of `mmlens.analyses.steering_scores.steering_scores`.
        title: above the panels.

    Example:
        >>> steering_scores({"POPE": sweep.results()}).plot().save("scores.pdf")
    """
    n = len(scores.measures)
    columns = min(n, COLUMNS)
    rows = -(-n // columns)
    several = len(set(scores.data)) > 1
    names = [
        f"{visible(data)}: {named}" if several else named
        for data, measure in zip(scores.data, scores.measures, strict=True)
        for named in [MEASURE_TITLES.get(measure, measure)]
    ]
    panels = make_subplots(rows, columns, subplot_titles=names, vertical_spacing=0.32 / rows)
    for m in range(n):
        for at, layer in enumerate(scores.layers):
            style = LINES[at % len(LINES)]
            panels.add_scatter(
                row=m // columns + 1,
                col=m % columns + 1,
                x=list(scores.scales),
                y=scores.values[m, at].tolist(),
                customdata=scores.n[m, at].tolist(),
                mode="lines+markers",
                name=f"layer {layer}",
                legendgroup=str(layer),
                showlegend=m == 0,
                line={"color": style.color, "dash": style.dash},
                marker={"symbol": style.symbol, "size": 6},
                error_y=interval_bars(scores, m, at),
                hovertemplate="scale %{x}<br>%{y:.4f} of %{customdata} questions<extra></extra>",
            )
    figure = Figure(panels)
    figure.update_xaxes(title_text="scale", gridcolor=GRID, zerolinecolor=INK)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, rangemode="tozero")
    figure.update_layout(
        layout(width=90 + 290 * columns + 90, height=110 + 250 * rows, title_text=title)
    )
    return figure
