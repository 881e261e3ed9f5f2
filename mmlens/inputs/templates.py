"""The text around a question: the prompt, with one `<image>` per image.

Public names: `fill_template`, `ChatTemplate`, `Template`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from mmlens.inputs.spans import PLACEHOLDER

__all__ = ["QUESTION", "ChatTemplate", "Template", "fill_template"]

QUESTION = "{question}"
Phrase = str | tuple[int, int]
Template = str | Callable[[str, int], str] | None
"""A text with `{question}`, a function of (question, number of images), or None for nothing."""


class ChatTemplate(str):
    """A checkpoint's chat template, written out for one question.

    The text itself is the prompt with one image, or with none for a language model.
    """

    render: Callable[[int], str]
    """The prompt with any number of images, from transformers' `apply_chat_template`."""
    adds_special_tokens: bool
    """Whether the tokenizer adds its special tokens to the prompt: transformers' processors do so
    unless it begins with BOS, a tokenizer's own `apply_chat_template` never does."""
    strips: tuple[bool, bool]
    """Whether white space in front of the question is removed, and after it."""

    @classmethod
    def of(
        cls,
        render: Callable[[int], str],
        n_images: int,
        *,
        adds_special_tokens: bool,
        strips: tuple[bool, bool],
    ) -> ChatTemplate:
        """Make a template of its renderings; its own text is that with `n_images`."""
        made = cls(render(n_images))
        made.render, made.adds_special_tokens, made.strips = render, adds_special_tokens, strips
        return made

    def asked(self, question: str, phrases: Mapping[str, Phrase]) -> tuple[str, dict[str, Phrase]]:
        """Return the question as the template writes it, and phrases of it by their characters."""
        asked = question.lstrip() if self.strips[0] else question
        first = len(question) - len(asked)
        asked = asked.rstrip() if self.strips[1] else asked
        moved = dict(phrases)
        for name, phrase in phrases.items():
            if not isinstance(phrase, str) and 0 <= phrase[0] < phrase[1] <= len(question):
                start, end = (min(max(at - first, 0), len(asked)) for at in phrase)
                moved[name] = start, end
        return asked, moved


def fill_template(
    template: Template, question: str, n_images: int, *, optional_images: bool = False
) -> tuple[str, tuple[int, int]]:
    """Return the prompt with one `<image>` for each image, and the question's characters in it.

    Args:
        template: as in `prepare`, but not "auto".
        question: put in as it is, braces and all.
        n_images: how many `<image>` there must be in the end.
        optional_images: without images, leave out the template's `<image>` and a line break
            after it.

    Raises:
        ValueError: no `{question}` in the template, `<image>` in both template and question, or
            another number of them than of images.
    """
    in_question = question.count(PLACEHOLDER)
    if isinstance(template, ChatTemplate):
        template = template.render(0 if in_question else n_images)
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
        template = without_images(template)
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


def with_image_text(
    prompt: str, question: tuple[int, int], phrases: Mapping[str, Phrase], image_text: str
) -> tuple[str, tuple[int, int], dict[str, Phrase]]:
    """Return a prompt in which an image's text stands for each `<image>`, and where parts are then.

    One that has its text around it already stays: so the text of inputs is a prompt, too.

    Args:
        prompt: with one `<image>` for each image.
        question: the question's characters.
        phrases: of the question, by their words or by their characters in it.
        image_text: as `MultimodalConfig.image_text`.
    """
    if image_text == PLACEHOLDER:
        return prompt, question, dict(phrases)
    more, begin = len(image_text) - len(PLACEHOLDER), question[0]
    either = re.compile(f"{re.escape(image_text)}|{PLACEHOLDER}")
    bare = [each.end() for each in either.finditer(prompt) if each[0] == PLACEHOLDER]

    def moved(at: int) -> int:
        """Where a character of the prompt is then."""
        return at + more * sum(end <= at for end in bare)

    there = moved(begin), moved(question[1])
    found = {
        name: phrase
        if isinstance(phrase, str)
        else (moved(begin + phrase[0]) - there[0], moved(begin + phrase[1]) - there[0])
        for name, phrase in phrases.items()
    }
    return either.sub(lambda each: image_text, prompt), there, found


def without_images(prompt: str, image_text: str = PLACEHOLDER) -> str:
    """Return a prompt without its images: without `<image>`, its text, and a line break after it.

    Args:
        prompt: as in `MultimodalInputs.texts`.
        image_text: as `MultimodalConfig.image_text`.
    """
    alone = prompt.replace(image_text, PLACEHOLDER)
    return alone.replace(PLACEHOLDER + "\n", "").replace(PLACEHOLDER, "")
