"""What visual tokens say: words on the patches, one word over the image, and what erasing does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from plotly import graph_objects as go

from mmlens.plots.figure import Figure
from mmlens.plots.image_mesh import ShownView
from mmlens.plots.labels import shorten, visible
from mmlens.plots.overlay import overlay
from mmlens.plots.style import GRID, INK, LINES, layout, site_title
from mmlens.plots.trace import subtitle_of

if TYPE_CHECKING:
    from mmlens.analyses.logit_lens import LogitLens
    from mmlens.analyses.token_erasure import TokenErasure
    from mmlens.analyses.word_map import WordMap
    from mmlens.inputs.multimodal_inputs import MultimodalInputs

LETTERS = 11
"""Of a word, on its patch."""
CELL = (72, 28)
"""Pixels of a patch: width, height."""


def plot_word_map(
    words: WordMap,
    inputs: MultimodalInputs,
    *,
    view: ShownView = 0,
    title: str | None = None,
) -> Figure:
    """Draw how probable the word is over the image, with a slider over the layers.

    Args:
        words: the result of `mmlens.word_map`.
        inputs: the prompt that it is of, with the image.
        view: which view of the image, or "all", see `mmlens.plots.overlay`.
        title: instead of the word and the site.

    Example:
        >>> word_map(model, inputs, "dog").plot(inputs).save("dog.html")
    """
    name = visible(words.word.strip())
    return overlay(
        words.log_probs.exp(),
        inputs,
        image=words.image,
        view=view,
        layers=words.layers,
        value_title=f"P(“{name}”)",
        title=title or f"“{name}”, {site_title(words.site)}",
    )


def plot_patch_words(
    lens: LogitLens, layer: int, *, image: int = 0, view: int = 0, title: str | None = None
) -> Figure:
    """Write on every patch of a view what it says in a layer; the pointer shows more words.

    Args:
        lens: of the image's visual tokens, the result of `mmlens.logit_lens`.
        layer: which of its layers.
        image: which image of the prompt.
        view: which view of the image.
        title: instead of the layer and the site.

    Raises:
        ValueError: the lens has nothing of that layer, image or view.

    Example:
        >>> lens = logit_lens(model, inputs, positions="image", layers=[16])
        >>> plot_patch_words(lens, 16).save("words.html")
    """
    table = lens.patch_words(layer, image=image)
    table = table[table["view"] == view]
    if not len(table):
        raise ValueError(f"none of the positions is a patch of view {view}")
    n_rows, n_columns = int(table["row"].max()) + 1, int(table["column"].max()) + 1
    values = np.full((n_rows, n_columns), np.nan)
    said = np.full((n_rows, n_columns), "", dtype=object)
    more = np.full((n_rows, n_columns), "", dtype=object)
    for patch in table.itertuples():
        at = patch.row, patch.column
        values[at] = patch.probability
        said[at] = shorten(visible(patch.words[0].strip()), LETTERS)
        more[at] = ", ".join(visible(word.strip()) for word in patch.words)
    figure = Figure(
        go.Heatmap(
            z=values,
            text=said,
            customdata=more,
            texttemplate="%{text}",
            textfont={"size": 10},
            hovertemplate="patch %{y},%{x}: %{customdata}<br>%{z:.3f}<extra></extra>",
            colorscale=[(0, "#ffffff"), (1, "#6baed6")],
            zmin=0,
            colorbar={"title": {"text": "probability", "side": "right"}, "thickness": 12},
            xgap=1,
            ygap=1,
        )
    )
    figure.update_yaxes(autorange="reversed", title_text="row", dtick=max(1, n_rows // 8))
    figure.update_xaxes(title_text="column", dtick=max(1, n_columns // 8))
    figure.update_layout(
        layout(
            width=150 + CELL[0] * n_columns,
            height=150 + CELL[1] * n_rows,
            title_text=title or f"what patches say: {site_title(lens.site)}, layer {layer}",
        )
    )
    return figure


def plot_token_erasure(erasure: TokenErasure, *, title: str | None = None) -> Figure:
    """Draw P(answer) with the chosen tokens erased, among as many others erased.

    Args:
        erasure: the result of `mmlens.token_erasure`.
        title: instead of the answer.

    Example:
        >>> token_erasure(model, inputs, inputs.patches(box), answer="dog").plot().save("dog.pdf")
    """
    figure = Figure(
        go.Histogram(
            x=erasure.controls.tolist(),
            name="others erased",
            marker={"color": LINES[0].fill(0.45)},
            nbinsx=20,
        )
    )
    # Labels stand between the two lines.
    sides = ("left", "right") if erasure.effect < 0 else ("right", "left")
    lines = (
        ("as it is", erasure.clean, INK, "dash", sides[0]),
        ("chosen erased", erasure.erased, LINES[1].color, "solid", sides[1]),
    )
    for name, value, color, dash, side in lines:
        figure.add_vline(
            x=value,
            line={"color": color, "dash": dash, "width": 2},
            annotation_text=name,
            annotation_position=f"top {side}",
            annotation_font_color=color,
        )
    ends = [erasure.clean, erasure.erased, *erasure.controls.tolist()]
    room = 0.08 * (max(ends) - min(ends)) or 0.01
    answer, n = visible(erasure.answer.strip()), len(erasure.positions)
    figure.update_xaxes(
        title_text=f"P({answer})", range=[min(ends) - room, max(ends) + room], gridcolor=GRID
    )
    figure.update_yaxes(title_text="draws of others", gridcolor=GRID, tickformat="d", nticks=5)
    figure.update_layout(layout(width=640, height=400, margin={"t": 95}))
    tokens = "1 visual token" if n == 1 else f"{n} visual tokens"
    figure.update_layout(title_text=title or f"P(“{answer}”) with {tokens} erased")
    subtitle = subtitle_of(erasure.metadata)
    if subtitle:
        figure.update_layout(title_subtitle={"text": subtitle, "font": {"size": 12}})
    return figure
