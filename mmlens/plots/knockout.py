"""Attention knockout: the answer's probability, or another metric, with each window cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plotly import graph_objects as go

from mmlens.plots.figure import Figure
from mmlens.plots.labels import metric_in_words, visible
from mmlens.plots.style import GRID, INK, LINES, layout, spaced

if TYPE_CHECKING:
    from mmlens.analyses.attention_knockout import AttentionKnockout


SPANS = {"last": "the last token", "text": "the text", "bos": "the first token"}


def span_in_words(span: str) -> str:
    """Return a span's name as it is said in a sentence."""
    return SPANS.get(span, f"the {visible(span)}")


def plot_knockout(knockout: AttentionKnockout) -> Figure:
    """Draw P(answer), or another metric, by the centre of the window.

    The dashed line is the run with nothing cut.

    Example:
        >>> attention_knockout(model, inputs, "image", "last", window=5).plot().save("cut.pdf")
    """
    line = go.Scatter(
        x=list(knockout.layers),
        y=knockout.values.tolist(),
        mode="lines+markers",
        line={"color": LINES[0].color, "width": 2},
        marker={"symbol": LINES[0].symbol, "size": 6},
        hovertemplate="layer %{x}<br>%{y:.4f}<extra></extra>",
    )
    figure = Figure(line)
    dashed = {"color": INK, "width": 1, "dash": "dash"}
    text = {"annotation_text": "nothing cut", "annotation_position": "right"}
    figure.add_hline(y=knockout.clean, line=dashed, **text)
    cut = "one layer" if knockout.window == 1 else f"{knockout.window} layers"
    figure.update_xaxes(
        title_text=f"layer ({cut} cut)",
        tickvals=[knockout.layers[index] for index in spaced(knockout.layers)],
        gridcolor=GRID,
        zeroline=False,
    )
    measured = metric_in_words(knockout.metric, knockout.answer, knockout.contrast)
    figure.update_yaxes(title_text=measured, gridcolor=GRID, zeroline=False, rangemode="tozero")
    figure.update_layout(layout(width=640, height=400, margin={"t": 75, "r": 95}))
    source, destination = (knockout.metadata.get(name) for name in ("source", "destination"))
    if source and destination:
        figure.update_layout(
            title_text=f"{measured} with {span_in_words(destination)} not attending to "
            f"{span_in_words(source)}"
        )
    return figure
