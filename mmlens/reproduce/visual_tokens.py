"""Visual tokens to the constraint: which of them, and in which layer.

The paper: the last sixteenth of the visual tokens (540 to 576) dominates, through the first
self-attention layer.
"""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Float
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from mmlens.analyses.attention_contribution import AttentionContribution, attention_contribution
from mmlens.analyses.contribution_measures import MEASURES, PART, measures
from mmlens.analyses.result import long_table
from mmlens.plots.figure_folder import FigureWithTables
from mmlens.plots.layer_profile import line_with_band
from mmlens.plots.style import GRID, INK, LINES, heat_scale, layout
from mmlens.reproduce.study import Study, StudyQuestion


def visual_tokens_figure(study: Study) -> FigureWithTables:
    """Contributions of visual tokens to the constraint, of questions that are answered rightly."""

    def received(each: StudyQuestion) -> AttentionContribution:
        image = each.inputs.span("image_0")
        return attention_contribution(each.model, each.inputs, image, "constraint")

    chosen, counts = study.choose(corruptions=())
    asked = [each["seen"] for each in chosen]
    what = ["contributions", "image_0", "constraint"]
    each_question = study.of_each(asked, what, AttentionContribution, received)
    found = [each.values.double().mean(dim=1) for each in each_question]
    contributions = torch.stack(found)
    measured = torch.stack([measures(each) for each in found])
    means = study.bootstrap(measured, [each.cluster for each in asked])
    layers = range(measured.shape[1])
    by_measure = {name: values.T for name, values in means.items()}
    table = long_table({"measure": MEASURES, "layer": layers}, by_measure)
    table = table[["layer", *means, "measure"]]
    raw = long_table(
        {"question": range(len(asked)), "layer": layers, "measure": MEASURES}, {"value": measured}
    )
    n_tokens = contributions.shape[-1]
    part = max(1, n_tokens // PART)
    share = (contributions / contributions.sum(dim=-1, keepdim=True)).mean(dim=0)
    figure = draw_shares(share, table, part)
    figure.update_layout(
        title_text="What the constraint receives from the visual tokens",
        title_subtitle={"text": study.describe(len(asked)), "font": {"size": 12}},
    )
    per_token = pd.DataFrame(share.numpy(), columns=range(n_tokens))
    per_token.insert(0, "layer", range(len(per_token)))
    notes = {"visual tokens": n_tokens, "late tokens": part, "equal share": part / n_tokens}
    return FigureWithTables(
        "visual-tokens", figure, {"table": table, "tokens": per_token}, raw, counts, notes
    )


def draw_shares(share: Float[Tensor, "layer token"], table: pd.DataFrame, part: int) -> go.Figure:
    """Shares by layer and token; the late tokens' share; the total by layer."""
    n_tokens = share.shape[-1]
    titles = (
        "share of each visual token",
        f"share of the last {part} of {n_tokens} tokens",
        "sum over all visual tokens",
    )
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.1)
    high = float(share.max())
    heatmap = go.Heatmap(
        z=share.tolist(),
        zmin=0,
        zmax=high,
        colorscale=heat_scale(0, high),
        colorbar={"x": 0.275, "thickness": 10},
        hovertemplate="layer %{y}, token %{x}<br>%{z:.4f}<extra></extra>",
    )
    figure.add_trace(heatmap, row=1, col=1)
    figure.update_xaxes(title_text="visual token", row=1, col=1)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    for column, measure in ((2, "late share"), (3, "total")):
        points = table[table["measure"] == measure]
        shapes = line_with_band(points, "layer", measure, LINES[0], in_legend=False)
        figure.add_traces(shapes, rows=1, cols=column)
        figure.update_xaxes(title_text="layer", gridcolor=GRID, zeroline=False, row=1, col=column)
        figure.update_yaxes(gridcolor=GRID, rangemode="tozero", row=1, col=column)
    equal = part / n_tokens
    figure.add_hline(
        y=equal,
        line={"color": INK, "width": 1, "dash": "dash"},
        annotation={"text": "equal share", "x": 0, "xanchor": "left", "yanchor": "top"},
        row=1,
        col=2,
    )
    figure.update_layout(
        layout(width=1080, height=430, margin={"t": 105, "b": 60}, showlegend=False)
    )
    return figure
