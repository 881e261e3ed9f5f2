"""Results as the data of a page, and the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from mmlens.files import write_atomically
from mmlens.plots.labels import visible
from mmlens.plots.positions import views
from mmlens.plots.report.prompt import ReportedPrompt
from mmlens.plots.style import DIVERGING, site_title
from mmlens.plots.trace import how_restored

if TYPE_CHECKING:
    from mmlens.attribution import AttentionContribution
    from mmlens.tracing import CausalTrace

DIGITS = 4
#: contributions to more destinations than this would make the page large: the last ones are taken
MAX_DESTINATIONS = 12


def write_report(
    path: str | Path,
    prompt: ReportedPrompt,
    *,
    trace: CausalTrace | None = None,
    contributions: Sequence[AttentionContribution] = (),
) -> Path:
    """Write the page: the picture, the question, the answers, and what the results say.

    Args:
        path: ends in .html; appears whole or not at all.
        prompt: what was asked.
        trace: shown as a heatmap per site; positions traced one at a time are best.
        contributions: shown over the picture and the tokens, one destination at a time.

    Raises:
        ValueError: another suffix.

    Example:
        >>> write_report("report.html", reported_prompt(model, clean, corrupted), trace=trace)
    """
    if Path(path).suffix.lower() != ".html":
        raise ValueError(f"a report is saved as .html, not as {Path(path).name!r}")
    return write_atomically(path, report_page(prompt, trace=trace, contributions=contributions))


def report_page(
    prompt: ReportedPrompt,
    *,
    trace: CausalTrace | None = None,
    contributions: Sequence[AttentionContribution] = (),
) -> str:
    """The page as HTML; arguments as `write_report` takes them."""
    maps = [one for each in contributions for one in contribution_data(each)]
    maps += [] if trace is None else trace_maps(trace)
    data = {
        "picture": picture_data(prompt),
        "tokens": token_data(prompt),
        "maps": maps,
        "start": first_map(prompt, maps),
        "trace": None if trace is None else trace_data(trace),
        "colors": DIVERGING,
    }
    template, style, script = parts()
    return template.render(
        question=question_parts(prompt),
        prompt=prompt,
        largest=max((p for _, *both in prompt.answers for p in both if p), default=1.0),
        trace=trace,
        how="" if trace is None else how_restored(trace),
        data=data,
        style=Markup(style),
        script=Markup(script),
        visible=visible,
    )


@cache
def parts() -> tuple[jinja2.Template, str, str]:
    """Template, style and script, which lie beside this file. Text is escaped unless marked."""
    folder = files("mmlens.plots.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template, style, script = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html.j2", "report.css", "report.js")
    )
    return environment.from_string(template), style, script


def question_parts(prompt: ReportedPrompt) -> list[tuple[str, bool]]:
    """The question in pieces: text, and whether it is the constraint."""
    text, spans = prompt.text, prompt.char_spans
    begin, end = spans.get("question", (0, len(text)))
    first, last = spans.get("constraint", (end, end))
    if not begin <= first < last <= end:
        return [(text[begin:end].strip(), False)]
    pieces = [(text[begin:first], False), (text[first:last], True), (text[last:end], False)]
    return [(piece, marked) for piece, marked in pieces if piece]


def picture_data(prompt: ReportedPrompt) -> dict[str, Any] | None:
    """The picture, and where its patches lie; None where there is none."""
    if not len(prompt.picture) or prompt.grid_size is None:
        return None
    content = base64.b64encode(bytes(prompt.picture.tolist())).decode()
    width, height = prompt.picture_size
    return {
        "source": f"data:image/{prompt.picture_kind};base64,{content}",
        "size": [width, height],
        "frame": list(prompt.frame or (0, 0, width, height)),
        "grid": list(prompt.grid_size),
        "patches": [list(patch) for patch in prompt.patches],
    }


def token_data(prompt: ReportedPrompt) -> list[dict[str, Any]]:
    """The prompt as a row of tokens, each picture one of them."""
    marked = prompt.spans.get("constraint", ())
    folded = views(prompt.labels)[0]
    return [
        {
            "label": row.label,
            "at": list(row.members),
            "visual": row.visual,
            "constraint": row.members[0] in marked,
        }
        for row in folded.rows
    ]


def first_map(prompt: ReportedPrompt, maps: Sequence[dict[str, Any]]) -> int:
    """What is shown first: what the constraint's last word receives, where that is known."""
    words = prompt.spans.get("constraint", [])
    return next((i for i, one in enumerate(maps) if one.get("to") in words[-1:]), 0)


def contribution_data(contribution: AttentionContribution) -> list[dict[str, Any]]:
    """One map for each destination: [layer][source] and the positions of the sources."""
    values = contribution.values.float()
    values = values.mean(dim=1) if contribution.per_head else values
    maps = []
    for index in range(len(contribution.destination))[-MAX_DESTINATIONS:]:
        label = visible(contribution.destination_labels[index].strip() or "␣")
        maps.append(
            {
                "to": contribution.destination[index],
                "name": f"received by “{label}”",
                "layers": list(contribution.layers),
                "at": list(contribution.source),
                "values": rounded(values[:, index].numpy()),
            }
        )
    return maps


def trace_maps(trace: CausalTrace) -> list[dict[str, Any]]:
    """A map for each site, where positions were restored one at a time."""
    if any(len(group) > 1 for group in trace.groups):
        return []
    effects = trace.indirect_effect.float().cpu().numpy()
    return [
        {
            "name": f"restored: {site_title(site)}",
            "layers": list(trace.layers),
            "at": [group[0] for group in trace.groups],
            "values": rounded(effect.T),
        }
        for site, effect in zip(trace.sites, effects, strict=True)
    ]


def trace_data(trace: CausalTrace) -> dict[str, Any]:
    """A panel per site: [site][row][layer], visual tokens in one row and in the picture's rows."""
    effects = trace.indirect_effect.float().cpu().numpy()
    shown: list[dict[str, Any]] = []
    for view in views(trace.group_labels):
        if view.name == "tokens" and shown:
            continue  # what every patch does is shown on the picture
        values, _ = view.fold(effects, "peak")
        rows = [
            {
                "label": row.label,
                "at": [position for member in row.members for position in trace.groups[member]],
            }
            for row in view.rows
        ]
        shown.append({"title": view.title, "rows": rows, "values": rounded(values)})
    return {
        "sites": [site_title(site) for site in trace.sites],
        "layers": list(trace.layers),
        "views": shown,
        "clean": trace.clean,
        "corrupted": trace.corrupted,
    }


def rounded(values: Float[np.ndarray, ...]) -> list[Any]:
    """Numbers with four digits that count, as lists: the page is a text."""
    size = np.abs(np.nan_to_num(values)).max() if values.size else 0.0
    decimals = DIGITS - int(np.floor(np.log10(size))) if size > 0 else DIGITS
    return np.round(np.nan_to_num(values).astype(np.float64), decimals).tolist()
