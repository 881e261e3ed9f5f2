"""`Figure`: a plotly figure that can save itself."""

from __future__ import annotations

import os
from pathlib import Path

from plotly import graph_objects as go
from plotly import io as pio

from mmlens.plots.save import save_figure


class Figure(go.Figure):
    """A plotly figure with `save`, which every `.plot()` returns.

    Example:
        >>> trace.plot().save("trace.pdf")
    """

    def save(self, path: str | Path, *, scale: float = 2.0) -> Path:
        """Write it as ``.html``, ``.png``, ``.pdf`` or ``.svg``; see `mmlens.plots.save_figure`."""
        return save_figure(self, path, scale=scale)

    def _ipython_display_(self) -> None:
        # plotly's default in Jupyter shows nothing in the pages that nbconvert makes. The second
        # renderer puts plotly's own script into the notebook, once, and asks no network for it.
        if pio.renderers.default == "plotly_mimetype" and "PLOTLY_RENDERER" not in os.environ:
            pio.renderers.default = "plotly_mimetype+notebook"
        super()._ipython_display_()
