"""Options that several commands share, and what is checked about them before anything is loaded.

What cannot work is a `UserError` that names the option.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from mmlens.cli.errors import UserError, explained

Image = Annotated[Path, typer.Argument(help="An image.", show_default=False)]
Question = Annotated[
    str, typer.Argument(help="A question, or a text to go on with.", show_default=False)
]
Constraint = Annotated[
    str,
    typer.Option(help="The words of the question that point at the image.", show_default=False),
]
SomeConstraint = Annotated[
    str | None, typer.Option(help="The words of the question that point at the image.")
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
Metric = Annotated[
    Literal["probability", "logit_diff", "kl", "loss"],
    typer.Option(
        help="What is followed of the answer: its probability, its logit minus that of --contrast, "
        "how far the next token is from the unchanged run's (KL divergence, nats), or its loss."
    ),
]
Contrast = Annotated[
    str | None,
    typer.Option(help="The answer whose logit --metric logit_diff subtracts.", show_default=False),
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
        "--from", help="What is attended to: image, constraint, question, or words of the question."
    ),
]
Destination = Annotated[
    str,
    typer.Option(
        "--to",
        help="What attends to it: constraint, question, last (token), or words of the question.",
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
MinPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The least pixels of an image, scaled: of models whose images have as many visual "
        "tokens as they ask for (Qwen-VL).",
        show_default=False,
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="The most; it decides what an image costs.", show_default=False),
]
Model = Annotated[
    str,
    typer.Option(help='"demo", "demo-tuned", a checkpoint folder, or a name on the hub.'),
]
Annotations = Annotated[
    str | None,
    typer.Option(help="QUESTIONS.json,ANNOTATIONS.json of OK-VQA: the answers to okvqa.csv."),
]
Sites = Annotated[str, typer.Option(help="Where activations are restored, separated by commas.")]
Window = Annotated[int, typer.Option(min=1, help="How many adjacent layers are restored together.")]
Method = Annotated[
    Literal["branch", "naive"],
    typer.Option(help="naive: a whole forward pass per cell; slow, the reference."),
]


def comma_list(text: str, name: str) -> tuple[str, ...]:
    """Return the parts of an option like ``--sites attn_out,mlp_out``, without repetitions."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{name} names nothing: {text!r}")
    return parts


def layer_list(text: str | None) -> list[int] | None:
    """Return the layers of an option like ``--layers 0,3-5``; None for all."""
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


def numbers(text: str, name: str) -> tuple[int, ...]:
    """Return the positive numbers of an option like ``--windows 1,3,5``."""
    found = comma_list(text, name)
    if not all(each.isdecimal() and int(each) for each in found):
        raise UserError(f"{name}: positive numbers, separated by commas, not {text!r}")
    return tuple(map(int, found))


def scales(text: str, name: str) -> tuple[float, ...]:
    """Return the numbers of an option like ``--scales -4,0,4``."""
    try:
        found = tuple(map(float, comma_list(text, name)))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise UserError(f"{name}: numbers, separated by commas, not {text!r}")
    return found


def pair_list(text: str, name: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs of an option like ``--pairs "image>constraint,constraint>last token"``."""
    split = [tuple(role.strip() for role in part.split(">")) for part in comma_list(text, name)]
    if not all(len(each) == 2 and all(each) for each in split):
        raise UserError(f"{name}: roles like image>constraint, separated by commas, not {text!r}")
    return tuple((each[0], each[1]) for each in split)


def two_files(text: str, name: str) -> tuple[str, str]:
    """Return the files of an option like ``--annotations QUESTIONS.json,ANNOTATIONS.json``."""
    files = comma_list(text, name)
    if len(files) != 2:
        raise UserError(f"{name}: two files, questions and annotations, not {text!r}")
    return files[0], files[1]


def template_of(template: str) -> str | None:
    r"""What `model.prepare` takes for ``--template``: "none" is None, ``\n`` a line break."""
    return None if template == "none" else template.replace("\\n", "\n")


def check_image(path: Path) -> None:
    """Look at the file without the seconds that torch takes to import."""
    from mmlens.inputs.image_files import open_image

    with explained(), open_image(path):
        pass


def check_phrase(question: str, phrase: str, template: str, option: str = "--constraint") -> None:
    """Look for words of the question, or of the template, before the model is loaded."""
    from mmlens.inputs.spans import SpanNotFoundError, find_span

    try:
        find_span(question, phrase)
    except SpanNotFoundError as error:
        try:
            find_span("" if template in ("auto", "none") else template, phrase)
        except SpanNotFoundError:
            raise UserError(f"{option}: {error}") from error


def check_device(device: str | None) -> None:
    """Look whether torch knows this device and the machine has it."""
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used: {reason}") from error


def writable_folder(folder: Path) -> Path:
    """Make the folder for results now, not after minutes of work."""
    from mmlens.utils.files import check_writable

    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def report_file(path: Path) -> Path:
    """Return the path of a page that can be written: found out now, not after minutes of work."""
    if path.suffix.lower() != ".html":
        raise UserError(f"a report is saved as .html, not as {path.name!r}")
    writable_folder(path.parent)
    return path


def check_metric(metric: str, contrast: str | None) -> None:
    """Look whether the metric has the contrast that it needs, before the model is loaded."""
    if metric == "logit_diff" and contrast is None:
        raise UserError("--metric logit_diff needs --contrast, the answer whose logit it subtracts")
    if metric != "logit_diff" and contrast is not None:
        raise UserError(f"--contrast is for --metric logit_diff, not for {metric}")


def page_or_folder(out: Path | None) -> tuple[Path | None, Path | None]:
    """Return what ``--out`` asks for: a report, a folder, or neither."""
    if out is None:
        return None, None
    if out.suffix.lower() == ".html" and not out.is_dir():
        return report_file(out), None
    return None, writable_folder(out)
