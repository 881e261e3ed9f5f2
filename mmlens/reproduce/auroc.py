"""Do contributions tell right answers from wrong ones, and better than confidence?

The paper: AUROC 0.63 for the constraint's contribution to the last token (mean of layers 16 and
17), 0.76 for confidence. Here the two layers are chosen in other folds than they are scored in.
"""

from __future__ import annotations

import pandas as pd
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.analyses import correctness
from mmlens.plots.figure_folder import FigureWithTables
from mmlens.plots.style import GRID, INK, LINES, layout
from mmlens.reproduce.correctness import answers
from mmlens.reproduce.study import Study


def auroc_figure(study: Study) -> FigureWithTables:
    """AUROC of contributions by layer, of chosen layers in held-out folds, and of confidence."""
    known = answers(study)
    right = known.right.numpy()
    by_layer, held_out, chosen = [], [], {}
    for source, values in known.contributions.items():
        aurocs = [correctness.auroc(column, right) for column in values.T]
        columns = {"source": source, "layer": range(len(aurocs)), "auroc": aurocs}
        by_layer.append(pd.DataFrame(columns))
        found = correctness.predict_correctness(
            values, known.confidence, right, known.clusters, **study.resampling
        )
        held_out.append(found.to_dataframe().assign(source=source))
        chosen[source] = found.layers
    table = pd.concat(held_out)
    layers = pd.concat(by_layer)
    figure = draw_auroc(layers, table)
    figure.update_layout(
        title_text="Telling right answers from wrong ones",
        title_subtitle={
            "text": study.describe(f"{right.sum()} right and {(~right).sum()} wrong"),
            "font": {"size": 12},
        },
    )
    return FigureWithTables(
        "auroc",
        figure,
        {"table": table, "layers": layers},
        known.raw(),
        known.counts,
        {"layers of each fold": chosen},
    )


def draw_auroc(layers: pd.DataFrame, table: pd.DataFrame) -> go.Figure:
    """Lines by layer, and points with intervals for what was predicted out of sight."""
    titles = ("each layer, seen in hindsight", "two layers, chosen in other folds")
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, subplot_titles=titles, column_widths=[0.6, 0.4]
    )
    names = {source: f"{source} → last" for source in layers["source"].unique()}
    for style, (source, name) in zip(LINES, names.items(), strict=False):
        points = layers[layers["source"] == source]
        line = go.Scatter(
            x=points["layer"].tolist(),
            y=points["auroc"].tolist(),
            name=name,
            mode="lines+markers",
            line={"color": style.color, "dash": style.dash},
            marker={"symbol": style.symbol, "size": 5},
        )
        figure.add_trace(line, row=1, col=1)
        row = table[(table["source"] == source) & (table["predictor"] == "contribution")].iloc[0]
        figure.add_trace(point(name, row, style.color), row=1, col=2)
    confidence = table[table["predictor"] == "confidence"].iloc[0]
    figure.add_trace(point("confidence", confidence, INK), row=1, col=2)
    figure.add_hline(y=0.5, line={"color": INK, "width": 1, "dash": "dash"})
    figure.update_xaxes(title_text="layer", gridcolor=GRID, zeroline=False, row=1, col=1)
    figure.update_yaxes(gridcolor=GRID)
    figure.update_yaxes(title_text="AUROC", row=1, col=1)
    figure.update_layout(
        layout(
            width=980,
            height=430,
            margin={"t": 135},
            legend={"orientation": "h", "x": 0, "y": 0.77, "yref": "container"},
        )
    )
    return figure


def point(name: str, row: pd.Series, color: str) -> go.Scatter:
    """A value and its interval."""
    return go.Scatter(
        x=[name],
        y=[row["auroc"]],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [row["high"] - row["auroc"]],
            "arrayminus": [row["auroc"] - row["low"]],
        },
        mode="markers",
        marker={"color": color, "size": 10},
        showlegend=False,
        hovertemplate=f"{name}<br>%{{y:.3f}}<extra></extra>",
    )
