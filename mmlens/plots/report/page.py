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

from mmlens.inputs.image_tokens import Box, Grid
from mmlens.interventions.intervention import site_of
from mmlens.plots.folding import foldings
from mmlens.plots.image_mesh import ImageMesh
from mmlens.plots.labels import metric_in_words, visible
from mmlens.plots.policy import content_policy
from mmlens.plots.report.prompt import ReportedPrompt
from mmlens.plots.style import DIVERGING, site_title
from mmlens.plots.trace import how_restored
from mmlens.utils.files import write_atomically

if TYPE_CHECKING:
    from mmlens.analyses.attention_contribution import AttentionContribution
    from mmlens.analyses.causal_trace import CausalTrace

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
    """Write the page: the image, the question, the answers, and what the results say.

    Args:
        path: ends in .html; appears whole or not at all.
        prompt: what was asked.
        trace: shown as a heatmap per site; positions traced one at a time are best.
        contributions: shown over the image and the tokens, one destination at a time.

    Raises:
        ValueError: another suffix; values that are NaN or infinite.

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
    """Return the page as HTML; arguments as `write_report` takes them."""
    maps = [one for each in contributions for one in contribution_data(each)]
    maps += [] if trace is None else trace_maps(trace)
    data = {
        "image": image_data(prompt),
        "tokens": token_data(prompt),
        "maps": maps,
        "start": first_map(prompt, maps),
        "trace": None if trace is None else trace_data(trace),
        "colors": DIVERGING,
    }
    template, style, script = page_parts()
    return template.render(
        question=question_parts(prompt),
        prompt=prompt,
        largest=max((p for _, *both in prompt.answers for p in both if p), default=1.0),
        trace=trace,
        how="" if trace is None else how_restored(trace),
        **({} if trace is None else words_of(trace)),
        data=data,
        style=Markup(style),
        script=Markup(script),
        policy=content_policy([script]),
        visible=visible,
    )


def words_of(trace: CausalTrace) -> dict[str, str]:
    """Return what the trace measured, for a title, and what kind of number that is."""
    measured = metric_in_words(trace.metric, trace.answer, trace.contrast)
    return {
        "measured": measured,
        "kind": "probability" if trace.metric == "probability" else "value",
    }


@cache
def page_parts() -> tuple[jinja2.Template, str, str]:
    """Return template, style and script from this folder. Text is escaped unless marked."""
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
    """Return the question in pieces: text, and whether it is the constraint."""
    text, spans = prompt.text, prompt.char_spans
    begin, end = spans.get("question", (0, len(text)))
    first, last = spans.get("constraint", (end, end))
    if not begin <= first < last <= end:
        return [(text[begin:end].strip(), False)]
    pieces = [(text[begin:first], False), (text[first:last], True), (text[last:end], False)]
    return [(piece, marked) for piece, marked in pieces if piece]


def image_data(prompt: ReportedPrompt) -> dict[str, Any] | None:
    """Return the image, and where its patches lie in every view; None where there is none."""
    if not len(prompt.image_file) or not prompt.grids:
        return None
    content = base64.b64encode(bytes(prompt.image_file.tolist())).decode()
    width, height = prompt.image_size
    frames = [Box(*frame) for frame in prompt.frames]
    frames = frames or [Box(0, 0, width, height)] * len(prompt.grids)
    several = len(frames) > 1
    views = [
        (f"view {number} ({rows} × {columns} patches)", [(number, (rows, columns), frame)])
        for number, ((rows, columns), frame) in enumerate(zip(prompt.grids, frames, strict=True))
    ]
    if several:
        views.insert(0, ("all views: their mean", [one for _, (one,) in views]))
    return {
        "source": f"data:image/{prompt.image_kind};base64,{content}",
        "size": [width, height],
        "frames": [list(frame) for frame in frames],
        "patches": [
            [position, f"{f'{view}:' if several else ''}{row},{column}"]
            for position, view, row, column in prompt.patches
        ],
        "views": [mesh_data(prompt, title, shown) for title, shown in views],
    }


def mesh_data(
    prompt: ReportedPrompt, title: str, shown: Sequence[tuple[int, Grid, Box]]
) -> dict[str, Any]:
    """Return the lines between areas of the image, and the positions that show each area."""
    cells = [cell for _, *cell in prompt.patches]
    mesh = ImageMesh.of_cells(cells, shown, several=len(prompt.grids) > 1)
    return {
        "title": title,
        "x": mesh.x.tolist(),
        "y": mesh.y.tolist(),
        "at": [
            [[prompt.patches[token][0] for token in area if token >= 0] for area in row]
            for row in np.moveaxis(mesh.tokens, 0, -1).tolist()
        ],
    }


def token_data(prompt: ReportedPrompt) -> list[dict[str, Any]]:
    """Return the prompt as a row of tokens, each image one of them."""
    marked = prompt.spans.get("constraint", ())
    folded = foldings(prompt.labels)[0]
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
    """Return the map to show first: what the constraint's last word receives, where it is known."""
    words = prompt.spans.get("constraint", [])
    return next((i for i, one in enumerate(maps) if one.get("to") in words[-1:]), 0)


def contribution_data(contribution: AttentionContribution) -> list[dict[str, Any]]:
    """Return a map for each destination: [layer][source] and the positions of the sources."""
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
    """Return a map for each site, where positions of the prompt were restored one at a time."""
    if any(len(group) > 1 for group in trace.groups) or not is_of_tokens(trace):
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


def is_of_tokens(trace: CausalTrace) -> bool:
    """Return whether positions are those of the prompt, not patches in the tower."""
    return site_of(trace.sites[0]).positions == "tokens"


def trace_data(trace: CausalTrace) -> dict[str, Any]:
    """Return [site][row][layer], with visual tokens in one row and in the image's rows."""
    effects = trace.indirect_effect.float().cpu().numpy()
    check_numbers(effects)  # folded, the largest of several would hide it
    shown: list[dict[str, Any]] = []
    at = trace.groups if is_of_tokens(trace) else ((),) * len(trace.groups)
    for view in foldings(trace.group_labels):
        if view.name == "tokens" and shown:
            continue  # what every patch does is shown on the image
        values, _ = view.fold(effects, "peak")
        rows = [
            {
                "label": row.label,
                "at": [position for member in row.members for position in at[member]],
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


def check_numbers(values: Float[np.ndarray, ...]) -> None:
    """Raise a ValueError where the page would show a 0 for what is no number."""
    if wrong := int((~np.isfinite(values)).sum()):
        raise ValueError(
            f"{wrong} of {values.size} values are NaN or infinite, which a report cannot show: an "
            "activation may have overflowed; run the model in float32, or leave that layer out"
        )


def rounded(values: Float[np.ndarray, ...]) -> list[Any]:
    """Return numbers with four significant digits, as lists: the page is a text."""
    check_numbers(values)
    size = np.abs(values).max() if values.size else 0.0
    decimals = DIGITS - int(np.floor(np.log10(size))) if size > 0 else DIGITS
    return np.round(values.astype(np.float64), decimals).tolist()
