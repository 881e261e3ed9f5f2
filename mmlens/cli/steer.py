"""`mmlens steer`: what a model says with a steering vector added, and without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mmlens.cli import options
from mmlens.cli.console import out as console
from mmlens.cli.console import waiting
from mmlens.cli.errors import UserError, explained
from mmlens.cli.show import bar, plain_table
from mmlens.cli.trace import open_model

if TYPE_CHECKING:
    from torch import Tensor

    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.interventions.intervention import Intervention
    from mmlens.model.transformer import HookedMultimodalTransformer

SHOWN = 5
"""Next tokens that are printed."""


def steer(
    image: options.Image,
    question: options.Question,
    vector: Annotated[
        Path,
        typer.Option(help="The file of a vector (SteeringVector.save).", show_default=False),
    ],
    scale: Annotated[
        float, typer.Option(help="How much of it is added; negative for the other way.")
    ] = 1.0,
    layers: Annotated[
        str | None,
        typer.Option(help="Which of its layers, like 0,3-5; by default all.", show_default=False),
    ] = None,
    positions: Annotated[
        str,
        typer.Option(
            help="Where: answer (where its tokens are chosen), generated, all, or a span of the "
            "prompt such as image."
        ),
    ] = "answer",
    keep_norm: Annotated[
        bool, typer.Option("--keep-norm", help="Change directions, and no activation's norm.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 32,
    model: options.Model = "demo",
    template: options.Template = "auto",
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """What does the model say about an image when a vector is added to its activations?

    Prints the greedy answer as it is and steered, and the most probable first tokens of both.
    """
    options.check_image(image)
    chosen = options.layer_list(layers)
    if not vector.is_file():
        raise UserError(f"--vector: no such file: {vector}")
    options.check_device(device)
    loaded = open_model(model, device, dtype, (min_pixels, max_pixels))
    from mmlens.analyses.steering_vector import SteeringVector

    with explained("--vector: "):
        steering = SteeringVector.load(vector)
        steering.check(loaded)
    with explained():
        inputs = loaded.prepare(question, str(image), template=options.template_of(template))
        added = steering.of_answers(inputs, scale, positions, layers=chosen, keep_norm=keep_norm)
    where = f"{steering.site}, layers {', '.join(map(str, chosen or steering.layers))}"
    with explained(), waiting("asking the model ..."):
        found = [asked(loaded, inputs, each, max_new_tokens) for each in ([], added)]
    screen = console()
    screen.print(f"[dim]question[/]   {escape(question)}")
    for title, (said, _) in zip(("as it is ", "steered  "), found, strict=True):
        screen.print(f"[dim]{title}[/]  [bold]{escape(said.strip())}[/]", soft_wrap=True)
    screen.print(f"[dim]{scale:g} times the vector at {escape(where)}[/]\n")
    screen.print(first_tokens(loaded, [probabilities for _, probabilities in found]))


def asked(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    interventions: list[Intervention],
    max_new_tokens: int,
) -> tuple[str, Tensor]:
    """What the model says, and the probabilities of its first token."""
    found = model.generate(
        inputs,
        max_new_tokens,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        interventions=interventions,
    )
    said = model.to_string(found.sequences[0, inputs.n_pos :], skip_special_tokens=True)
    return said, found.logits[0][0].softmax(-1)


def first_tokens(model: HookedMultimodalTransformer, probabilities: list[Tensor]) -> Table:
    """A row for each of the most probable first tokens, with its probability in both runs."""
    table = plain_table("first token", "as it is", "", "steered", "")
    likely = sum(probabilities[1:], probabilities[0]).topk(SHOWN).indices.tolist()
    for token in sorted(likely, key=lambda token: -float(probabilities[0][token])):
        cells = [
            cell
            for share in (float(each[token]) for each in probabilities)
            for cell in (f"{share:.3f}", f"[blue]{bar(share, 12)}[/]")
        ]
        table.add_row(escape(repr(model.to_str_tokens([token])[0])), *cells)
    return table
