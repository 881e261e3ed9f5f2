"""What one edit is to do: which prompt is to be answered with what.

    request = EditRequest(inputs, "Rome", key_prompts=augmented(inputs, 4),
                          neighbours=[other_question, other_image])

Every editing method takes one request or several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.spans import PLACEHOLDER
from mmlens.inputs.templates import fill_template, with_image_text, without_images
from mmlens.interventions.hook_function import generator_for

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["EditRequest", "as_requests", "augmented"]


@dataclass(frozen=True, eq=False)
class EditRequest:
    """A prompt and the answer that it is to get.

    Raises:
        UnknownSpanError: (a KeyError) a prompt that has no such span.
        ValueError: a batch, noise, a span without positions, or an empty target.

    Example:
        >>> inputs = model.prepare("The capital of this country is the city of", flag,
        ...                        spans={"constraint": "this country"})
        >>> edit = multedit(model, EditRequest(inputs, "Rome"), layer=3)
    """

    inputs: MultimodalInputs
    """One prompt; with an image, or without one."""
    target: str | int
    """The new answer as it would follow the prompt, of any number of tokens; or a token id."""
    _: KW_ONLY
    span: str = "constraint"
    """The span whose last token is the key's position."""
    key_prompts: Sequence[MultimodalInputs] = ()
    """Further prompts that are to get the same answer: other wordings, other images of the same
    thing, `augmented` ones. They have the span as well."""
    neighbours: Sequence[MultimodalInputs] = ()
    """Prompts whose answers are to stay: other questions about the image, the same question about
    another one."""
    subject: str = ""
    """What the image shows, in words ("Italy"), where it is known: then methods can make the same
    question without the image, which has the subject in the place of the span (`written`)."""

    def __post_init__(self) -> None:
        if self.target == "":
            raise ValueError("the target is empty; give the new answer")
        for inputs in (*self.prompts, *self.neighbours):
            check_one_prompt(len(inputs), "EditRequest")
            if inputs.noise is not None:
                raise ValueError("an edit is of a prompt without noise")
        for inputs in self.prompts:
            self.position(inputs)

    @property
    def prompts(self) -> tuple[MultimodalInputs, ...]:
        """All prompts that are to get the answer; the first is the request's own."""
        return (self.inputs, *self.key_prompts)

    def position(self, inputs: MultimodalInputs) -> int:
        """Where the key is in one of the prompts: the last token of the span."""
        positions = inputs.span(self.span).tolist()
        if not positions:
            raise ValueError(f"the span {self.span!r} has no positions, so it has no last token")
        return max(positions)

    def written(self, model: HookedMultimodalTransformer) -> MultimodalInputs | None:
        """Return the question in words alone, with the subject in the place of the span.

        It is a key prompt of `multedit`, so that the written question gets the new answer, too.
        None where there is no subject or no image, or where the words of the prompt are not known.

        Args:
            model: for its tokenizer.
        """
        inputs = self.inputs
        if not (self.subject and inputs.texts and inputs.char_spans and any(inputs.n_images)):
            return None
        chars = inputs.char_spans[0]
        if self.span not in chars:
            return None
        text, (start, end) = inputs.texts[0], chars[self.span]
        first = text[start].isupper()
        name = self.subject[0].upper() + self.subject[1:] if first else self.subject
        template: str | None = None
        begin, stop = 0, len(text)
        if is_of_template(model, inputs) and within(chars[self.span], chars["question"]):
            template, (begin, stop) = "auto", chars["question"]
        image_text = model.cfg.image_text
        before, after = (
            without_images(part, image_text) for part in (text[begin:start], text[end:stop])
        )
        return model.prepare(
            before + name + after,
            spans={self.span: (len(before), len(before) + len(name))},
            template=template,
            prepend_bos=begins_with_bos(inputs) if template else "bos" in inputs.spans[0],
        )

    def described(self) -> dict[str, str | int]:
        """Prompt, target and span, for an edit's metadata."""
        prompt = self.inputs.texts[0] if self.inputs.texts else ""
        return {"prompt": prompt, "target": self.target, "span": self.span}


def within(span: tuple[int, int], whole: tuple[int, int]) -> bool:
    """Return whether characters are among others."""
    return whole[0] <= span[0] and span[1] <= whole[1]


def is_of_template(model: HookedMultimodalTransformer, inputs: MultimodalInputs) -> bool:
    """Return whether a prompt is the model's own template around its question, and no more."""
    chars = inputs.char_spans[0] if inputs.char_spans else {}
    template, text = model.cfg.default_template, inputs.texts[0] if inputs.texts else ""
    if template is None or "question" not in chars:
        return False
    asked = text[slice(*chars["question"])]
    if PLACEHOLDER in asked:
        return False
    prompt, there = fill_template(template, asked, inputs.n_images[0], optional_images=True)
    return (text, chars["question"]) == with_image_text(prompt, there, {}, model.cfg.image_text)[:2]


def begins_with_bos(inputs: MultimodalInputs) -> bool:
    """Return whether a prompt begins with BOS, which PaliGemma's have after their images."""
    at = [int(each) for each in inputs.spans[0].get("bos", [])]
    return at[:1] == [int(inputs.attention_mask[0].long().argmax())]


def as_requests(
    given: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None,
    subject: str = "",
) -> list[EditRequest]:
    """What an editing method was given, as a list of requests.

    Inputs alone have their key at the span "constraint", or at their last token.

    Raises:
        ValueError: inputs without a target, requests with one beside their own, or none at all.
    """
    if isinstance(given, MultimodalInputs):
        if target is None:
            raise ValueError("inputs alone do not say what to edit: give the target, too")
        span = "constraint" if "constraint" in given.spans[0] else "last"
        return [EditRequest(given, target, span=span, subject=subject)]
    if subject:
        raise ValueError(f"subject={subject!r}, but requests hold their own subjects")
    if target is not None:
        raise ValueError(f"target={target!r}, but requests hold their own targets")
    requests = [given] if isinstance(given, EditRequest) else list(given)
    if not requests:
        raise ValueError("no requests: there is nothing to edit")
    return requests


def augmented(
    inputs: MultimodalInputs, n: int, *, crop: float = 0.1, light: float = 0.1, seed: int = 0
) -> list[MultimodalInputs]:
    """The same prompt with its images changed a little, `n` times.

    Each image loses a random margin, at most `crop` of its height and width in all, and is
    resized to what it was; its pixel values are scaled by up to 1 +- `light`.

    Raises:
        ValueError: there is no image, or a margin that leaves nothing.
    """
    pixels = inputs.pixel_values
    if pixels is None:
        raise ValueError("there is no image to change in these inputs")
    if not 0 <= crop < 1:
        raise ValueError(f"crop={crop}; it is a share of the image, from 0 to below 1")
    return [
        inputs.with_pixels(
            torch.stack(
                [
                    varied_image(each, crop, light, generator_for(seed, sample, index))
                    for index, each in enumerate(pixels)
                ]
            )
        )
        for sample in range(n)
    ]


def varied_image(image: Tensor, crop: float, light: float, chance: torch.Generator) -> Tensor:
    """One image [channel, height, width] without a random margin, and lighter or darker."""
    height, width = image.shape[1:]
    drawn = torch.rand(5, generator=chance).tolist()
    lost = (round(drawn[0] * crop * height), round(drawn[1] * crop * width))
    top, left = (round(share * n) for share, n in zip(drawn[2:4], lost, strict=True))
    part = image[:, top : top + height - lost[0], left : left + width - lost[1]]
    part = F.interpolate(part[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    return (part * (1 + light * (2 * drawn[4] - 1))).to(image)


def how_made(
    method: str, requests: Sequence[EditRequest], layer: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """An edit's metadata: what it was to do, and how that was done."""
    targets = [request.target for request in requests]
    return {
        "method": method,
        "target": targets if len(targets) > 1 else targets[0],
        "layer": layer,
        "settings": dict(settings),
        "requests": [request.described() for request in requests],
    }
