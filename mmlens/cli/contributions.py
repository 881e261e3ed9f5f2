"""`mmlens contributions`: what positions receive from others through attention."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mmlens.cli import options
from mmlens.cli.console import out as console
from mmlens.cli.console import waiting
from mmlens.cli.errors import explained
from mmlens.cli.show import bar, plain_table, save_result
from mmlens.cli.trace import open_prompt
from mmlens.cli.two_spans import checked_phrases

if TYPE_CHECKING:
    from mmlens.analyses.attention_contribution import AttentionContribution


def contributions(
    image: options.Image,
    question: options.Question,
    source: options.Source = "image",
    destination: options.Destination = "constraint",
    constraint: options.SomeConstraint = None,
    model: options.Model = "demo",
    layers: options.Layers = None,
    heads: Annotated[bool, typer.Option("--heads", help="Every head by itself.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many sources are named per layer.")] = 3,
    template: options.Template = "auto",
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: options.Out = None,
) -> None:
    """What do words receive from the image, or from other words, through attention?

    The norm of what each position of --to receives from each position of --from through the heads'
    values and output weights, layer by layer.
    """
    options.check_image(image)
    phrases = checked_phrases(question, source, destination, constraint, template)
    chosen = options.layer_list(layers)
    folder = options.writable_folder(out) if out else None
    options.check_device(device)
    bounds = (min_pixels, max_pixels)
    loaded, inputs = open_prompt(image, question, phrases, template, model, device, dtype, bounds)
    from mmlens.analyses.attention_contribution import attention_contribution

    with explained(), waiting("reading attention ..."):
        result = attention_contribution(
            loaded, inputs, source, destination, layers=chosen, per_head=heads
        )
    console().print(f"received by [bold]{escape(destination)}[/] from [bold]{escape(source)}[/]:\n")
    console().print(contribution_table(result, top))
    if folder:
        save_result(result, folder, "contributions")


def contribution_table(result: AttentionContribution, top: int) -> Table:
    """A row per layer (and head): the sum over sources, its bar, and where most comes from.

    Values are means over the destinations.
    """
    table = plain_table("layer", *["head"] * result.per_head, "received", "", "most from")
    means = result.values.float().mean(dim=-2)
    sums = means.sum(dim=-1)
    largest = float(sums.max()) or 1.0
    best = means.topk(min(top, len(result.source)), dim=-1).indices
    for index in product(*map(range, sums.shape)):
        total = float(sums[index])
        named = ", ".join(
            f"{_named(result.source_labels[i])} {float(means[index][i]) / (total or 1.0):.0%}"
            for i in best[index].tolist()
        )
        head = [str(index[1])] if result.per_head else []
        cells = [str(result.layers[index[0]]), *head, f"{total:.3f}"]
        table.add_row(*cells, f"[blue]{bar(total / largest, 12)}[/]", named)
    return table


def _named(label: str) -> str:
    """A patch as it is called, a token in quotes."""
    return escape(label.strip("<>") if label.startswith("<img") else repr(label))
