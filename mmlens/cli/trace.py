"""`mmlens trace`: which layers and positions carry the answer to a question about an image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmlens.cli import options
from mmlens.cli.console import waiting
from mmlens.cli.errors import UserError, explained
from mmlens.cli.report import save_trace
from mmlens.cli.show import print_answers, print_trace
from mmlens.utils.progress import progress_bar

if TYPE_CHECKING:
    from pathlib import Path

    from mmlens.analyses.metrics import MetricName
    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.model.transformer import HookedMultimodalTransformer

SITES = "resid_post,attn_out,mlp_out"
POSITIONS = ("constraint", "last", "each")


def trace(
    image: options.Image,
    question: options.Question,
    constraint: options.Constraint,
    model: options.Model = "demo",
    corrupt_with: Annotated[
        str, typer.Option(help="The word that takes the constraint's place in the corrupted run.")
    ] = "Paris",
    sites: options.Sites = SITES,
    window: options.Window = 1,
    positions: Annotated[
        str | None,
        typer.Option(
            help="constraint, last (each restored as a whole; or both: constraint,last), or each: "
            "every position, one at a time. By default each for a report, else both.",
            show_default=False,
        ),
    ] = None,
    answer: options.Answer = None,
    metric: options.Metric = "probability",
    contrast: options.Contrast = None,
    template: options.Template = "auto",
    method: options.Method = "branch",
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: options.OutOrReport = None,
) -> None:
    """Trace a question about an image: which layers and positions carry the answer?

    The question is run as it is and with the constraint replaced; then the clean run's activations
    are put back into the corrupted run, one site, layer and group of positions at a time.
    """
    options.check_image(image)
    options.check_phrase(question, constraint, template)
    chosen_sites = options.comma_list(sites, "--sites")
    page, folder = options.page_or_folder(out)
    names = position_names(positions or ("each" if page else "constraint,last"))
    options.check_device(device)
    check_sites(chosen_sites)
    options.check_metric(metric, contrast)

    spans = {"constraint": constraint}
    bounds = (min_pixels, max_pixels)
    loaded, inputs = open_prompt(image, question, spans, template, model, device, dtype, bounds)
    trace_prompt(
        loaded,
        inputs,
        question,
        constraint,
        corrupt_with,
        sites=chosen_sites,
        window=window,
        positions=names,
        answer=answer,
        metric=metric,
        contrast=contrast,
        method=method,
        page=page,
        folder=folder,
    )


def position_names(positions: str) -> tuple[str, ...]:
    """Return the groups of positions that ``--positions`` asks for; ``each`` stands alone."""
    names = options.comma_list(positions, "--positions")
    for name in names:
        if name not in POSITIONS:
            raise UserError(f"--positions: unknown {name!r}; choose from {', '.join(POSITIONS)}")
    if "each" in names and len(names) > 1:
        raise UserError("--positions: each goes through all positions; it stands alone")
    return names


def check_sites(sites: tuple[str, ...]) -> None:
    """Look whether a decoder's layers have these sites."""
    from mmlens.interventions.intervention import LAYERED_SITES
    from mmlens.model.sites import split_site

    for site in sites:
        with explained("--sites: "):
            name, _ = split_site(site)
        if name not in LAYERED_SITES:
            raise UserError(
                f"--sites: unknown site {site!r}; a decoder layer has {', '.join(LAYERED_SITES)}"
            )


def open_model(
    name: str,
    device: str | None = None,
    dtype: str | None = None,
    bounds: tuple[int | None, int | None] = (None, None),
) -> HookedMultimodalTransformer:
    """Load the model that ``--model`` names, with ``--min-pixels`` and ``--max-pixels``."""
    with waiting("loading mmlens ..."):
        import torch

        from mmlens import HookedMultimodalTransformer
    with explained(), waiting(f"loading {name} ..."):
        return HookedMultimodalTransformer.from_pretrained(
            name,
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            min_pixels=bounds[0],
            max_pixels=bounds[1],
        )


def open_prompt(
    image: Path,
    question: str,
    phrases: dict[str, str],
    template: str,
    model: str,
    device: str | None,
    dtype: str | None,
    bounds: tuple[int | None, int | None],
) -> tuple[HookedMultimodalTransformer, MultimodalInputs]:
    """Return the model and the prompt, with the phrases as spans, and the image within bounds."""
    loaded = open_model(model, device, dtype, bounds)
    with explained():
        inputs = loaded.prepare(
            question,
            str(image),
            spans=phrases,
            template=options.template_of(template),
        )
    return loaded, inputs


def trace_prompt(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    question: str,
    constraint: str,
    word: str,
    *,
    sites: tuple[str, ...],
    window: int,
    positions: tuple[str, ...],
    answer: str | None = None,
    metric: MetricName = "probability",
    contrast: str | None = None,
    method: Literal["branch", "naive"] = "branch",
    page: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Put a word in the constraint's place, print both runs' answers, trace, print and save."""
    from mmlens import causal_trace, swap_span

    with explained():
        corrupted = swap_span(model, clean, "constraint", word)
    replaced = f"“{constraint}” replaced by {word}"
    print_answers(model, clean, corrupted, question=question, replaced=replaced)
    groups = None if positions == ("each",) else [clean.span(name) for name in positions]
    with explained(), progress_bar("tracing") as moved:
        traced = causal_trace(
            model,
            clean,
            corrupted,
            sites=sites,
            window=window,
            positions=groups,
            answer=answer,
            metric=metric,
            contrast=contrast,
            method=method,
            progress=moved,
        )
    if groups is not None:
        titles = {"constraint": constraint, "last": "the last token"}
        traced = replace(traced, group_labels=tuple(titles[name] for name in positions))
    print_trace(traced)
    if page or folder:
        save_trace(model, clean, corrupted, replaced, traced, page=page, folder=folder)
