"""What `mmlens contributions` and `mmlens knockout` share: a prompt, and two spans of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmlens.cli import options, trace
from mmlens.cli.errors import UserError, explained

if TYPE_CHECKING:
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer

#: what ``--from`` and ``--to`` may name; anything else is words of the question
NAMES = ("image", "constraint", "question", "last", "text", "bos")


def check_spans(
    question: str, source: str, destination: str, constraint: str | None, template: str
) -> dict[str, str]:
    """The phrases that have to be found in the prompt, by the name of their span.

    Raises:
        UserError: words that are not in the question, or a constraint that was not given.
    """
    phrases = {}
    if constraint is not None:
        options.check_phrase(question, constraint, template)
        phrases["constraint"] = constraint
    for option, words in (("--from", source), ("--to", destination)):
        if words == "constraint" and constraint is None:
            raise UserError(f"{option} constraint needs --constraint with the words of it")
        if words not in NAMES:
            options.check_phrase(question, words, template, option)
            phrases[words] = words
    return phrases


def open_prompt(
    image: Path,
    question: str,
    phrases: dict[str, str],
    template: str,
    model: str,
    device: str | None,
    dtype: str | None,
) -> tuple[HookedMultimodalTransformer, MultimodalInputs]:
    """The model and the prompt, with the phrases as spans.

    Raises:
        UserError: the model or the picture cannot be read.
    """
    loaded = trace.open_model(model, device, dtype)
    with explained():
        inputs = loaded.prepare(
            question, str(image), spans=phrases, template=options.template_of(template)
        )
    return loaded, inputs
