"""`mmlens report`: one page of what other commands have saved in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mmlens.cli import options
from mmlens.cli.console import out as console
from mmlens.cli.console import waiting
from mmlens.cli.errors import UserError, explained
from mmlens.cli.show import save_result

if TYPE_CHECKING:
    from mmlens.analyses.causal_trace import CausalTrace
    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.model.transformer import HookedMultimodalTransformer

#: what a folder of results may hold for a report; the prompt must be there
PROMPT, TRACE, CONTRIBUTIONS = (
    f"{name}.safetensors" for name in ("prompt", "trace", "contributions")
)


def report(
    results: Annotated[
        Path, typer.Argument(help="The folder of mmlens trace --out.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; by default report.html in that folder.", show_default=False),
    ] = None,
) -> None:
    """Make one page of saved results: it opens from the disk and needs no network.

    The image with its patches, the question, the answers, the trace, and what words receive from
    the image.
    """
    if not results.is_dir():
        raise UserError(f"no such folder: {results}")
    if not (results / PROMPT).exists():
        raise UserError(f"{results} holds no {PROMPT}: mmlens trace --out {results} writes it")
    page = options.report_file(out or results / "report.html")
    with waiting("writing the report ..."):
        from mmlens.analyses.attention_contribution import AttentionContribution
        from mmlens.analyses.causal_trace import CausalTrace
        from mmlens.plots.report import ReportedPrompt, write_report

        with explained():
            prompt = ReportedPrompt.load(results / PROMPT)
            trace = CausalTrace.load(results / TRACE) if (results / TRACE).exists() else None
            received = [
                AttentionContribution.load(path)
                for path in [results / CONTRIBUTIONS]
                if path.exists()
            ]
        write_report(page, prompt, trace=trace, contributions=received)
    print_saved(page)


def save_trace(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    replaced: str,
    trace: CausalTrace,
    *,
    page: Path | None = None,
    folder: Path | None = None,
) -> None:
    """Save a trace, and what a report shows besides: the prompt, and what its words receive.

    Args:
        replaced: what the corruption did, in words.
        page: a report.
        folder: figures and numbers, from which `mmlens report` makes a report.
    """
    from mmlens.analyses.attention_contribution import attention_contribution
    from mmlens.plots.report import reported_prompt, write_report

    with waiting("reading attention ..."):
        prompt = reported_prompt(model, clean, corrupted, corruption=replaced)
        last, words = clean.span("last"), clean.span("constraint")
        destinations = [*words.tolist(), *(x for x in last.tolist() if x not in words.tolist())]
        received = attention_contribution(model, clean, list(range(clean.n_pos)), destinations)
    if folder:
        prompt.save(folder / PROMPT)
        received.save(folder / CONTRIBUTIONS)
        save_result(trace, folder, "trace")
    if page:
        write_report(page, prompt, trace=trace, contributions=[received])
        print_saved(page)


def print_saved(page: Path) -> None:
    """Say where the page is."""
    console().print(f"\nsaved {escape(str(page))}: open it in a browser", soft_wrap=True)
