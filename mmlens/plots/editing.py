"""Figures of edits: methods side by side, layers, and one edit after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.figure import Figure
from mmlens.plots.profile import plot_layer_profile
from mmlens.plots.style import GRID, INK, LINES, layout

if TYPE_CHECKING:
    import pandas as pd

MEASURES = {
    "probability": "probability of the expected answer",
    "score": "greedy answer right",
}
COLUMNS = ("method", "group", "measure", "before", "mean", "low", "high")

HATCHING = ("", "/", "x", ".")
"""Of bars whose colours come again."""


def plot_edits(
    df: pd.DataFrame, *, title: str | None = None, subtitle: str | None = None
) -> Figure:
    """Draw what methods do to each group of questions: bars with intervals, and a tick for before.

    Args:
        df: columns `method`, `group`, `measure`, `before`, `mean`, `low`, `high`, as
            `EditEvaluation.summary` gives them. Groups and methods come in the order in which they
            first occur.
        title: above everything.
        subtitle: below the title: how many edits, which interval.

    Raises:
        ValueError: a column is missing, or there is nothing to draw.
    """
    shown = drawable(df)
    methods, groups = (list(shown[name].unique()) for name in ("method", "group"))
    figure: Figure = make_subplots(
        figure=Figure(),
        rows=len(MEASURES),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.1,
        row_titles=list(MEASURES.values()),
    )
    for row, measure in enumerate(MEASURES, start=1):
        for index, method in enumerate(methods):
            chosen = (shown["measure"] == measure) & (shown["method"] == method)
            points = shown[chosen].set_index("group").reindex(groups)
            bars = bars_of(points, method, index, in_legend=row == 1)
            figure.add_trace(bars, row=row, col=1)
        before = shown[shown["measure"] == measure].groupby("group", sort=False)["before"].mean()
        figure.add_trace(before_ticks(before.reindex(groups), in_legend=row == 1), row=row, col=1)
    figure.update_yaxes(range=[0, 1.02], gridcolor=GRID, zeroline=False)
    top = 70 + 30 * bool(title) + 20 * bool(subtitle)
    figure.update_layout(
        layout(
            width=max(640, 160 + len(groups) * max(115, 40 + 24 * len(methods))),
            height=top + 90 + 250 * len(MEASURES),
            margin={"t": top, "l": 60, "r": 45, "b": 90},
            barmode="group",
            legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        )
    )
    figure.update_layout(title_text=title)
    if subtitle:
        figure.update_layout(title_subtitle={"text": subtitle, "font": {"size": 12}})
    return figure


def bars_of(points: pd.DataFrame, method: str, index: int, *, in_legend: bool) -> go.Bar:
    """A method's bars, one per group (the index of `points`), with their intervals.

    Args:
        index: of the method. Where the colours are used up they come again, hatched; black is
            none of them, since intervals would not be seen on it.
    """
    colors = [line.color for line in LINES if line.color != "#000000"]
    again, place = divmod(index, len(colors))
    return go.Bar(
        x=list(points.index),
        y=points["mean"],
        name=method,
        legendgroup=method,
        showlegend=in_legend,
        marker={"color": colors[place], "pattern": {"shape": HATCHING[again % len(HATCHING)]}},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": points["high"] - points["mean"],
            "arrayminus": points["mean"] - points["low"],
            "thickness": 1,
            "width": 3,
            "color": INK,
        },
        customdata=points[["before", "low", "high"]],
        hovertemplate=f"{method}<br>%{{x}}<br>%{{y:.3f}} (%{{customdata[1]:.3f}} to "
        "%{customdata[2]:.3f}), before %{customdata[0]:.3f}<extra></extra>",
    )


def before_ticks(before: pd.Series, *, in_legend: bool) -> go.Scatter:
    """A line across each group at what it was without any edit."""
    return go.Scatter(
        x=list(before.index),
        y=before,
        mode="markers",
        name="before",
        legendgroup="before",
        showlegend=in_legend,
        marker={"symbol": "line-ew", "size": 40, "line": {"width": 2, "color": INK}},
        hovertemplate="before<br>%{x}<br>%{y:.3f}<extra></extra>",
    )


def plot_edit_layers(
    df: pd.DataFrame, *, title: str | None = None, subtitle: str | None = None
) -> Figure:
    """Draw what an edit does by the layer that is edited: rows are groups, lines methods.

    Args:
        df: as for `plot_edits`, with a column `layer`.
        title: above everything.
        subtitle: below the title.

    Raises:
        ValueError: a column is missing, or there is nothing to draw.
    """
    return curves(df, "layer", title=title, subtitle=subtitle)


def plot_sequences(
    df: pd.DataFrame, *, title: str | None = None, subtitle: str | None = None
) -> Figure:
    """Draw what becomes of edits as more of them follow: rows are groups, lines methods.

    Args:
        df: as for `plot_edits`, with a column `n_edits`.
        title: above everything.
        subtitle: below the title.

    Raises:
        ValueError: a column is missing, or there is nothing to draw.
    """
    named = df.rename(columns={"n_edits": "edits in the model"})
    return curves(named, "edits in the model", title=title, subtitle=subtitle)


def curves(df: pd.DataFrame, x: str, *, title: str | None, subtitle: str | None) -> Figure:
    """Lines of methods and of no edit, in a column per measure and a row per group."""
    import pandas as pd

    shown = drawable(df)
    before = shown.drop_duplicates([x, "group", "measure"]).assign(method="before")
    for name in ("mean", "low", "high"):
        before[name] = before["before"]
    shown = pd.concat([shown, before])
    profile = shown.assign(
        model=shown["method"], site=shown["measure"].map(MEASURES), role=shown["group"]
    )
    return plot_layer_profile(
        profile, x=x, y_title="mean", title=title, subtitle=subtitle, share_y="all"
    )


def drawable(df: pd.DataFrame) -> pd.DataFrame:
    """The rows with a measure that is drawn.

    Raises:
        ValueError: a column is missing, or there are no such rows.
    """
    if missing := [name for name in COLUMNS if name not in df.columns]:
        raise ValueError(f"a figure of edits needs the columns {', '.join(missing)} as well")
    shown = df[df["measure"].isin(list(MEASURES))]
    if not len(shown):
        raise ValueError(f"no rows with a measure among {', '.join(MEASURES)}: nothing to draw")
    return shown
