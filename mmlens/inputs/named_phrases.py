"""Where the phrases of a prompt stand: their characters, and the positions of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlens.inputs.checks import check_span_name
from mmlens.inputs.spans import PLACEHOLDER, EncodedText, SpanNotFoundError, find_span
from mmlens.inputs.templates import Phrase


def text_spans(
    encoded: EncodedText,
    starts: Sequence[int],
    chars: Mapping[str, tuple[int, int]],
    image_token_id: int | None,
) -> dict[str, Tensor]:
    """Return positions of spans of characters; `starts` is where each token begins."""
    spans = {}
    for name, (start, end) in chars.items():
        covered = [i for i in encoded.tokens_in(start, end) if encoded.ids[i] != image_token_id]
        if not covered:
            raise SpanNotFoundError(
                f"span {name!r} = {encoded.text[start:end]!r} (characters {start} to {end}) holds "
                f"no text token of {encoded.text!r}"
            )
        spans[name] = torch.tensor([starts[i] for i in covered])
    return spans


def check_image_token(
    tokenizer: Any, encoded: EncodedText, image_token_id: int | None, n_images: int
) -> None:
    """Raise a ValueError unless a prompt has one image token for each image."""
    found = 0 if image_token_id is None else encoded.ids.count(image_token_id)
    if found != n_images:
        pieces = tokenizer.tokenize(PLACEHOLDER)
        raise ValueError(
            f"{n_images} image(s), but {found} token(s) with the image token's id {image_token_id}:"
            f" the tokenizer must know {PLACEHOLDER} as one special token with that id, and makes "
            f"{pieces} = {tokenizer.convert_tokens_to_ids(pieces)} of it"
        )


def char_spans(
    encoded: EncodedText, question: tuple[int, int], phrases: Mapping[str, Phrase]
) -> dict[str, tuple[int, int]]:
    """Return characters of the question and of every phrase; the question is searched first."""
    prompt, (begin, end) = encoded.text, question
    asked = prompt[begin:end].replace(PLACEHOLDER, "")
    has_words = asked.strip() and encoded.tokens_in(begin, end)
    chars = {"question": question} if has_words else {}
    for name, phrase in phrases.items():
        check_span_name(name)
        if isinstance(phrase, str):
            try:
                chars[name] = find_span(prompt, phrase, within=question)
            except SpanNotFoundError:
                chars[name] = find_span(prompt, phrase)
            continue
        start, stop = phrase
        if not 0 <= start < stop <= end - begin:
            raise SpanNotFoundError(
                f"span {name!r} = characters ({start}, {stop}) are not in the text, which has "
                f"{end - begin}: {prompt[begin:end]!r}"
            )
        chars[name] = (begin + start, begin + stop)
    return chars


def span_positions(name: str, positions: Any, device: torch.device) -> Tensor:
    """Return positions as an ascending LongTensor."""
    values = torch.as_tensor(list(positions) if isinstance(positions, range) else positions)
    if values.is_floating_point() or values.dtype == torch.bool or not values.numel():
        raise ValueError(f"span {name!r} must be positions (integers), not {positions!r}")
    return values.flatten().long().unique().to(device)
