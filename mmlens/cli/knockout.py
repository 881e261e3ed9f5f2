"""`mmlens knockout`: what is left of the answer when positions cannot attend to others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mmlens.cli import options
from mmlens.cli.console import out as console
from mmlens.cli.errors import explained
from mmlens.cli.show import bar, measured, plain_table, save_result
from mmlens.cli.trace import open_prompt
from mmlens.cli.two_spans import checked_phrases
from mmlens.utils.progress import progress_bar

if TYPE_CHECKING:
    from mmlens.analyses.attention_knockout import AttentionKnockout


def knockout(
    image: options.Image,
    question: options.Question,
    source: options.Source = "image",
    destination: options.Destination = "last",
    constraint: options.SomeConstraint = None,
    model: options.Model = "demo",
    layers: options.Layers = None,
    window: Annotated[
        int, typer.Option(min=1, help="How many adjacent layers are cut together.")
    ] = 1,
    answer: options.Answer = None,
    metric: options.Metric = "probability",
    contrast: options.Contrast = None,
    template: options.Template = "auto",
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: options.Out = None,
) -> None:
    """What is left of the answer when the words of --to cannot attend to those of --from?

    Attention between them is cut before the softmax, in a window of layers around each layer.
    """
    options.check_image(image)
    phrases = checked_phrases(question, source, destination, constraint, template)
    chosen = options.layer_list(layers)
    folder = options.writable_folder(out) if out else None
    options.check_device(device)
    options.check_metric(metric, contrast)
    bounds = (min_pixels, max_pixels)
    loaded, inputs = open_prompt(image, question, phrases, template, model, device, dtype, bounds)
    from mmlens.analyses.attention_knockout import attention_knockout

    with explained(), progress_bar("cutting") as moved:
        result = attention_knockout(
            loaded,
            inputs,
            source,
            destination,
            layers=chosen,
            window=window,
            answer=answer,
            metric=metric,
            contrast=contrast,
            progress=moved,
        )
    cut = "one layer" if window == 1 else f"{window} layers"
    console().print(
        f"{measured(result)} is {result.clean:.3f}; with the attention of "
        f"[bold]{escape(destination)}[/] to [bold]{escape(source)}[/] cut in {cut}:\n"
    )
    console().print(knockout_table(result))
    if folder:
        save_result(result, folder, "knockout")


def knockout_table(result: AttentionKnockout) -> Table:
    """A row per window: what is left, as a bar where it is a probability, and the change."""
    is_share = result.metric == "probability"
    table = plain_table("layer", "P(answer)" if is_share else result.metric, "", "change")
    for layer, left, change in zip(
        result.layers, result.values.tolist(), result.effect.tolist(), strict=True
    ):
        drawn = f"[blue]{bar(left)}[/]" if is_share else ""
        table.add_row(str(layer), f"{left:.3f}", drawn, f"{change:+.3f}")
    return table
