"""What stands around a question: the prompt, with one `<image>` per picture.

Public names: `fill_template`, `Template`.
"""

from __future__ import annotations

from collections.abc import Callable

from mmlens.spans import PLACEHOLDER

__all__ = ["Template", "fill_template"]

QUESTION = "{question}"
Template = str | Callable[[str, int], str] | None
"""A text with `{question}`, a function of (question, number of images), or None for nothing."""


def fill_template(
    template: Template, question: str, n_images: int, *, optional_images: bool = False
) -> tuple[str, tuple[int, int]]:
    """The prompt, with one `<image>` for each image, and the characters where the question stands.

    Args:
        template: as in `prepare`, but not "auto".
        question: put in as it is, braces and all.
        n_images: how many `<image>` there must be in the end.
        optional_images: without images, leave out the template's `<image>` and a line break
            behind it.

    Raises:
        ValueError: no `{question}` in the template, `<image>` in both template and question, or
            another number of them than of images.
    """
    in_question = question.count(PLACEHOLDER)
    if callable(template):
        template = template(QUESTION, 0 if in_question else n_images)
    if template is None:
        template = QUESTION
    if template.count(QUESTION) != 1:
        raise ValueError(
            f"a template must have {QUESTION} in it exactly once, not {template.count(QUESTION)} "
            f"times: {template!r}"
        )
    in_template = template.count(PLACEHOLDER)
    if in_template and in_question:
        raise ValueError(
            f"both the text and the template say where the images belong: take {PLACEHOLDER} out "
            f"of the text {question!r} or out of the template {template!r}; if the text is a whole "
            f"prompt, use template=None"
        )
    if n_images == 0 and optional_images:
        template = template.replace(PLACEHOLDER + "\n", "").replace(PLACEHOLDER, "")
    elif in_template == 1 and n_images:
        template = template.replace(PLACEHOLDER, PLACEHOLDER * n_images)
    elif not in_template and not in_question:
        template = PLACEHOLDER * n_images + template
    before, _, after = template.partition(QUESTION)
    prompt = before + question + after
    if prompt.count(PLACEHOLDER) != n_images:
        raise ValueError(
            f"{prompt.count(PLACEHOLDER)} {PLACEHOLDER} placeholder(s) in the prompt, but "
            f"{n_images} image(s) were given: {prompt!r}. Give one image for each, or leave the "
            f"placeholders out (images then come in front of the text)"
        )
    return prompt, (len(before), len(before) + len(question))
