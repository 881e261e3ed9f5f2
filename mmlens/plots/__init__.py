"""Pictures of results: figures, overlays on the image, attention views, a report page, heatmaps.

    trace.plot().save("trace.pdf")                       # any result draws itself
    overlay(contribution, inputs, model).save("it.html") # a quantity over the image, with sliders
    attention(cache, 3, inputs)                          # circuitsvis, for a notebook
    write_report("report.html", prompt, trace=trace)     # one page to explore
    heatmap(values, rows=labels, columns=layers)         # numbers of your own, in the same look

Nothing here needs a network. plotly and circuitsvis are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmlens.plots.circuits import HtmlView, attention, tokens
    from mmlens.plots.figure import Figure
    from mmlens.plots.geometry import Frame, picture_frame
    from mmlens.plots.panels import heatmap
    from mmlens.plots.picture import overlay
    from mmlens.plots.profile import plot_layer_profile
    from mmlens.plots.report import ReportedPrompt, reported_prompt, write_report
    from mmlens.plots.save import FigureNotSaved, save_figure
    from mmlens.plots.terminal import TerminalHeatmap
    from mmlens.plots.trace import plot_trace

_PUBLIC = {
    "Figure": "figure",
    "FigureNotSaved": "save",
    "Frame": "geometry",
    "HtmlView": "circuits",
    "ReportedPrompt": "report",
    "TerminalHeatmap": "terminal",
    "attention": "circuits",
    "heatmap": "panels",
    "overlay": "picture",
    "picture_frame": "geometry",
    "plot_layer_profile": "profile",
    "plot_trace": "trace",
    "reported_prompt": "report",
    "save_figure": "save",
    "tokens": "circuits",
    "write_report": "report",
}

__all__ = [
    "Figure",
    "FigureNotSaved",
    "Frame",
    "HtmlView",
    "ReportedPrompt",
    "TerminalHeatmap",
    "attention",
    "heatmap",
    "overlay",
    "picture_frame",
    "plot_layer_profile",
    "plot_trace",
    "reported_prompt",
    "save_figure",
    "tokens",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmlens.plots' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmlens.plots.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
