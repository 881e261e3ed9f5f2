"""Heatmaps over positions: a panel per site, tokens downwards, layers to the right.

Traces, contributions, the lens and attributions are all drawn by `heatmap`, and so can be any other
numbers of a model: the effect of an edit, the mean over a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from mmlens.plots.figure import Figure
from mmlens.plots.folding import Fold, Folding, Visual, folding_index, foldings
from mmlens.plots.labels import visible
from mmlens.plots.style import GRID, color_axis, layout, set_titles, spaced

ROW_PIXELS = 19
#: labels nearer to each other than this are left out
LABEL_PIXELS = 15
#: the rows of all panels together are squeezed into this height where there are too many
MAX_PIXELS = 1500
#: patches, each with a row, take no more than so many rows of words
MAX_PATCH_ROWS = 40
PANEL_PIXELS = 300
#: above the panels: title, subtitle, panel titles; below: layers, colour bar and its title
ABOVE, BELOW = 108, 108
#: from the panels down to their colour bars
BAR_PIXELS = 46


def heatmap(
    values: Float[Tensor, "*panel row column"] | Float[np.ndarray, "*panel row column"],
    *,
    rows: Sequence[str],
    columns: Sequence[int | str],
    panels: Sequence[str] = ("",),
    value_title: str = "",
    column_title: str = "layer",
    title: str | None = None,
    subtitle: str | None = None,
    visual: Visual = "folded",
    fold: Fold = "peak",
    texts: Sequence[Sequence[Sequence[str]]] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw numbers of positions and layers, with every value shown under the pointer.

    Visual tokens are one row, and a menu above the labels unfolds them to the rows of the image
    and to every patch. Every panel has its own colour scale, white at zero.

    Args:
        values: [panel, row, column], or [row, column] for one panel. NaN stays empty.
        rows: labels, as `inputs.labels()` gives them: "<img 3,5>" is a visual token.
        columns: layers, or other names.
        panels: titles.
        value_title: what the values are.
        column_title: what the columns are.
        title: above everything.
        subtitle: below the title.
        visual: which view comes first: the image in one row ("folded"), its "rows", "tokens".
        fold: what a row of several visual tokens shows: the value of largest size ("peak"), their
            "sum" or "mean".
        texts: what a cell says besides its number: [panel, row, column].
        limits: both ends of the colour scales; by default the smallest and the largest value.

    Raises:
        ValueError: numbers of rows, columns or panels that are not those of the values; an unknown
            `visual`.

    Example:
        >>> heatmap(after - before, rows=inputs.labels(), columns=range(32)).save("edit.pdf")
    """
    array = np.asarray(values.detach().float().cpu() if isinstance(values, Tensor) else values)
    array = array.astype(np.float32).reshape(-1, *array.shape[-2:])
    if array.shape != (len(panels), len(rows), len(columns)):
        raise ValueError(
            f"values of shape {tuple(array.shape)} for {len(panels)} panel(s), {len(rows)} rows "
            f"and {len(columns)} columns"
        )
    words = None if texts is None else np.array(texts, dtype=object).reshape(array.shape)
    all_views = tuple(foldings(rows))
    cells = _Cells(
        array, tuple(rows), tuple(columns), tuple(panels), all_views, fold, words, limits
    )
    first = folding_index(all_views, visual)
    figure: Figure = make_subplots(
        figure=Figure(),
        rows=1,
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.08 / len(panels),
        subplot_titles=[visible(panel) for panel in panels],
    )
    for index, view in enumerate(all_views):
        for panel in range(len(panels)):
            trace = cells.trace(view, panel, column_title)
            figure.add_trace(trace.update(visible=index == first), row=1, col=panel + 1)
    _lay_out(figure, cells, value_title, column_title)
    figure.update_layout(cells.layout(all_views[first]))
    if len(all_views) > 1:
        figure.update_layout(updatemenus=[_menu(cells, first)])
    set_titles(figure, title, subtitle)
    return figure


@dataclass(frozen=True, eq=False)
class _Cells:
    """The numbers, and how each view shows them."""

    values: Float[np.ndarray, "panel row column"]
    rows: tuple[str, ...]
    columns: tuple[int | str, ...]
    panels: tuple[str, ...]
    views: tuple[Folding, ...]
    fold: Fold
    texts: np.ndarray | None
    limits: tuple[float, float] | None

    def trace(self, view: Folding, panel: int, column_title: str) -> go.Heatmap:
        """Return one panel in one view."""
        values, largest = view.fold(self.values[panel], self.fold)
        edges = row_edges(view)
        unit = pixels_per_row(edges)
        gap = 0.5 if unit * float(np.diff(edges).min()) > 6 else 0
        return go.Heatmap(
            z=values,
            x=list(self.columns),
            y=edges,
            coloraxis=_axis_name(panel),
            customdata=self._hover(view, panel, largest),
            hovertemplate=f"%{{customdata}}<br>{column_title} %{{x}}<br>%{{z:.4g}}<extra></extra>",
            xgap=gap,
            ygap=gap,
        )

    def _hover(self, view: Folding, panel: int, largest: np.ndarray) -> list[list[str]]:
        """Return what the pointer shows of each cell besides its numbers."""
        rows = []
        for row, best in zip(view.rows, largest.tolist(), strict=True):
            said = []
            for column, member in enumerate(best):
                text = row.label
                if len(row.members) > 1:
                    text += f"<br>largest at {visible(self.rows[member])}"
                if self.texts is not None:
                    text += f"<br>{visible(str(self.texts[panel, member, column]))}"
                said.append(text)
            rows.append(said)
        return rows

    def layout(self, view: Folding) -> dict[str, Any]:
        """Return the part of the figure's layout that depends on the view."""
        edges = row_edges(view)
        unit = pixels_per_row(edges)
        at, names = row_labels(view, self.views, edges, unit)
        values, _ = view.fold(self.values, self.fold)
        height = max(380, round(unit * edges[-1]) + ABOVE + BELOW)
        bar_at = -BAR_PIXELS / (height - ABOVE - BELOW)  # of the panels' height
        changes: dict[str, Any] = {
            "height": height,
            "yaxis": {"tickvals": at, "ticktext": names, "range": [float(edges[-1]), 0.0]},
        }
        for panel in range(len(self.panels)):
            axis = color_axis(values[panel], self.limits)
            changes[_axis_name(panel)] = axis | {"colorbar": {"y": bar_at}}
        return changes


def row_edges(view: Folding) -> np.ndarray:
    """Return where rows begin and end, in rows of words; thin rows where every patch has one."""
    thin = min(1.0, MAX_PATCH_ROWS / max(1, sum(row.visual for row in view.rows)))
    heights = [thin if row.visual else 1.0 for row in view.rows]
    return np.concatenate([[0.0], np.cumsum(heights)])


def pixels_per_row(edges: np.ndarray) -> float:
    """Return the height of a row of words."""
    return min(ROW_PIXELS, MAX_PIXELS / float(edges[-1]))


def row_labels(
    view: Folding, all_views: Sequence[Folding], edges: np.ndarray, unit: float
) -> tuple[list[float], list[str]]:
    """Return the places and texts of labels: words first, then patches where there is room.

    Where single patches are too thin for labels, rows of the image have one.
    """
    centres = (edges[1:] + edges[:-1]) / 2
    named = [([index], row) for index, row in enumerate(view.rows)]
    if unit * float(np.diff(edges).min()) < LABEL_PIXELS and view.name == "tokens":
        by_row = all_views[folding_index(all_views, "rows")]
        named = [(list(row.members), row) for row in by_row.rows]
    taken: dict[float, str] = {}
    for members, row in sorted(named, key=lambda each: each[1].visual):
        if members[-1] - members[0] >= len(members):
            continue  # scattered, as the ends of lines are
        here = float(centres[members].mean())
        if all(abs(here - other) * unit >= LABEL_PIXELS for other in taken):
            taken[here] = row.label
    at = sorted(taken)
    return at, [taken[here] for here in at]


def _lay_out(figure: Figure, cells: _Cells, value_title: str, column_title: str) -> None:
    """Set axes, margins and colour bars, which are the same in every view."""
    n_panels = len(cells.panels)
    frame = {"showline": True, "mirror": True, "linecolor": GRID, "ticks": ""}
    plain = {"showgrid": False, "zeroline": False} | frame
    at = spaced(cells.columns)
    figure.update_xaxes(
        title_text=column_title,
        title_standoff=4,
        title_font_size=13,
        type="category",  # layers that were left out leave no gap
        tickvals=[cells.columns[index] for index in at],
        ticktext=[visible(str(cells.columns[index])) for index in at],
        **plain,
    )
    figure.update_yaxes(automargin=True, **plain)
    figure.update_layout(
        layout(
            width=max(620, 130 + PANEL_PIXELS * n_panels),
            margin={"l": 30, "r": 30, "t": ABOVE, "b": BELOW},
        )
    )
    for panel in range(n_panels):
        left, right = figure.layout[f"xaxis{panel + 1 if panel else ''}"].domain
        bar = {
            "orientation": "h",
            "x": (left + right) / 2,
            "xanchor": "center",
            "len": 0.9 * (right - left),
            "yanchor": "top",
            "ypad": 0,
            "thickness": 12,
            "outlinewidth": 0,
            "nticks": 5,
            "exponentformat": "power",
            "title": {"text": value_title, "side": "bottom", "font": {"size": 12}},
        }
        figure.update_layout({_axis_name(panel): {"colorbar": bar}})


def _menu(cells: _Cells, first: int) -> dict[str, Any]:
    """Return a menu above the labels that changes the view; image files leave it out."""
    n_panels = len(cells.panels)
    buttons = []
    for index, view in enumerate(cells.views):
        seen = [other == index for other in range(len(cells.views)) for _ in range(n_panels)]
        changes = flattened(cells.layout(view))
        buttons.append(
            {"label": view.title, "method": "update", "args": [{"visible": seen}, changes]}
        )
    return {
        "buttons": buttons,
        "active": first,
        "x": 0,
        "xanchor": "right",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"r": 4, "b": 4},
        "font": {"size": 11},
        "bgcolor": "white",
        "bordercolor": GRID,
    }


def flattened(changes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"yaxis": {"range": r}}` as `{"yaxis.range": r}`, which keeps the axis's rest."""
    flat: dict[str, Any] = {}
    for name, value in changes.items():
        inner = isinstance(value, dict)
        flat |= flattened(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def _axis_name(panel: int) -> str:
    return f"coloraxis{panel + 1 if panel else ''}"
