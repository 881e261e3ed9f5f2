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
    from mmlens.analyses.targets import Answer
    from mmlens.editing import Edit, EditCheck
    from mmlens.inputs.multimodal_inputs import MultimodalInputs
    from mmlens.model.transformer import HookedMultimodalTransformer

FILE = "edit.safetensors"
CHECK_FILE = "check.safetensors"
CHECKED = {
    "same question": "the same question about other images",
    "same image": "other questions about this image",
    "unrelated": "other questions about other images",
    "text": "texts without an image",
}
"""Kinds of references, in words."""
SHOWN = 5
"""Changed answers that are printed."""
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
        typer.Option(
            min=0,
            help="Which layer is edited; by default multedit's 26 of 30, in proportion, and 2 of "
            "32 for other methods and with --paper.",
        ),
    ] = None,
    subject: Annotated[
        str,
        typer.Option(help="What the image shows (Italy): its written name gets the new answer."),
    ] = "",
    references: Annotated[
        str,
        typer.Option(
            help="Whose answers are to stay: a folder of images, a data set as --data takes it, "
            "auto (images and questions that are shipped) or none."
        ),
    ] = "auto",
    check: Annotated[
        str,
        typer.Option(help="What is asked after the edit: as --references takes it, or none."),
    ] = "auto",
    paper: Annotated[
        bool, typer.Option("--paper", help="Edit with the paper's settings, and no references.")
    ] = False,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "multedit",
    settings: MethodSettings = None,
    model: options.Model = "demo",
    template: options.Template = "auto",
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out: Annotated[Path, typer.Option(help=f"A folder for {FILE}.")] = Path("mmlens-edit"),
) -> None:
    """Change the answer to a question about an image, in the weights of one layer.

    Prints the answers and their probabilities before and after, and what became of questions that
    the edit is not about and was not told of. Saves the edit: load it with `Edit.load`, put it on
    with `edit.apply(model)`, take it off with `edit.revert(model)`.
    """
    options.check_image(image)
    options.check_phrase(question, constraint, template)
    if method not in METHODS:
        raise UserError(f"--method: unknown {method!r}; choose from {', '.join(METHODS)}")
    if not target.strip():
        raise UserError("--target is empty; give the new answer")
    chosen = method_settings(settings, (method,)).get(method, {})
    folder = options.writable_folder(out)
    options.check_device(device)

    for option, text in (("--references", references), ("--check", check)):
        check_references(option, text)
    if paper and method != "multedit":
        raise UserError(f"--paper has the paper's settings of multedit, not of {method}")
    if method == "multedit":
        chosen = {"references": named(references), "subject": subject, **chosen}

    loaded = open_model(model, device, dtype, (min_pixels, max_pixels))
    from mmlens.edit_bench.settings import called, default_layer
    from mmlens.editing import MultEditSettings

    if paper:
        chosen["settings"] = MultEditSettings.paper()
    if layer is not None or method != "multedit":
        chosen["layer"] = default_layer(loaded) if layer is None else layer
    with explained():
        inputs = loaded.prepare(
            question,
            str(image),
            spans={"constraint": constraint},
            template=options.template_of(template),
        )
        with waiting("editing ..."):
            made = called(method, loaded, inputs, target, **chosen)
    print_edit(loaded, inputs, made, question=question, target=target)
    if check != "none":
        with explained(), waiting("asking what the edit is not about ..."):
            found = made.check(loaded, inputs, references=check)
        print_check(found, made)
        found.save(folder / CHECK_FILE)
    path = made.save(folder / FILE)
    console().print(f"\nsaved {escape(str(path))}", soft_wrap=True)


def named(references: str) -> str | None:
    """Return references as methods take them."""
    return None if references == "none" else references


def check_references(option: str, given: str) -> None:
    """Refuse references that cannot be opened, before the model is loaded.

    Raises:
        UserError: no such folder or data set.
    """
    from mmlens.data.open import open_questions
    from mmlens.data.questions import images_in

    if given in ("auto", "none") or images_in(Path(given)):
        return
    try:
        open_questions(given)
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {error}") from error


def print_check(found: EditCheck, made: Edit) -> None:
    """What became of the questions that the edit was not told of, and what the references cost."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("asked again, never kept")
    for title in ("asked", "changed", "to the target"):
        table.add_column(title, justify="right")
    for row in found.summary().itertuples():
        if row.kind in CHECKED:
            numbers = (row.asked, row.changed, row.to_target)
            table.add_row(CHECKED[row.kind], *map(str, numbers))
    screen = console()
    screen.print()
    screen.print(table)
    others = found.to_dataframe().query("changed and kind in @CHECKED")
    for row in others.head(SHOWN).itertuples():
        where = f" ({row.image})" if row.image else ""
        screen.print(
            f"  [dim]{escape(row.question)}{escape(where)}:[/] {escape(repr(row.before))} became "
            f"{escape(repr(row.after))}",
            soft_wrap=True,
        )
    if len(others) > SHOWN:
        screen.print(f"  [dim]... and {len(others) - SHOWN} more, in {CHECK_FILE}[/]")
    if found.warning:
        screen.print(f"[yellow]warning:[/] {escape(found.warning)}", soft_wrap=True)
    if used := made.metadata.get("references"):
        screen.print(
            f"[dim]{used['prompts']} references kept: {used['seconds']:.0f} s, "
            f"{used['bytes'] / 1e6:.0f} MB on disk for the next edits[/]"
        )


def print_edit(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    made: Edit,
    *,
    question: str,
    target: str,
) -> None:
    """The answers, and the probabilities of the old and the new one, before and after."""
    from mmlens.analyses.targets import given_answer, record_with_answer

    with waiting("asking the model ..."):
        _, old = record_with_answer(model, inputs, None)
        new = given_answer(model, inputs, target)
        answers = {target: new}
        if old.tokens[0] != new.tokens[0]:
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
    from mmlens.analyses.targets import with_answer
    from mmlens.utils.grad_mode import gradients

    said = first_sentence(str(model.generate(inputs, 12, do_sample=False, num_beams=1)))
    probabilities = {}
    with gradients(False):
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
