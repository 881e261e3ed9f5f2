"""What the commands print and save about answers and traces."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from mmlens.cli.console import err, out, waiting

if TYPE_CHECKING:
    from mmlens.analyses.attention_contribution import AttentionContribution
    from mmlens.analyses.attention_knockout import AttentionKnockout
    from mmlens.analyses.causal_trace import CausalTrace
    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.model.transformer import HookedMultimodalTransformer

BAR_CELLS = 20
EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """A bar for a number between 0 and 1, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * cells * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (EIGHTHS[rest] if rest else "")


def plain_table(*titles: str) -> Table:
    """A table without lines."""
    return Table(*titles, box=None, padding=(0, 2, 0, 0), header_style="dim")


def first_sentence(text: str) -> str:
    """A small model does not stop by itself: what it says up to the end of a sentence or line."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]


def print_answers(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    *,
    question: str,
    replaced: str,
    top: int = 5,
) -> None:
    """Print the answer, the most probable next tokens, and what the corruption leaves of them.

    Args:
        replaced: what the corruption did, as the heading of its column.
    """
    from mmlens.utils.grad_mode import gradients

    with gradients(False), waiting("asking the model ..."):
        before, after = (model(x)[0, -1].float().softmax(-1) for x in (clean, corrupted))
        answer = first_sentence(str(model.generate(clean, 12, do_sample=False, num_beams=1)))
    table = plain_table("next token")
    for title in ("clean run", escape(replaced)):
        table.add_column(title, min_width=BAR_CELLS + 6)
    for token in before.topk(top).indices.tolist():
        shares = (before[token].item(), after[token].item())
        cells = [f"{share:.3f} [blue]{bar(share)}[/]" for share in shares]
        table.add_row(escape(repr(model.to_str_tokens([token])[0])), *cells)
    console = out()
    console.print(f"[dim]question[/]  {escape(question)}")
    console.print(f"[dim]model[/]     [bold]{escape(answer)}[/]\n")
    console.print(table)
    console.print()


def measured(result: CausalTrace | AttentionKnockout) -> str:
    """What a result measured, in rich's markup."""
    answer, contrast = (f"[bold]{escape(x.strip())}[/]" for x in (result.answer, result.contrast))
    return {
        "probability": f"P({answer})",
        "logit_diff": f"The logit of {answer} minus that of {contrast}",
        "kl": "The KL divergence of the next token",
        "loss": f"The loss of {answer}",
    }[result.metric]


def print_trace(trace: CausalTrace) -> None:
    """The terminal heatmap, under a line that says what it is."""
    from mmlens.plots.terminal import TerminalHeatmap

    console = out()
    window = "one layer" if trace.window == 1 else f"{trace.window} layers"
    console.print(
        f"{measured(trace)} is {trace.clean:.3f} in the clean run and "
        f"{trace.corrupted:.3f} in the corrupted one; restoring {window} "
        "of the clean run changes that by:\n"
    )
    console.print(TerminalHeatmap(trace))


def save_result(
    result: CausalTrace | AttentionContribution | AttentionKnockout, folder: Path, name: str
) -> None:
    """A result as `.safetensors`, `.csv`, `.html` and, where a browser can draw it, `.png`."""
    from mmlens.plots.save import FigureNotSaved, save_figure
    from mmlens.utils.csv_files import write_csv

    with waiting("saving ..."):
        result.save(folder / f"{name}.safetensors")
        write_csv(result.to_dataframe(), folder / f"{name}.csv")
        figure = result.plot()
        save_figure(figure, folder / f"{name}.html")
        names = [f"{name}.safetensors", f"{name}.csv", f"{name}.html"]
        remark = ""
        try:
            save_figure(figure, folder / f"{name}.png")
            names.append(f"{name}.png")
        except FigureNotSaved as error:
            remark = f"no {name}.png: {error}"
    out().print(f"\nsaved in {escape(str(folder))}: {', '.join(names)}", soft_wrap=True)
    if remark:
        err().print(remark, style="dim", markup=False, soft_wrap=True)
