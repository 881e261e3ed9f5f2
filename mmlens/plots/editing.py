"""Figures of edits: methods side by side, layers, and one edit after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.figure import Figure
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.plots.style import GRID, INK, LINES, layout, set_titles

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.editing.edit_check import EditCheck
    from mmlens.editing.edit_evaluation import EditEvaluation

MEASURE_TITLES = {
    "probability": "probability of the expected answer",
    "score": "greedy answer right",
}
EDIT_COLUMNS = ("method", "group", "measure", "before", "mean", "low", "high")

HATCHING = ("", "/", "x", ".")
"""Of bars whose colours come again."""


def plot_evaluation(found: EditEvaluation, name: str | None = None) -> Figure:
    """Draw every group's probability and score; over the number of edits if there are several."""
    table = found.summary().assign(method=name or found.metadata.get("method", "edit"))
    several = len(found.n_edits.unique()) > 1
    return plot_sequences(table) if several else plot_edits(table)


def plot_edits(
    df: pd.DataFrame, *, title: str | None = None, subtitle: str | None = None
) -> Figure:
    """Draw how each group of questions is answered after an edit by each method, and before it.

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
        rows=len(MEASURE_TITLES),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.1,
        row_titles=list(MEASURE_TITLES.values()),
    )
    for row, measure in enumerate(MEASURE_TITLES, start=1):
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
            height=top + 90 + 250 * len(MEASURE_TITLES),
            margin={"t": top, "l": 60, "r": 45, "b": 90},
            barmode="group",
            legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        )
    )
    set_titles(figure, title, subtitle)
    return figure


def bars_of(points: pd.DataFrame, method: str, index: int, *, in_legend: bool) -> go.Bar:
    """Return a method's bars with their intervals, one per group (the index of `points`).

    Where the colours are used up they come again, hatched; black is none of them, since intervals
    would not be seen on it.
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
        error_y=interval(points["mean"], points["low"], points["high"]),
        customdata=points[["before", "low", "high"]],
        hovertemplate=f"{method}<br>%{{x}}<br>%{{y:.3f}} (%{{customdata[1]:.3f}} to "
        "%{customdata[2]:.3f}), before %{customdata[0]:.3f}<extra></extra>",
    )


def interval(mean: pd.Series, low: pd.Series, high: pd.Series) -> dict[str, Any]:
    """Return plotly's description of the thin lines from `low` to `high` on bars."""
    ends = {"array": high - mean, "arrayminus": mean - low}
    return {"type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": INK, **ends}


def before_ticks(before: pd.Series, *, in_legend: bool) -> go.Scatter:
    """Return a line across each group at its value before the edits."""
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
    """Draw the effect of an edit by the layer that is edited: rows are groups, lines methods.

    Arguments and errors are those of `plot_edits`; `df` has a column `layer`.
    """
    return curves(df, "layer", title=title, subtitle=subtitle)


def plot_sequences(
    df: pd.DataFrame, *, title: str | None = None, subtitle: str | None = None
) -> Figure:
    """Draw how well edits last as more of them follow: rows are groups, lines methods.

    Arguments and errors are those of `plot_edits`; `df` has a column `n_edits`.
    """
    named = df.rename(columns={"n_edits": "edits in the model"})
    return curves(named, "edits in the model", title=title, subtitle=subtitle)


def curves(df: pd.DataFrame, x: str, *, title: str | None, subtitle: str | None) -> Figure:
    """Draw lines of methods and of no edit, in a column per measure and a row per group."""
    import pandas as pd

    shown = drawable(df)
    before = shown.drop_duplicates([x, "group", "measure"]).assign(method="before")
    for name in ("mean", "low", "high"):
        before[name] = before["before"]
    shown = pd.concat([shown, before])
    profile = shown.assign(
        model=shown["method"], site=shown["measure"].map(MEASURE_TITLES), role=shown["group"]
    )
    return plot_layer_profile(
        profile, x=x, y_title="mean", title=title, subtitle=subtitle, share_y="all"
    )


def drawable(df: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with a measure that can be drawn."""
    if missing := [name for name in EDIT_COLUMNS if name not in df.columns]:
        raise ValueError(f"a figure of edits needs the columns {', '.join(missing)} as well")
    shown = df[df["measure"].isin(list(MEASURE_TITLES))]
    if not len(shown):
        raise ValueError(
            f"no rows with a measure among {', '.join(MEASURE_TITLES)}: nothing to draw"
        )
    return shown


def plot_check(check: EditCheck, *, title: str | None = None) -> Figure:
    """Draw the share of answers that an edit left as they were, by the kind of question.

    Args:
        check: its intervals are those of `summary`.
        title: above everything.
    """
    table = check.summary().query("kind != 'the edit'")  # whose answer is to change
    figure = Figure(
        go.Bar(
            x=[
                f"{row.kind}<br>{row.asked - row.changed} of {row.asked}"
                for row in table.itertuples()
            ],
            y=table["unchanged"],
            marker={"color": LINES[0].color},
            error_y=interval(table["unchanged"], table["low"], table["high"]),
            hovertemplate="%{x}<br>%{y:.2f} unchanged<extra></extra>",
        )
    )
    figure.update_yaxes(range=[0, 1.02], gridcolor=GRID, title_text="answers unchanged")
    figure.update_layout(layout(width=640, height=360, margin={"t": 70 if title else 30, "l": 60}))
    figure.update_layout(title_text=title)
    return figure
