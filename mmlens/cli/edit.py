"""`mmlens edit`: one fact changed in the weights, and what that does to the answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mmlens.cli import options
from mmlens.cli.console import out as console
from mmlens.cli.console import waiting
from mmlens.cli.errors import UserError, explained
from mmlens.cli.show import BAR_CELLS, bar, first_sentence
from mmlens.cli.trace import open_model

if TYPE_CHECKING:
    from mmlens.answers import Answer
    from mmlens.editing import Edit
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer

FILE = "edit.safetensors"
METHODS = ("multedit", "fine_tune", "constrained_fine_tune", "lora")
"""Those that need nothing but the question; all are in `mmlens edit-bench`."""

MethodSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="METHOD.NAME=VALUE: a setting of an editing method, like multedit.steps=50."
    ),
]


def edit(
    image: options.Image,
    question: options.Question,
    constraint: options.Constraint,
    target: Annotated[str, typer.Option(help="The new answer.", show_default=False)],
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Which layer is edited; by default 2 of 32, in proportion."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "multedit",
    settings: MethodSettings = None,
    model: options.Model = "demo",
    template: options.Template = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help=f"A folder for {FILE}.")] = Path("mmlens-edit"),
) -> None:
    """Change the answer to a question about a picture, in the weights of one layer.

    Prints the answers and their probabilities before and after, and saves the edit: load it with
    `Edit.load`, put it on with `model.apply`, take it off with `edit.revert`.
    """
    options.check_picture(image)
    options.check_phrase(question, constraint, template)
    if method not in METHODS:
        raise UserError(f"--method: unknown {method!r}; choose from {', '.join(METHODS)}")
    if not target.strip():
        raise UserError("--target is empty; give the new answer")
    chosen = method_settings(settings, (method,)).get(method, {})
    folder = options.writable_folder(out)
    options.check_device(device)

    loaded = open_model(model, device, dtype)
    from mmlens.editing.bench_settings import called, default_layer

    layer = default_layer(loaded) if layer is None else layer
    with explained():
        inputs = loaded.prepare(
            question,
            str(image),
            spans={"constraint": constraint},
            template=options.template_of(template),
        )
        with waiting(f"editing layer {layer} ..."):
            made = called(method, loaded, inputs, target, layer=layer, **chosen)
    print_edit(loaded, inputs, made, question=question, target=target)
    path = made.save(folder / FILE)
    console().print(f"\nsaved {escape(str(path))}", soft_wrap=True)


def print_edit(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    made: Edit,
    *,
    question: str,
    target: str,
) -> None:
    """The answers, and the probabilities of the old and the new one, before and after."""
    from mmlens.answers import given_answer, make_answer

    with waiting("asking the model ..."):
        first = int(model(inputs)[0, -1].argmax())
        new = given_answer(model, inputs, target)
        answers = {target: new}
        if first != int(new.tokens[0]):
            old = make_answer(model, [first], inputs.n_pos - 1)
            answers[old.text.strip()] = old
        before = asked(model, inputs, answers)
        with made.applied(model):
            after = asked(model, inputs, answers)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("answer")
    for title in ("before", "after"):
        table.add_column(title, min_width=BAR_CELLS + 6)
    for text in answers:
        cells = [f"{each[1][text]:.3f} [blue]{bar(each[1][text])}[/]" for each in (before, after)]
        table.add_row(escape(text), *cells)
    screen = console()
    screen.print(f"[dim]question[/]  {escape(question)}")
    screen.print(f"[dim]before[/]    [bold]{escape(before[0])}[/]")
    screen.print(f"[dim]after[/]     [bold]{escape(after[0])}[/]\n")
    screen.print(table)


def asked(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, answers: dict[str, Answer]
) -> tuple[str, dict[str, float]]:
    """What the model says, and the probabilities of some answers."""
    import torch

    from mmlens.answers import with_answer

    said = first_sentence(str(model.generate(inputs, max_new_tokens=12)))
    probabilities = {}
    with torch.no_grad():
        for text, answer in answers.items():
            logits = model(with_answer(inputs, answer))[:, answer.positions]
            probabilities[text] = float(answer.probability(logits))
    return said, probabilities


def method_settings(given: list[str] | None, methods: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The settings of options like ``--set multedit.steps=50``, by method.

    Values are JSON (`0.1`, `true`, `[2, 3]`); what is not is text.

    Raises:
        UserError: something else, or a method that is not used.
    """
    found: dict[str, dict[str, Any]] = {}
    for each in given or ():
        parts = re.fullmatch(r"([\w-]+)\.(\w+)=(.+)", each)
        if parts is None:
            raise UserError(f"--set: {each!r} is not METHOD.NAME=VALUE")
        method, name, value = parts.groups()
        if method not in methods:
            raise UserError(f"--set: {method!r} is none of the methods {', '.join(methods)}")
        try:
            found.setdefault(method, {})[name] = json.loads(value)
        except json.JSONDecodeError:
            found.setdefault(method, {})[name] = value
    return found
