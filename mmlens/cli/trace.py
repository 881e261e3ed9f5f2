"""`mmlens trace`: which layers and positions carry the answer to a question about a picture."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmlens.cli import options
from mmlens.cli.console import progress_bar, waiting
from mmlens.cli.errors import UserError, explained
from mmlens.cli.report import save_trace
from mmlens.cli.show import print_answers, print_trace

if TYPE_CHECKING:
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer
    from mmlens.tracing import CausalTrace

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
    template: options.Template = "auto",
    method: options.Method = "branch",
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: options.OutOrReport = None,
) -> None:
    """Trace a question about a picture: which layers and positions carry the answer?

    The question is run as it is and with the constraint replaced; then the clean run's activations
    are put back into the corrupted run, one site, layer and group of positions at a time.
    """
    options.check_picture(image)
    options.check_phrase(question, constraint, template)
    chosen_sites = options.comma_list(sites, "--sites")
    page, folder = options.page_or_folder(out)
    names = position_names(positions or ("each" if page else "constraint,last"))
    options.check_device(device)
    check_sites(chosen_sites)

    loaded = open_model(model, device, dtype)
    with explained():
        inputs = loaded.prepare(
            question,
            str(image),
            spans={"constraint": constraint},
            template=options.template_of(template),
        )
    corrupted, replaced = corrupt(loaded, inputs, constraint, corrupt_with)
    result = ask_and_trace(
        loaded,
        inputs,
        corrupted,
        question=question,
        constraint=constraint,
        replaced=replaced,
        sites=chosen_sites,
        window=window,
        positions=names,
        answer=answer,
        method=method,
    )
    if page or folder:
        save_trace(loaded, inputs, corrupted, replaced, result, page=page, folder=folder)


def position_names(positions: str) -> tuple[str, ...]:
    """The groups of positions that ``--positions`` asks for.

    Raises:
        UserError: an unknown name, or ``each`` together with another.
    """
    names = options.comma_list(positions, "--positions")
    for name in names:
        if name not in POSITIONS:
            raise UserError(f"--positions: unknown {name!r}; choose from {', '.join(POSITIONS)}")
    if "each" in names and len(names) > 1:
        raise UserError("--positions: each goes through all positions; it stands alone")
    return names


def check_sites(sites: tuple[str, ...]) -> None:
    """Whether a decoder has these sites.

    Raises:
        UserError: no such site, or one outside of the decoder's layers.
    """
    from mmlens.interventions import LAYERED_SITES, split_site

    for site in sites:
        with explained("--sites: "):
            name, _ = split_site(site)
        if name not in LAYERED_SITES:
            raise UserError(
                f"--sites: unknown site {site!r}; a decoder layer has {', '.join(LAYERED_SITES)}"
            )


def open_model(
    name: str, device: str | None = None, dtype: str | None = None
) -> HookedMultimodalTransformer:
    """Load the model that ``--model`` names.

    Raises:
        UserError: there is none of that name, or it cannot be read.
    """
    with waiting("loading mmlens ..."):
        import torch

        from mmlens import HookedMultimodalTransformer
    with explained(), waiting(f"loading {name} ..."):
        return HookedMultimodalTransformer.from_pretrained(
            name, device=device, dtype=getattr(torch, dtype) if dtype else None
        )


def corrupt(
    model: HookedMultimodalTransformer, clean: MultimodalInputs, constraint: str, word: str
) -> tuple[MultimodalInputs, str]:
    """The corrupted run's inputs, and what was done, in words.

    Raises:
        UserError: the word cannot take the constraint's place.
    """
    from mmlens import swap_span

    with explained():
        return swap_span(model, clean, "constraint", word), f"“{constraint}” replaced by {word}"


def ask_and_trace(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    *,
    question: str,
    constraint: str,
    replaced: str,
    sites: tuple[str, ...],
    window: int,
    positions: tuple[str, ...],
    answer: str | None = None,
    method: Literal["branch", "naive"] = "branch",
) -> CausalTrace:
    """Print the answers of the clean and the corrupted run, trace, and print the heatmap.

    Raises:
        UserError: the trace is impossible with what the user gave.
    """
    from mmlens import causal_trace

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
            method=method,
            progress=moved,
        )
    if groups is not None:
        titles = {"constraint": constraint, "last": "the last token"}
        traced = replace(traced, group_labels=tuple(titles[name] for name in positions))
    print_trace(traced)
    return traced
