"""`Figure`: a plotly figure that can save itself."""

from __future__ import annotations

from pathlib import Path

from plotly import graph_objects as go

from mmlens.plots.save import save_figure


class Figure(go.Figure):
    """What every `.plot()` returns: a plotly figure, with `save`.

    Example:
        >>> trace.plot().save("trace.pdf")
    """

    def save(self, path: str | Path, *, scale: float = 2.0) -> Path:
        """Write it as ``.html``, ``.png``, ``.pdf`` or ``.svg``; see `mmlens.plots.save_figure`."""
        return save_figure(self, path, scale=scale)
