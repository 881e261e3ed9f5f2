"""Grids of cells as a figure: a heatmap over two axes, lines over one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from plotly import graph_objects as go

from mmlens.plots.figure import Figure
from mmlens.plots.heatmap import heatmap
from mmlens.plots.labels import visible
from mmlens.plots.style import GRID, INK, LINES, layout, set_titles

if TYPE_CHECKING:
    from mmlens.analyses.patch import Patched


def plot_grid(
    result: Patched, *, value: Literal["effect", "values"] = "effect", title: str | None = None
) -> Figure:
    """Draw a grid of cells: lines over one axis, a heatmap over two, panels for a third.

    Args:
        result: of `mmlens.patch`, or a scan.
        value: what the cells change ("effect"), or the metric itself ("values").
        title: above the figure; by default the metric and its baseline.

    Raises:
        ValueError: more than three axes, or another `value`.

    Example:
        >>> mmlens.patch(recording, cells, axes=("layer", "head")).plot().show()
    """
    if value not in ("effect", "values"):
        raise ValueError(f"value must be 'effect' or 'values', not {value!r}")
    axes = result.named_axes()
    if len(axes) > 3:
        raise ValueError(f"axes {', '.join(axes)}: a figure shows up to three; use to_dataframe()")
    numbers = getattr(result, value)
    followed = (
        f"{result.metric}({visible(result.answer.strip())})" if result.answer else result.metric
    )
    said = followed if value == "values" else f"{followed}, change"
    base = result.baseline
    title = title or (
        f"{followed}: {base:.3f} without changes" if isinstance(base, float) else said
    )
    *panels, last = axes
    if not panels:
        figure = _lines(result, numbers.tolist(), last, said)
    else:
        figure = heatmap(
            numbers,
            rows=[f"{panels[-1]} {each}" for each in axes[panels[-1]]],
            columns=list(axes[last]),
            panels=[f"{panels[0]} {each}" for each in axes[panels[0]]]
            if len(panels) > 1
            else ("",),
            value_title=said,
            column_title=last,
        )
    set_titles(figure, title, None)
    return figure


def _lines(result: Patched, numbers: list[float], axis: str, said: str) -> Figure:
    """Return one line over the cells."""
    names = [visible(str(each)) for each in result.named_axes()[axis]]
    line = go.Scatter(
        x=names,
        y=numbers,
        mode="lines+markers",
        line={"color": LINES[0].color, "width": 2},
        marker={"symbol": LINES[0].symbol, "size": 6},
        hovertemplate=f"{axis} %{{x}}<br>%{{y:.4g}}<extra></extra>",
    )
    figure = Figure(line)
    figure.add_hline(y=0.0, line={"color": INK, "width": 1, "dash": "dash"})
    figure.update_xaxes(title_text=axis, type="category", gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title_text=visible(said), gridcolor=GRID, zeroline=False)
    figure.update_layout(layout(width=640, height=400, margin={"t": 75, "r": 40}))
    return figure
