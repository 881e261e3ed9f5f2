"""A causal trace in the terminal: one coloured cell per layer, or shades where there is no colour.

Cells go from dark blue (no effect) to yellow (cividis); negative ones are magenta and carry a
minus sign where they matter, so that nothing hangs on telling two colours apart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from plotly.colors import sample_colorscale, unlabel_rgb
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from mmlens.plots.folding import foldings
from mmlens.plots.labels import shorten
from mmlens.plots.style import site_title

if TYPE_CHECKING:
    from mmlens.analyses.causal_trace import CausalTrace

SHADES = " ·░▒▓█"
NEGATIVE = ("#00224e", "#d7499a")
#: negative effects smaller than this share of the largest one get no sign
NOTABLE = 0.05
#: up to so many groups of positions each get a block with one row per site
MAX_BLOCKS = 3
#: "  +0.123 at 12" after the last cell
PEAK_WIDTH = 15
#: a narrower terminal has room for cells only
NARROW = 50
#: of more positions than this, those with the largest effects are shown
MAX_ROWS = 40


class TerminalHeatmap:
    """What ``rich.print`` shows of a trace: layers to the right, effects as cells.

    With up to three groups of positions there is one block per group and one row per site; with
    more, one block per site and one row per position, visual tokens together in one (their largest
    effect). Every row ends with its largest effect.

    Args:
        trace: the result of `mmlens.causal_trace`; its indirect effect is shown.

    Example:
        >>> rich.print(TerminalHeatmap(trace))
    """

    def __init__(self, trace: CausalTrace) -> None:
        self.layers = list(trace.layers)
        self.blocks, self.left_out = _blocks(trace)
        values = [value for _, rows in self.blocks for _, row in rows for value in row]
        self.unit = max((abs(value) for value in values), default=0.0) or 1e-6
        self.has_negative = min(values, default=0.0) < -NOTABLE * self.unit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colored = console.color_system in ("256", "truecolor")
        width = options.max_width
        longest = max(len(label) for _, rows in self.blocks for label, _ in rows)
        label_width = min(longest, max(8, width // 3))
        peaks = width >= NARROW
        room = max(width - label_width - PEAK_WIDTH * peaks - 1, 4)
        cell = 2 if 2 * len(self.layers) <= room else 1
        merged = math.ceil(len(self.layers) * cell / room)
        for title, rows in self.blocks:
            yield Text(shorten(title, width), style="bold")
            for label, values in rows:
                line = Text(f"{shorten(label, label_width):>{label_width}} ", no_wrap=True)
                for start in range(0, len(values), merged):
                    value = max(values[start : start + merged], key=abs)
                    line.append_text(self._cell(value, cell, colored))
                yield line.append(self._peak(values)) if peaks else line
            axis = self._axis(cell, merged, width - label_width - 1)
            yield Text(" " * (label_width + 1) + axis, style="dim", no_wrap=True)
        yield self._legend(label_width + 1, width, colored)
        if self.left_out:
            yield Text(f"{self.left_out} positions with smaller effects are left out", style="dim")

    def _cell(self, value: float, width: int, colored: bool) -> Text:
        # The square root: the residual stream carries everything, and a tenth of that, at another
        # site, should still be seen.
        size = min(abs(value) / self.unit, 1.0) ** 0.5
        shade = SHADES[round(size * (len(SHADES) - 1))]
        if value < 0:
            shade = "-" if value < -NOTABLE * self.unit else " "
        if not colored:
            return Text(shade * width)
        scale = list(NEGATIVE) if value < 0 else "cividis"
        red, green, blue = unlabel_rgb(sample_colorscale(scale, [size])[0])
        background = Color.from_rgb(red, green, blue)
        ink = Color.parse("#ffffff")
        mark = "-" if shade == "-" else " "
        return Text(mark * width, style=Style(color=ink, bgcolor=background))

    def _peak(self, values: list[float]) -> str:
        best = max(range(len(values)), key=lambda index: abs(values[index]))
        return f"  {values[best]:+.3f} at {self.layers[best]}"

    def _axis(self, cell: int, merged: int, room: int) -> str:
        """Return layer numbers below the cells, as many as fit."""
        shown = self.layers[::merged]
        axis = ""
        for index, layer in enumerate(shown):
            at = index * cell
            if layer % 5 == 0 and len(axis) <= at and at + len(str(layer)) <= room:
                axis = axis.ljust(at) + f"{layer} "
        axis = axis.rstrip()
        return f"{axis}  layer" if len(axis) + 7 <= room else axis

    def _legend(self, indent: int, width: int, colored: bool) -> Text:
        """Return the scale, from the largest negative effect (if there is one) to the largest."""
        legend = Text(no_wrap=True)
        steps = [(step / 9) ** 2 * self.unit for step in range(10)]
        if self.has_negative and width >= NARROW:
            legend.append(f"{-self.unit:.2f} ")
            for value in steps[:0:-1]:
                legend.append_text(self._cell(-value, 1, colored))
            legend.append(" ")
        legend.append("0 ")
        for value in steps:
            legend.append_text(self._cell(value, 1, colored))
        legend.append(f" {self.unit:.2f}")
        halfway = f" (halfway: {self.unit / 4:.2f})"
        if len(legend) + len(halfway) + indent <= width:
            legend.append(halfway)
        return Text(" " * max(0, min(indent, width - len(legend)))) + legend


LabelledRows = list[tuple[str, list[float]]]


def _blocks(trace: CausalTrace) -> tuple[list[tuple[str, LabelledRows]], int]:
    """Return titles and rows of the blocks, and how many positions there is no room for."""
    sites = [site_title(site) for site in trace.sites]
    effects = trace.indirect_effect.detach().float().cpu().numpy()
    view = foldings(trace.group_labels)[0]
    values, _ = view.fold(effects, "peak")
    if len(view.rows) <= MAX_BLOCKS:
        return [
            (f"restored at: {row.label}", list(zip(sites, values[:, index].tolist(), strict=True)))
            for index, row in enumerate(view.rows)
        ], 0
    sizes = np.abs(values).max(axis=(0, 2))
    kept = sorted(sizes.argsort(stable=True)[::-1][:MAX_ROWS].tolist())
    labels = [view.rows[index].label for index in kept]
    return [
        (site, list(zip(labels, values[index, kept].tolist(), strict=True)))
        for index, site in enumerate(sites)
    ], len(view.rows) - len(kept)
