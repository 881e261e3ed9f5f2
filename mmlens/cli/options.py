"""Options that several commands share, and what is checked about them before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmlens.cli.errors import UserError

Image = Annotated[Path, typer.Argument(help="A picture.", show_default=False)]
Question = Annotated[
    str, typer.Argument(help="A question, or a text to go on with.", show_default=False)
]
Constraint = Annotated[
    str,
    typer.Option(help="The words of the question that point at the picture.", show_default=False),
]
Template = Annotated[
    str,
    typer.Option(
        help="What stands around the question: a text with {question} (and \\n for a line break), "
        '"auto" for the model\'s own, or "none".'
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(help="Whose probability is followed; by default the most probable next token."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="A folder for figure and numbers; without it they are only printed."),
]
OutOrReport = Annotated[
    Path | None,
    typer.Option(
        help="A folder for figures and numbers, or a page like report.html; without it they are "
        "only printed."
    ),
]
Source = Annotated[
    str,
    typer.Option(
        "--from", help="What is looked at: image, constraint, question, or words of the question."
    ),
]
Destination = Annotated[
    str,
    typer.Option(
        "--to", help="What looks: constraint, question, last (token), or words of the question."
    ),
]
Layers = Annotated[
    str | None, typer.Option(help="Layers like 0,3-5; all by default.", show_default=False)
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default the GPU if there is one.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the weights; by default the checkpoint's own."),
]
Model = Annotated[
    str,
    typer.Option(help='"demo", "demo-tuned", a checkpoint folder, or a name on the hub.'),
]
Sites = Annotated[str, typer.Option(help="Where activations are restored, separated by commas.")]
Window = Annotated[int, typer.Option(min=1, help="How many adjacent layers are restored together.")]
Method = Annotated[
    Literal["branch", "naive"],
    typer.Option(help="naive: a whole forward pass per cell; slow, the reference."),
]


def comma_list(text: str, name: str) -> tuple[str, ...]:
    """The parts of an option like ``--sites attn_out,mlp_out``, without repetitions.

    Raises:
        UserError: there are none.
    """
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{name} names nothing: {text!r}")
    return parts


def layer_list(text: str | None) -> list[int] | None:
    """The layers of an option like ``--layers 0,3-5``; None for all.

    Raises:
        UserError: something else than numbers and ranges.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in comma_list(text, "--layers"):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(number or found[1]) for number in found.groups()) if found else (1, 0)
        if first > last:
            raise UserError(f"--layers: {part!r} is neither a layer nor a range like 3-5")
        layers += range(first, last + 1)
    return list(dict.fromkeys(layers))


def template_of(template: str) -> str | None:
    r"""What `model.prepare` takes for ``--template``: "none" is None, ``\n`` a line break."""
    return None if template == "none" else template.replace("\\n", "\n")


def check_picture(path: Path) -> None:
    """Look at the file without the seconds that torch takes to import.

    Raises:
        UserError: no such file, or nothing that Pillow knows as a picture.
    """
    from PIL import Image

    if not path.exists():
        raise UserError(f"no such file: {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a picture")
    try:
        with Image.open(path):
            pass
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from error


def check_phrase(question: str, phrase: str, template: str, option: str = "--constraint") -> None:
    """Look for words of the question before the model is loaded.

    Raises:
        UserError: it is neither in the question nor in the template.
    """
    from mmlens.spans import SpanNotFoundError, find_span

    try:
        find_span(question, phrase)
    except SpanNotFoundError as error:
        try:
            find_span("" if template in ("auto", "none") else template, phrase)
        except SpanNotFoundError:
            raise UserError(f"{option}: {error}") from error


def check_device(device: str | None) -> None:
    """Whether torch knows this device and the machine has it.

    Raises:
        UserError: it does not.
    """
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used: {reason}") from error


def writable_folder(folder: Path) -> Path:
    """Make the folder for results now, not after minutes of work.

    Raises:
        UserError: it cannot be made or written.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def report_file(path: Path) -> Path:
    """A page that can be written: found out now, not after minutes of work.

    Raises:
        UserError: it is not called .html, or its folder cannot be made or written.
    """
    if path.suffix.lower() != ".html":
        raise UserError(f"a report is saved as .html, not as {path.name!r}")
    writable_folder(path.parent)
    return path


def page_or_folder(out: Path | None) -> tuple[Path | None, Path | None]:
    """What ``--out`` asks for: a report, a folder, or neither.

    Raises:
        UserError: it cannot be written.
    """
    if out is None:
        return None, None
    if out.suffix.lower() == ".html" and not out.is_dir():
        return report_file(out), None
    return None, writable_folder(out)
