"""Visual tokens to the constraint: which of them, and in which layer.

The paper: the last sixteenth of the visual tokens (540 to 576) dominates, through the first
self-attention layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from mmlens.attribution import attention_contribution
from mmlens.plots.style import GRID, INK, LINES, heat_scale, layout
from mmlens.reproduce.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.reproduce.study import Study

PART = 16
"""The last and the largest 1 / PART of the visual tokens are looked at."""
MEASURES = ("total", "late share", "largest share", "tokens for half", "layer's part")


def visual_tokens(study: Study) -> Figure:
    """Contributions of visual tokens to the constraint, of questions that are answered rightly."""
    import pandas as pd

    chosen, counts = study.choose(corruptions=())
    asked = [each["seen"] for each in chosen]
    found = []
    for each in study.progress(asked, "contributions"):
        first_image = each.inputs.span("image_0")
        contribution = attention_contribution(study.model, each.inputs, first_image, "constraint")
        found.append(contribution.values.double().mean(dim=1))
    contributions = torch.stack(found)
    measured = torch.stack([measures(each) for each in found])
    means = study.bootstrap(measured, [each.cluster for each in asked])
    table = pd.concat(
        pd.DataFrame({name: values[:, i] for name, values in means.items()})
        .rename_axis("layer")
        .reset_index()
        .assign(measure=measure)
        for i, measure in enumerate(MEASURES)
    )
    axes = {
        "question": range(len(asked)),
        "layer": range(measured.shape[1]),
        "measure": MEASURES,
    }
    index = pd.MultiIndex.from_product(axes.values(), names=axes.keys())
    raw = pd.DataFrame({"value": measured.flatten().numpy()}, index=index).reset_index()
    n_tokens = contributions.shape[-1]
    part = max(1, n_tokens // PART)
    share = (contributions / contributions.sum(dim=-1, keepdim=True)).mean(dim=0)
    figure = draw(share, table, part)
    figure.update_layout(
        title_text="What the constraint receives from the visual tokens",
        title_subtitle={"text": study.describe(len(asked)), "font": {"size": 12}},
    )
    per_token = pd.DataFrame(share.numpy(), columns=range(n_tokens))
    per_token.insert(0, "layer", range(len(per_token)))
    notes = {"visual tokens": n_tokens, "late tokens": part, "equal share": part / n_tokens}
    return Figure(
        "visual-tokens", figure, {"table": table, "tokens": per_token}, raw, counts, notes
    )


def measures(contribution: Float[Tensor, "layer token"]) -> Float[Tensor, "layer measure"]:
    """Of one question: `MEASURES`.

    The total over visual tokens; what the last and the largest sixteenth hold of it; how many of
    the largest hold half of it; and the layer's part in the sum over layers.
    """
    total = contribution.sum(dim=-1)
    part = max(1, contribution.shape[-1] // PART)
    ordered = contribution.sort(dim=-1, descending=True).values
    late = contribution[:, -part:].sum(dim=-1) / total
    largest = ordered[:, :part].sum(dim=-1) / total
    half = (ordered.cumsum(dim=-1) < total[:, None] / 2).sum(dim=-1) + 1
    return torch.stack([total, late, largest, half.double(), total / total.sum()], dim=-1)


def draw(share: Float[Tensor, "layer token"], table: pd.DataFrame, part: int) -> go.Figure:
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
        layers, style = points["layer"].tolist(), LINES[0]
        band = go.Scatter(
            x=layers + layers[::-1],
            y=points["high"].tolist() + points["low"].tolist()[::-1],
            fill="toself",
            fillcolor=style.fill(),
            line={"width": 0},
            hoverinfo="skip",
        )
        line = go.Scatter(
            x=layers,
            y=points["mean"].tolist(),
            mode="lines+markers",
            line={"color": style.color, "width": 2},
            marker={"size": 5},
            hovertemplate="layer %{x}<br>%{y:.4f}<extra></extra>",
        )
        figure.add_traces([band, line], rows=1, cols=column)
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
