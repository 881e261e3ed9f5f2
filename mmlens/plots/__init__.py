"""Results drawn as figures, overlays on the image, attention views, a report page and heatmaps.

    trace.plot().save("trace.pdf")                       # any result draws itself
    overlay(contribution, inputs).save("it.html") # a quantity over the image, with sliders
    attention(cache, 3, inputs)                          # circuitsvis, for a notebook
    write_report("report.html", prompt, trace=trace)     # one page to explore
    heatmap(values, rows=labels, columns=layers)         # numbers of your own, in the same look

Nothing here needs a network. plotly and circuitsvis are imported when they are first used.
"""

from __future__ import annotations

from mmlens.plots.circuitsvis import HtmlView, attention, tokens
from mmlens.plots.figure import Figure
from mmlens.plots.heatmap import heatmap
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.plots.overlay import overlay
from mmlens.plots.report import ReportedPrompt, reported_prompt, write_report
from mmlens.plots.save import FigureNotSaved, save_figure
from mmlens.plots.terminal import TerminalHeatmap
from mmlens.plots.trace import plot_trace

__all__ = [
    "Figure",
    "FigureNotSaved",
    "HtmlView",
    "ReportedPrompt",
    "TerminalHeatmap",
    "attention",
    "heatmap",
    "overlay",
    "plot_layer_profile",
    "plot_trace",
    "reported_prompt",
    "save_figure",
    "tokens",
    "write_report",
]
