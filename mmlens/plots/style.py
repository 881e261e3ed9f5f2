"""One look for all figures: names of sites, colours that survive print and colour blindness.

Lines use the palette of Okabe and Ito and differ in dash and marker as well as in colour. Heatmaps
go from orange (negative) over white (zero) to dark blue (positive): on paper more ink is a larger
effect, and the two ends differ in hue for every kind of colour vision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from plotly import graph_objects as go
from plotly.colors import sample_colorscale

SITE_TITLES = {
    "resid_pre": "residual stream (in)",
    "resid_mid": "residual stream (mid)",
    "resid_post": "residual stream",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
}

#: negative values smaller than this share of the largest value are rounding, not an effect
NEGLIGIBLE = 0.02
#: room below a figure for each of its sliders
SLIDER_PIXELS = 70
#: steps between the layers that are labelled
ROUND = (1, 2, 5, 10, 20, 50, 100, 1000)

INK = "#222222"
GRID = "#e3e3e3"

#: Orange at -1, white at zero, blue at +1; either half darkens steadily.
DIVERGING = (
    *("#7f3b08", "#b35806", "#e08214", "#fdb863", "#fee0b6"),
    "#ffffff",
    *("#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061"),
)


def heat_scale(low: float, high: float, steps: int = 32) -> list[tuple[float, str]]:
    """Return the part of the diverging scale between two values, for plotly: zero is always white.

    Both signs share one unit, the larger of ``-low`` and `high`, so equal colours are equal sizes.
    """
    unit = max(high, -low)
    points = [low + (high - low) * step / steps for step in range(steps + 1)]
    positions = [0.5 + 0.5 * point / unit for point in points]
    colors = sample_colorscale(list(DIVERGING), positions)
    return [(step / steps, color) for step, color in enumerate(colors)]


@dataclass(frozen=True)
class LineStyle:
    """How one line among several is drawn; told apart without colour, too."""

    color: str
    dash: str
    symbol: str

    def fill(self, alpha: float = 0.18) -> str:
        """Return the colour as a translucent fill, for bands around the line."""
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},{alpha})"


LINES = (
    LineStyle("#0072b2", "solid", "circle"),
    LineStyle("#d55e00", "dash", "square"),
    LineStyle("#009e73", "dot", "diamond"),
    LineStyle("#cc79a7", "dashdot", "triangle-up"),
    LineStyle("#e69f00", "longdash", "cross"),
    LineStyle("#000000", "longdashdot", "x"),
)

#: a site keeps its line in every figure
SITE_LINES = {
    "mlp_out": LINES[0],
    "attn_out": LINES[1],
    "resid_post": LineStyle("#000000", "solid", "diamond"),
}


def site_title(site: str) -> str:
    """Name a site in words: ``"vision.mlp_out"`` is "vision MLP output"."""
    return re.sub(r"\w+", lambda word: SITE_TITLES.get(word[0], word[0]), site).replace(".", " ")


def site_line(site: str, index: int) -> LineStyle:
    """Return the line style of a site: its own, or the `index`-th of the palette."""
    return SITE_LINES.get(site, LINES[index % len(LINES)])


def layout(**changes: Any) -> dict[str, Any]:
    """Return the layout shared by all figures, with `changes` on top."""
    common: dict[str, Any] = {
        "template": "plotly_white",
        "font": {"family": "DejaVu Sans, Verdana, Arial, sans-serif", "size": 13, "color": INK},
        "title": {
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 16, "t": 16},
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 70, "r": 30, "t": 90, "b": 55},
        "hoverlabel": {"font": {"family": "DejaVu Sans Mono, monospace", "size": 12}},
    }
    return common | changes


def color_axis(values: Any, limits: tuple[float, float] | None = None) -> dict[str, Any]:
    """Return a colour scale, white at zero, between the ends of an array (NaN is 0) or `limits`."""
    low, high = limits or (float(np.nan_to_num(values).min()), float(np.nan_to_num(values).max()))
    # An effect of nothing at all still needs a scale with two ends.
    extreme = max(high, -low, 1e-6)
    low = low if low < -NEGLIGIBLE * extreme else 0.0
    high = high if high > NEGLIGIBLE * extreme or low == 0.0 else 0.0
    high = high if high > low else extreme
    return {"colorscale": heat_scale(low, high), "cmin": low, "cmax": high}


def spaced(columns: Sequence[int | str], most: int = 9) -> list[int]:
    """Return which columns get a label: at most so many, of layers those with round numbers."""
    if len(columns) <= most:
        return list(range(len(columns)))
    numbers = [column for column in columns if isinstance(column, int)]
    if len(numbers) < len(columns):
        return list(range(0, len(columns), -(-len(columns) // most)))
    step = next(s for s in ROUND if len([n for n in numbers if n % s == 0]) <= most)
    return [index for index, number in enumerate(numbers) if number % step == 0]


def set_titles(figure: go.Figure, title: str | None, subtitle: str | None) -> None:
    """Set the headings that are given."""
    figure.update_layout(title_text=title)
    if subtitle:
        figure.update_layout(title_subtitle={"text": subtitle, "font": {"size": 12}})
