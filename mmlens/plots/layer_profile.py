"""Layer profiles averaged over many questions, with intervals: sites x roles, models as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.figure import Figure
from mmlens.plots.style import GRID, INK, LINES, LineStyle, layout, set_titles, site_title

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.analyses.aggregation import AggregatedTraces

PROFILE_COLUMNS = ("model", "site", "role", "mean", "low", "high")


def plot_aggregated(profile: AggregatedTraces) -> Figure:
    """Draw a panel per site and role, layers to the right."""
    return plot_layer_profile(
        profile.to_dataframe(),
        y_title=profile.effect.replace("_", " "),
        subtitle=f"{len(profile.values)} questions, {profile.level:.0%} bootstrap interval, "
        f"window {profile.window}",
    )


def plot_layer_profile(
    df: pd.DataFrame,
    *,
    x: str = "layer",
    y_title: str = "indirect effect",
    title: str | None = None,
    subtitle: str | None = None,
    share_y: Literal["all", "site", "none"] = "all",
) -> Figure:
    """Draw mean effects per layer: a row of panels per role, a column per site, a line per model.

    Args:
        df: columns `model`, `site`, `role` (where it was restored: "constraint", "last"),
            `layer`, `mean`, `low`, `high` (ends of the interval), one row per point. Panels and
            lines come in the order in which they first occur.
        x: another column instead of `layer`; it is the title of the axis as well.
        y_title: what the values are.
        title: above everything.
        subtitle: below the title: how many questions, which interval.
        share_y: which panels have the same y axis: "all", those of the same "site", or "none".

    Raises:
        ValueError: a column is missing, or there are no rows.

    Example:
        >>> plot_layer_profile(df, subtitle="60 questions, 95 % interval").save("profile.png")
    """
    if missing := [name for name in (*PROFILE_COLUMNS, x) if name not in df.columns]:
        raise ValueError(f"a layer profile needs the columns {', '.join(missing)} as well")
    if not len(df):
        raise ValueError("a layer profile of no rows cannot be drawn")
    sites, roles, models = (list(df[name].unique()) for name in ("site", "role", "model"))
    figure: Figure = make_subplots(
        figure=Figure(),
        rows=len(roles),
        cols=len(sites),
        shared_yaxes={"all": "all", "site": "columns", "none": False}[share_y],
        shared_xaxes=True,
        horizontal_spacing=0.03 if share_y == "all" else 0.07,
        vertical_spacing=0.16 / max(2, len(roles)),
        column_titles=[site_title(site) for site in sites],
        row_titles=[str(role) for role in roles],
    )
    for index, model in enumerate(models):
        style = LINES[index % len(LINES)]
        for row, role in enumerate(roles, start=1):
            for column, site in enumerate(sites, start=1):
                chosen = (df["model"] == model) & (df["site"] == site) & (df["role"] == role)
                points = df[chosen].sort_values(x)
                first = row == 1 and column == 1
                for shape in line_with_band(points, x, str(model), style, in_legend=first):
                    figure.add_trace(shape, row=row, col=column)
    top = 70 + 30 * bool(title) + 20 * bool(subtitle)
    _lay_out(figure, len(roles), len(sites), x, y_title, top)
    set_titles(figure, title, subtitle)
    return figure


def _lay_out(figure: Figure, n_rows: int, n_columns: int, x: str, y_title: str, top: int) -> None:
    """Set zero, axes and sizes; the legend lies between headings and panels."""
    height = top + 65 + 230 * n_rows
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    figure.update_xaxes(gridcolor=GRID, zeroline=False)
    figure.update_xaxes(title_text=x, row=n_rows)
    figure.update_yaxes(gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title_text=y_title, col=1)
    figure.update_layout(
        layout(
            width=max(640, 120 + 290 * n_columns),
            height=height,
            margin={"t": top, "l": 75, "r": 45, "b": 65},
            legend={
                "orientation": "h",
                "x": 0,
                "y": 1 - (top - 58) / height,
                "yref": "container",
                "yanchor": "top",
            },
        )
    )


def line_with_band(
    points: pd.DataFrame, x: str, name: str, style: LineStyle, *, in_legend: bool
) -> list[go.Scatter]:
    """Return the interval as a closed outline, and the mean on top of it."""
    values = points[x].tolist()
    low, high = points["low"].tolist(), points["high"].tolist()
    band = go.Scatter(
        x=values + values[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=style.fill(),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=name,
        showlegend=False,
    )
    line = go.Scatter(
        x=values,
        y=points["mean"].tolist(),
        customdata=list(zip(low, high, strict=True)),
        name=name,
        legendgroup=name,
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": style.color, "dash": style.dash, "width": 2},
        marker={"symbol": style.symbol, "size": 5},
        hovertemplate=f"{name}<br>{x} %{{x}}<br>%{{y:.4f}} "
        "(%{customdata[0]:.4f} to %{customdata[1]:.4f})<extra></extra>",
    )
    return [band, line]
