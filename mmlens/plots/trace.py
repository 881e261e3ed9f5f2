"""A causal trace as a figure: a heatmap over positions and layers, or lines over layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.labels import shorten, visible
from mmlens.plots.style import GRID, INK, heat_scale, layout, site_line, site_title

if TYPE_CHECKING:
    from mmlens.tracing import CausalTrace

Value = Literal["restored", "indirect_effect", "recovery"]

AXIS_TITLES = {
    "restored": "P(answer)",
    "indirect_effect": "P(answer), restored − corrupted",
    "recovery": "share of the effect restored",
}
#: up to so many groups of positions are drawn as lines
MAX_PROFILES = 3
#: negative values smaller than this share of the largest value are rounding, not an effect
NEGLIGIBLE = 0.02


def plot_trace(
    trace: CausalTrace,
    *,
    kind: Literal["auto", "heatmap", "profile"] = "auto",
    value: Value | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw a trace, with every value shown under the pointer.

    Args:
        trace: the result of `mmlens.causal_trace`.
        kind: ``heatmap`` has one panel per site, each with its own scale, layers to the right and
            the tokens downwards;
            ``profile`` has one panel per group of positions and one line per site, between the
            clean and the corrupted probability. ``auto`` takes lines for up to three groups.
        value: ``restored`` (P(answer)), ``indirect_effect`` (minus the corrupted P) or
            ``recovery`` (as a share of clean minus corrupted). By default a heatmap shows the
            indirect effect, lines show P(answer).
        title: instead of the answer and its clean and corrupted probability.

    Raises:
        ValueError: for a `kind` or `value` that is none of these.

    Example:
        >>> trace.plot().show()
        >>> save_figure(plot_trace(trace, kind="heatmap"), "trace.html")
    """
    if kind not in ("auto", "heatmap", "profile"):
        raise ValueError(f"kind must be 'auto', 'heatmap' or 'profile', not {kind!r}")
    if value is not None and value not in AXIS_TITLES:
        raise ValueError(f"value must be one of {', '.join(AXIS_TITLES)}, not {value!r}")
    if kind == "auto":
        kind = "profile" if len(trace.groups) <= MAX_PROFILES else "heatmap"
    draw = _profile if kind == "profile" else _heatmap
    figure = draw(trace, value)
    figure.update_layout(title_text=title or trace_title(trace))
    if subtitle := trace_subtitle(trace):
        figure.update_layout(title_subtitle={"text": subtitle, "font": {"size": 12}})
    return figure


def trace_title(trace: CausalTrace) -> str:
    """What was traced: the answer, with its probability in the clean and the corrupted run."""
    answer = visible(trace.answer.strip())
    return f"P(“{answer}”): {trace.clean:.3f} clean, {trace.corrupted:.3f} corrupted"


def trace_subtitle(trace: CausalTrace) -> str:
    """How it was traced: model, question and window."""
    window = "one layer" if trace.window == 1 else f"a window of {trace.window} layers"
    parts = [trace.metadata.get("model"), trace.metadata.get("prompt"), f"restoring {window}"]
    return " · ".join(shorten(visible(str(part)), 80) for part in parts if part)


def _values(trace: CausalTrace, value: Value) -> Any:
    """The chosen values as numpy, [site, group, layer]."""
    return getattr(trace, value).detach().float().cpu().numpy()


def _heatmap(trace: CausalTrace, value: Value | None) -> go.Figure:
    value = value or "indirect_effect"
    values = _values(trace, value)
    rows = list(range(len(trace.groups)))
    labels = [shorten(visible(label), 24) for label in trace.group_labels]
    n_sites = len(trace.sites)
    figure = make_subplots(
        rows=1,
        cols=n_sites,
        shared_yaxes=True,
        horizontal_spacing=0.08 / n_sites,
        subplot_titles=[site_title(site) for site in trace.sites],
    )
    for index, site in enumerate(trace.sites):
        figure.add_trace(
            go.Heatmap(
                z=values[index],
                x=list(trace.layers),
                y=rows,
                coloraxis=_axis_name(index),
                customdata=[[label] * len(trace.layers) for label in labels],
                hovertemplate=f"%{{customdata}}<br>{site} %{{x}}<br>%{{z:.4f}}<extra></extra>",
                xgap=0.5,
                ygap=0.5,
            ),
            row=1,
            col=index + 1,
        )
    frame = {"showline": True, "mirror": True, "linecolor": GRID}
    plain = {"showgrid": False, "zeroline": False} | frame
    figure.update_xaxes(title_text="layer", title_standoff=4, **plain)
    figure.update_yaxes(autorange="reversed", automargin=True, **plain)
    figure.update_yaxes(tickvals=rows, ticktext=labels, col=1)
    panels = 19 * len(rows)
    figure.update_layout(
        layout(
            width=max(620, 100 + 300 * n_sites),
            height=max(380, panels + 230),
            margin={"l": 30, "r": 30, "t": 95, "b": 135},
        )
    )
    panels = figure.layout.height - 230
    for index in range(n_sites):
        # Every site has its own scale: the residual stream carries the sum of all the others.
        axis = _color_axis(values[index])
        left, right = figure.layout[f"xaxis{index + 1 if index else ''}"].domain
        axis["colorbar"] = {
            "orientation": "h",
            "x": (left + right) / 2,
            "xanchor": "center",
            "len": 0.9 * (right - left),
            "y": -60 / panels,
            "yanchor": "top",
            "thickness": 12,
            "outlinewidth": 0,
            "nticks": 5,
            "title": {"text": AXIS_TITLES[value], "side": "bottom", "font": {"size": 12}},
        }
        figure.update_layout({_axis_name(index): axis})
    return figure


def _axis_name(index: int) -> str:
    return f"coloraxis{index + 1}" if index else "coloraxis"


def _color_axis(values: Any) -> dict[str, Any]:
    """A colour scale with white at zero that ends at the smallest and the largest value."""
    low, high = float(values.min()), float(values.max())
    # An effect of nothing at all still needs a scale with two ends.
    extreme = max(high, -low, 1e-6)
    low = low if low < -NEGLIGIBLE * extreme else 0.0
    high = high if high > NEGLIGIBLE * extreme or low == 0.0 else 0.0
    high = high if high > low else extreme
    return {"colorscale": heat_scale(low, high), "cmin": low, "cmax": high}


def _profile(trace: CausalTrace, value: Value | None) -> go.Figure:
    value = value or "restored"
    values = _values(trace, value)
    n_groups = len(trace.groups)
    figure = make_subplots(
        rows=1,
        cols=n_groups,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[f"restored at: {shorten(visible(x), 40)}" for x in trace.group_labels],
    )
    for index, site in enumerate(trace.sites):
        style = site_line(site, index)
        for column in range(n_groups):
            figure.add_trace(
                go.Scatter(
                    x=list(trace.layers),
                    y=values[index, column],
                    name=site_title(site),
                    legendgroup=site,
                    showlegend=column == 0,
                    mode="lines+markers",
                    line={"color": style.color, "dash": style.dash, "width": 2},
                    marker={"symbol": style.symbol, "size": 6},
                    hovertemplate=f"{site} layer %{{x}}<br>%{{y:.4f}}<extra></extra>",
                ),
                row=1,
                col=column + 1,
            )
    _reference_lines(figure, trace, value, n_groups)
    margin = 0.02 * (trace.layers[-1] - trace.layers[0]) + 0.5
    figure.update_xaxes(
        title_text="layer",
        gridcolor=GRID,
        zeroline=False,
        range=[trace.layers[0] - margin, trace.layers[-1] + margin],
    )
    figure.update_yaxes(gridcolor=GRID, zeroline=False, rangemode="tozero")
    figure.update_yaxes(title_text=AXIS_TITLES[value], col=1)
    figure.update_layout(
        layout(
            width=max(640, 120 + 430 * n_groups),
            height=430,
            margin={"l": 70, "r": 85, "t": 95, "b": 100},
            legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        )
    )
    return figure


def _reference_lines(figure: go.Figure, trace: CausalTrace, value: Value, n_groups: int) -> None:
    """Where the line would lie if restoring did everything (clean) or nothing (corrupted)."""
    levels = {
        "restored": (trace.clean, trace.corrupted),
        "indirect_effect": (trace.clean - trace.corrupted, 0.0),
        "recovery": (1.0, 0.0),
    }[value]
    for name, level in zip(("clean", "corrupted"), levels, strict=True):
        dash = "dash" if name == "clean" else "dot"
        figure.add_hline(y=level, line={"color": INK, "width": 1, "dash": dash})
        figure.add_annotation(
            text=name,
            x=1.0,
            y=level,
            xref="x domain",
            xanchor="left",
            yanchor="middle",
            showarrow=False,
            row=1,
            col=n_groups,
        )
