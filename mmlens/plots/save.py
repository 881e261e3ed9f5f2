"""Figures as files: a web page that needs no network, or an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from mmlens.plots.policy import content_policy
from mmlens.plots.style import SLIDER_PIXELS
from mmlens.utils.files import write_atomically

if TYPE_CHECKING:
    from plotly import graph_objects as go

SCRIPT = """
"use strict";
const figure = JSON.parse(document.getElementById("figure").textContent);
Plotly.newPlot("plot", figure.data, figure.layout, { responsive: true }).then(() => {
  if (figure.frames) Plotly.addFrames("plot", figure.frames);
});
"""
PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{{ policy }}
<title>{{ title }}</title>
<style>html, body { height: 100%; margin: 0 }</style>
<script>{{ library }}</script>
</head>
<body>
<div id="plot" class="plotly-graph-div" style="{{ size }}"></div>
<script type="application/json" id="figure">{{ figure }}</script>
<script>{{ script }}</script>
</body>
</html>
"""
)
SUFFIXES = (".html", ".png", ".pdf", ".svg")


class FigureNotSaved(RuntimeError):
    """A figure could not be written as an image; the message says what is missing."""


def save_figure(figure: go.Figure, path: str | Path, *, scale: float = 2.0) -> Path:
    """Write a figure; the suffix of `path` decides how.

    ``.html`` is one self-contained page (about 5 MB: plotly.js is inside) that works offline, and
    whose content policy lets no other script run and nothing be fetched.
    ``.png``, ``.pdf`` and ``.svg`` are drawn by kaleido in a Chrome or Chromium on this machine.
    The file appears whole or not at all.

    Args:
        figure: any plotly figure.
        path: where to; its folder must exist.
        scale: pixels of a PNG per pixel of the figure's layout.

    Returns:
        `path` as a `Path`.

    Raises:
        ValueError: the suffix is none of these.
        FigureNotSaved: kaleido or a browser is missing, or the browser failed.

    Example:
        >>> save_figure(trace.plot(), "trace.pdf")
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"a figure is saved as {', '.join(SUFFIXES)}, not as {path.name!r}")
    if suffix == ".html":
        content = figure_page(figure).encode()
    else:
        content = render(still(figure), suffix[1:], scale)
    return write_atomically(path, content)


def figure_page(figure: go.Figure) -> str:
    """Return a page with the figure, plotly.js and nothing else: only these two scripts can run."""
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs().replace("\r\n", "\n")
    width, height = figure.layout.width, figure.layout.height
    return PAGE.render(
        policy=content_policy([library, SCRIPT]),
        title=figure.layout.title.text or "mmlens",
        size=f"width: {f'{width}px' if width else '100%'}; "
        f"height: {f'{height}px' if height else '100%'}",
        figure=Markup(figure.to_json().replace("<", "\\u003c")),  # no text in it ends the script
        library=Markup(library),
        script=Markup(SCRIPT),
    )


def still(figure: go.Figure) -> go.Figure:
    """Return the figure without controls; the positions of its sliders become its subtitle."""
    from plotly import graph_objects as go

    sliders = [slider for slider in figure.layout.sliders if slider.steps]
    if not sliders and not figure.layout.updatemenus:
        return figure
    copy = go.Figure(figure)
    copy.layout.updatemenus = copy.layout.sliders = ()
    if sliders:
        states = [f"{each.currentvalue.prefix}{each.steps[each.active].label}" for each in sliders]
        title: dict[str, Any] = {"subtitle": {"text": ", ".join(states), "font": {"size": 12}}}
        if not copy.layout.title.text:
            title = {"text": ", ".join(states), "font": {"size": 14}}
        room = SLIDER_PIXELS * len(sliders)
        copy.update_layout(
            title=title, height=copy.layout.height - room, margin_b=copy.layout.margin.b - room
        )
    return copy


def render(figure: go.Figure, image_format: str, scale: float) -> bytes:
    """Render the figure as ``png``, ``pdf`` or ``svg`` with kaleido."""
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ImportError as error:
        raise FigureNotSaved(
            f"a figure as {image_format} needs the package kaleido: pip install 'mmlens[demo]' "
            "(.html needs nothing)"
        ) from error
    # MathJax would be fetched from the network at every start.
    page = kaleido.PageGenerator(mathjax=False)
    options: dict[str, Any] = {
        "format": image_format,
        "scale": scale,
        "width": figure.layout.width or 900,
        "height": figure.layout.height or 500,
    }
    try:
        return kaleido.calc_fig_sync(
            figure.to_dict(), opts=options, kopts={"n": 1, "page_generator": page}
        )
    except ChromeNotFoundError as error:
        raise FigureNotSaved(
            f"a figure as {image_format} needs Chrome or Chromium, and none was found: install "
            "one (apt-get install chromium), or set BROWSER_PATH to it (.html needs nothing)"
        ) from error
    except Exception as error:  # whatever can go wrong in another program
        raise FigureNotSaved(
            f"the browser that draws {image_format} figures failed ({type(error).__name__}: "
            f"{error}); .html needs none"
        ) from error
