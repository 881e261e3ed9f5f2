"""A causal trace as a figure: a heatmap over positions and layers, or lines over layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from mmlens.plots.figure import Figure
from mmlens.plots.folding import Visual
from mmlens.plots.heatmap import heatmap
from mmlens.plots.labels import metric_in_words, shorten, visible
from mmlens.plots.style import GRID, INK, layout, set_titles, site_line, site_title, spaced

if TYPE_CHECKING:
    from mmlens.analyses.attribution_patching import AttributionPatching
    from mmlens.analyses.causal_trace import CausalTrace

TraceValue = Literal["restored", "indirect_effect", "recovery"]

AXIS_TITLES = {
    "restored": "{}",
    "indirect_effect": "{}, restored − corrupted",
    "recovery": "share of the effect restored",
}
SHORT = {"probability": "P(answer)", "logit_diff": "logit difference", "kl": "KL divergence"}
"""Metrics on an axis; others have their own names."""
#: up to so many groups of positions are drawn as lines
MAX_PROFILES = 3


def plot_trace(
    trace: CausalTrace,
    *,
    kind: Literal["auto", "heatmap", "profile"] = "auto",
    value: TraceValue | None = None,
    title: str | None = None,
    visual: Visual = "folded",
) -> Figure:
    """Draw a trace, with every value shown under the pointer.

    Args:
        trace: the result of `mmlens.causal_trace`.
        kind: ``heatmap`` has one panel per site, each with its own scale, layers to the right and
            the tokens downwards;
            ``profile`` has one panel per group of positions and one line per site, between the
            clean and the corrupted run. ``auto`` takes lines for up to three groups.
        value: ``restored`` (P(answer), or the trace's other metric), ``indirect_effect`` (minus
            the corrupted run's) or
            ``recovery`` (as a share of clean minus corrupted). By default a heatmap shows the
            indirect effect, lines show the metric.
        title: instead of the metric and its value in both runs.
        visual: how a heatmap shows visual tokens, see `mmlens.plots.heatmap`.

    Raises:
        ValueError: for a `kind`, `value` or `visual` that is none of these.

    Example:
        >>> trace.plot().show()
        >>> plot_trace(trace, kind="heatmap").save("trace.html")
    """
    if kind not in ("auto", "heatmap", "profile"):
        raise ValueError(f"kind must be 'auto', 'heatmap' or 'profile', not {kind!r}")
    if value is not None and value not in AXIS_TITLES:
        raise ValueError(f"value must be one of {', '.join(AXIS_TITLES)}, not {value!r}")
    if kind == "auto":
        kind = "profile" if len(trace.groups) <= MAX_PROFILES else "heatmap"
    if kind == "profile":
        figure = _profile(trace, value or "restored")
    else:
        value = value or "indirect_effect"
        figure = heatmap(
            getattr(trace, value),
            rows=trace.group_labels,
            columns=trace.layers,
            panels=[site_title(site) for site in trace.sites],
            value_title=axis_title(trace, value),
            visual=visual,
        )
    measured = metric_in_words(trace.metric, trace.answer, trace.contrast)
    title = title or f"{measured}: {trace.clean:.3f} clean, {trace.corrupted:.3f} corrupted"
    set_titles(figure, title, subtitle_of(trace.metadata, how_restored(trace)))
    return figure


def plot_patching(patching: AttributionPatching, *, visual: Visual = "folded") -> Figure:
    """Draw estimated effects as a trace's are drawn: a panel per site, tokens downwards.

    Example:
        >>> attribution_patching(model, clean, corrupted).plot()
    """
    measured = metric_in_words(patching.metric, patching.answer, patching.contrast)
    return heatmap(
        patching.indirect_effect,
        rows=patching.group_labels,
        columns=patching.layers,
        panels=[site_title(site) for site in patching.sites],
        value_title="effect, estimated by a gradient",
        visual=visual,
        title=f"{measured}: {patching.clean:.3f} clean, {patching.corrupted:.3f} corrupted",
        subtitle=subtitle_of(patching.metadata),
    )


def axis_title(trace: CausalTrace, value: TraceValue) -> str:
    """Return what the values of a trace are."""
    return AXIS_TITLES[value].format(SHORT.get(trace.metric, visible(trace.metric)))


def how_restored(trace: CausalTrace) -> str:
    """Return how many layers were restored together, in words."""
    window = "one layer" if trace.window == 1 else f"a window of {trace.window} layers"
    return f"restoring {window}"


def subtitle_of(metadata: dict[str, Any], *more: str) -> str:
    """Return model, question and further remarks, for a subtitle."""
    parts = [metadata.get("model"), metadata.get("prompt"), *more]
    return " · ".join(shorten(visible(str(part)), 80) for part in parts if part)


def _profile(trace: CausalTrace, value: TraceValue) -> Figure:
    """Draw a panel per group of positions, a line per site."""
    values = getattr(trace, value).detach().float().cpu().numpy()
    n_groups = len(trace.groups)
    figure: Figure = make_subplots(
        figure=Figure(),
        rows=1,
        cols=n_groups,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[f"restored at: {shorten(visible(x), 40)}" for x in trace.group_labels],
    )
    for index, site in enumerate(trace.sites):
        style = site_line(site, index)
        for column in range(n_groups):
            line = go.Scatter(
                x=list(trace.layers),
                y=values[index, column],
                name=site_title(site),
                legendgroup=site,
                showlegend=column == 0,
                mode="lines+markers",
                line={"color": style.color, "dash": style.dash, "width": 2},
                marker={"symbol": style.symbol, "size": 6},
                hovertemplate=f"{site} layer %{{x}}<br>%{{y:.4f}}<extra></extra>",
            )
            figure.add_trace(line, row=1, col=column + 1)
    _reference_lines(figure, trace, value)
    _profile_axes(figure, trace, value)
    return figure


def _profile_axes(figure: Figure, trace: CausalTrace, value: TraceValue) -> None:
    """Set whole layers to the right, probabilities from zero, the legend below."""
    margin = 0.02 * (trace.layers[-1] - trace.layers[0]) + 0.5
    figure.update_xaxes(
        title_text="layer",
        gridcolor=GRID,
        zeroline=False,
        range=[trace.layers[0] - margin, trace.layers[-1] + margin],
        tickvals=[trace.layers[index] for index in spaced(trace.layers)],
    )
    figure.update_yaxes(gridcolor=GRID, zeroline=False, rangemode="tozero")
    figure.update_yaxes(title_text=axis_title(trace, value), col=1)
    figure.update_layout(
        layout(
            width=max(640, 120 + 430 * len(trace.groups)),
            height=430,
            margin={"l": 70, "r": 85, "t": 95, "b": 100},
            legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        )
    )


def _reference_lines(figure: Figure, trace: CausalTrace, value: TraceValue) -> None:
    """Draw where the line would lie if restoring did everything (clean) or nothing (corrupted)."""
    levels = {
        "restored": (trace.clean, trace.corrupted),
        "indirect_effect": (trace.clean - trace.corrupted, 0.0),
        "recovery": (1.0, 0.0),
    }[value]
    # Lines as close as this have their names above and below them, or one would hide the other.
    highest = max(*map(abs, levels), float(getattr(trace, value).abs().max()))
    close = abs(levels[0] - levels[1]) < 0.06 * highest
    upper = "clean" if levels[0] >= levels[1] else "corrupted"
    for name, level in zip(("clean", "corrupted"), levels, strict=True):
        dash = "dash" if name == "clean" else "dot"
        figure.add_hline(y=level, line={"color": INK, "width": 1, "dash": dash})
        figure.add_annotation(
            text=name,
            x=1.0,
            y=level,
            xref="x domain",
            xanchor="left",
            yanchor=("bottom" if name == upper else "top") if close else "middle",
            showarrow=False,
            row=1,
            col=len(trace.groups),
        )
