r"""Questions and pictures -> `MultimodalInputs`: what `model.prepare` does.

    prepare(tokenizer, image_processor, cfg, "What is the capital of this country?", flag,
            spans={"constraint": "this country"},
            template="<image>\nUSER: {question} Answer in a few words.\nASSISTANT:")

A prompt is text with one `<image>` per picture. It is tokenised as such, with character offsets,
and then every `<image>` token becomes as many as the picture has visual tokens; spans are found in
the text and move with the tokens.

Public names: `prepare`, `inputs_from_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mmlens.images import as_image_processor, load_images
from mmlens.inputs import MultimodalInputs, collate
from mmlens.layout import check_span_name, standard_spans
from mmlens.spans import (
    PLACEHOLDER,
    EncodedText,
    SpanNotFoundError,
    encode,
    find_span,
    token_strings,
)
from mmlens.templates import Template, fill_template

if TYPE_CHECKING:
    from mmlens.config import MultimodalConfig
else:
    MultimodalConfig = Any  # anything with image_token_id, bos_token_id and vision will do

__all__ = ["inputs_from_tokens", "prepare"]

T = TypeVar("T")
Phrase = str | tuple[int, int]
Spans = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None


def prepare(
    tokenizer: Any,
    image_processor: Any,
    cfg: MultimodalConfig,
    text: str | Sequence[str],
    image: Any = None,
    *,
    spans: Spans = None,
    template: Template = "auto",
    default_template: Template = None,
    prepend_bos: bool = True,
    device: torch.device | str | None = None,
) -> MultimodalInputs:
    """Tokens, pixels and named positions of one question or a batch of them.

    Args:
        tokenizer: a fast Hugging Face tokenizer that knows `<image>` as one special token.
        image_processor: transformers', open_clip's, or any `mmlens.images.ImageProcessor`.
        cfg: the model's.
        text: a question, or a list of them: a batch, padded on the left. Without `<image>` in it
            or in the template, its pictures come in front of the prompt.
        image: the pictures. For one text: None, one or a list; for a list of texts a list with
            None, one or a list for each. What one is: see `mmlens.images.load_image`.
        spans: names for phrases of the text, `{"constraint": "this country"}`, or for characters
            of it (start, end); for a batch also a list of such. A phrase that the question does
            not hold may be in the template. `question` names the whole text by itself. A span
            holds text only, no visual tokens.
        template: what stands around the question. A text with `{question}` and, if the pictures
            have their place in it, `<image>` (once for all of them or once each); a function of
            (question, number of images) that gives the prompt; None for BOS, pictures, the text as
            it is; "auto" for `default_template`.
        default_template: the model's own; an `<image>` in it counts only when there is a picture.
        prepend_bos: begin with the tokenizer's BOS, if it has one and the prompt does not begin
            with it already.
        device: where the tensors go.

    Raises:
        ValueError: no tokenizer or image processor, pictures for a model that sees none, another
            number of `<image>` than of pictures, a list of the wrong length, a reserved span name.
        SpanNotFoundError: (a ValueError) a phrase that is not in the text.
    """
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer (its folder has no tokenizer.json), so it cannot take "
            "text: put the file there, set model.tokenizer, or use inputs_from_tokens"
        )
    automatic = template == "auto"
    if automatic:
        template = default_template
    rows = []
    for question, pictures, phrases in _rows(text, image, spans):
        images = load_images(pictures)
        prompt, at = fill_template(template, question, len(images), optional_images=automatic)
        rows.append(
            _prepare_row(tokenizer, image_processor, cfg, prompt, at, images, phrases, prepend_bos)
        )
    inputs = rows[0] if len(rows) == 1 else collate(rows, _pad_token_id(tokenizer, cfg))
    return inputs if device is None else inputs.to(device)


def _rows(
    text: str | Sequence[str], image: Any, spans: Spans
) -> list[tuple[str, Any, Mapping[str, Phrase]]]:
    """Texts, pictures and spans of each row of the batch."""
    if isinstance(text, str):
        one = spans if isinstance(spans, Mapping | None) else _one_each("spans", spans, 1)[0]
        return [(text, image, one or {})]
    if not text:
        raise ValueError("the list of texts is empty")
    n = len(text)
    images = [None] * n if image is None else _one_each("image", image, n)
    if spans is None or isinstance(spans, Mapping):
        spans = [spans] * n
    phrases = [row or {} for row in _one_each("spans", spans, n)]
    return list(zip(text, images, phrases, strict=True))


def _one_each(name: str, values: Any, n: int) -> Sequence[Any]:
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"for a list of {n} text(s), {name} must be a list with one entry for each (None where "
            f"there is nothing), not {type(values).__name__}"
        )
    if len(values) != n:
        raise ValueError(
            f"{n} text(s), but {name} has {len(values)} entries: give one for each text (None "
            f"where there is nothing; a list for several images of one text)"
        )
    return values


def _prepare_row(
    tokenizer: Any,
    image_processor: Any,
    cfg: MultimodalConfig,
    prompt: str,
    question: tuple[int, int],
    images: tuple[Image.Image, ...],
    phrases: Mapping[str, Phrase],
    prepend_bos: bool,
) -> MultimodalInputs:
    if images and cfg.vision is None:
        raise ValueError(
            f"{len(images)} image(s) for a language model that sees none (cfg.vision is None)"
        )
    encoded = encode(tokenizer, prompt)
    _check_image_token(tokenizer, encoded, cfg.image_token_id, len(images))
    n_visual = 0 if cfg.vision is None else cfg.vision.n_visual_tokens
    bos = tokenizer.bos_token_id if prepend_bos else None
    added = [bos] if bos is not None and encoded.ids[:1] != [bos] else []
    if not added and not encoded.ids:
        raise ValueError("the prompt is empty: no text, no image, and the tokenizer has no BOS")
    ids = added + encoded.ids
    repeats = [n_visual if token == cfg.image_token_id else 1 for token in ids]
    tokens = torch.tensor([_repeated(ids, repeats)])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    chars = _char_spans(prompt, question, phrases)
    starts = list(accumulate(repeats, initial=0))[len(added) :]
    (standard,) = standard_spans(
        tokens,
        mask,
        image_token_id=cfg.image_token_id,
        n_visual_tokens=n_visual,
        bos_token_id=tokenizer.bos_token_id,
    )
    return MultimodalInputs(
        tokens=tokens,
        attention_mask=mask,
        pixel_values=_pixel_values(image_processor, images, cfg),
        spans=(standard | _text_spans(encoded, starts, chars, cfg.image_token_id),),
        grid_size=None if cfg.vision is None else cfg.vision.grid,
        n_visual_tokens=n_visual,
        image_token_id=cfg.image_token_id,
        str_tokens=(_repeated(token_strings(tokenizer, ids), repeats),),
        texts=(prompt,),
        char_spans=(chars,),
        images=images or None,
    )


def _repeated(values: Sequence[T], repeats: Sequence[int]) -> list[T]:
    return [value for value, n in zip(values, repeats, strict=True) for _ in range(n)]


def _text_spans(
    encoded: EncodedText,
    starts: Sequence[int],
    chars: Mapping[str, tuple[int, int]],
    image_token_id: int | None,
) -> dict[str, Tensor]:
    """Positions of spans of characters; `starts` is where each token of the prompt begins."""
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


def _check_image_token(
    tokenizer: Any, encoded: EncodedText, image_token_id: int | None, n_images: int
) -> None:
    found = 0 if image_token_id is None else encoded.ids.count(image_token_id)
    if found != n_images:
        pieces = tokenizer.tokenize(PLACEHOLDER)
        raise ValueError(
            f"{n_images} image(s), but {found} token(s) with the image token's id {image_token_id}:"
            f" the tokenizer must know {PLACEHOLDER} as one special token with that id, and makes "
            f"{pieces} = {tokenizer.convert_tokens_to_ids(pieces)} of it"
        )


def _char_spans(
    prompt: str, question: tuple[int, int], phrases: Mapping[str, Phrase]
) -> dict[str, tuple[int, int]]:
    """Characters of the question and of every phrase; the question is searched first."""
    begin, end = question
    asked = prompt[begin:end].replace(PLACEHOLDER, "")
    chars = {"question": question} if asked.strip() else {}
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


def _pixel_values(
    image_processor: Any, images: tuple[Image.Image, ...], cfg: MultimodalConfig
) -> Float[Tensor, "image channel height width"] | None:
    if not images:
        return None
    if image_processor is None:
        raise ValueError(
            "the model has no image processor (its folder has no preprocessor_config.json), so it "
            "cannot take pictures: put the file there, set model.image_processor, or give "
            "pixel_values to inputs_from_tokens"
        )
    pixel_values = as_image_processor(image_processor)(list(images))
    _check_pixels(pixel_values, cfg)
    return pixel_values


def _check_pixels(
    pixel_values: Tensor, cfg: MultimodalConfig, any_size: bool = False
) -> tuple[int, int]:
    """Rows and columns of patches; another size than the config's only where it is allowed.

    The tower interpolates its positions for another size, so whole patches are all it needs.
    """
    if cfg.vision is None:
        raise ValueError("pixel values for a language model that sees none (cfg.vision is None)")
    patch = cfg.vision.patch_size
    channels, height, width = (getattr(cfg.vision, "n_channels", 3), *cfg.vision.image_size)
    shape = tuple(pixel_values.shape)
    whole = len(shape) == 4 and shape[2] % patch == 0 and shape[3] % patch == 0
    fits = shape[1:] == (channels, height, width) or (any_size and whole and shape[1] == channels)
    if len(shape) != 4 or not fits:
        others = f", or other sides that are multiples of {patch}" if any_size else ""
        raise ValueError(
            f"pixel values have shape {shape}, but this model takes [image, {channels}, {height}, "
            f"{width}] (image, channel, height, width){others}"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel values are {pixel_values.dtype}: give the floats that the image processor makes"
        )
    return shape[2] // patch, shape[3] // patch


def _pad_token_id(tokenizer: Any, cfg: MultimodalConfig) -> int:
    """Any id will do under the mask; Hugging Face's is taken where there is one."""
    choices = (tokenizer.pad_token_id, getattr(cfg, "pad_token_id", None), tokenizer.eos_token_id)
    return next((int(token) for token in choices if token is not None), 0)


def inputs_from_tokens(
    cfg: MultimodalConfig,
    tokens: Int[Tensor, "*batch pos"],
    pixel_values: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    spans: Spans = None,
    tokenizer: Any = None,
) -> MultimodalInputs:
    """The same object from ready token ids, as Hugging Face's processors give them.

    Args:
        cfg: the model's.
        tokens: one id per position, the image token's at every visual token; one row may come
            without a batch dimension.
        pixel_values: all images in reading order, `[image, channel, height, width]`. Of another
            size than the config's they have another number of patches, and the tower interpolates
            its positions.
        attention_mask: 0 or False at the padding, which must be on the left; None if there is none.
        spans: names for positions, `{"constraint": [590, 591]}`; for a batch also a list of such.
            Positions count from the beginning of the padded row.
        tokenizer: for `str_tokens`, if there is one.

    Raises:
        ValueError: everything that does not fit: image tokens and images, ids outside of the
            vocabulary, a mask of another shape or with padding elsewhere, positions outside.
    """
    if tokens.ndim not in (1, 2):
        raise ValueError(f"tokens must be [batch, pos] or [pos], not {tuple(tokens.shape)}")
    tokens = tokens.reshape(-1, tokens.shape[-1]).long()
    if attention_mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    else:
        mask = attention_mask.bool()
        mask = mask[None] if mask.ndim == 1 else mask
    _check_vocabulary(tokens, cfg)
    grid, n_visual = None, 0
    if cfg.vision is not None:
        grid, n_visual = cfg.vision.grid, cfg.vision.n_visual_tokens
    if pixel_values is not None:
        config_patches = math.prod(grid or ())
        grid = _check_pixels(pixel_values, cfg, any_size=True)
        n_visual += math.prod(grid) - config_patches
    bare = MultimodalInputs(
        tokens=tokens,
        attention_mask=mask,
        pixel_values=pixel_values,
        spans=({},) * len(tokens),
        grid_size=grid,
        n_visual_tokens=n_visual,
        image_token_id=cfg.image_token_id,
    )
    return _named(bare, cfg.bos_token_id, spans, tokenizer)


def _named(
    bare: MultimodalInputs, bos_token_id: int | None, spans: Spans, tokenizer: Any
) -> MultimodalInputs:
    """Checked inputs with the standard spans, the user's, and the text of each token."""
    rows = standard_spans(
        bare.tokens,
        bare.attention_mask,
        image_token_id=bare.image_token_id,
        n_visual_tokens=bare.n_visual_tokens,
        bos_token_id=bos_token_id,
    )
    if spans is None or isinstance(spans, Mapping):
        spans = [spans] * len(bare)
    for row, named in zip(rows, _one_each("spans", spans, len(bare)), strict=True):
        for name, positions in (named or {}).items():
            check_span_name(name)
            row[name] = _positions(name, positions, bare.device)
    strings = None
    if tokenizer is not None:
        strings = tuple(token_strings(tokenizer, row) for row in bare.tokens.tolist())
    return replace(bare, spans=rows, str_tokens=strings)


def _positions(name: str, positions: Any, device: torch.device) -> Tensor:
    """Positions as an ascending LongTensor."""
    values = torch.as_tensor(list(positions) if isinstance(positions, range) else positions)
    if values.is_floating_point() or values.dtype == torch.bool or not values.numel():
        raise ValueError(f"span {name!r} must be positions (integers), not {positions!r}")
    return values.flatten().long().unique().to(device)


def _check_vocabulary(tokens: Tensor, cfg: MultimodalConfig) -> None:
    d_vocab = getattr(cfg, "d_vocab", None)
    words = tokens if cfg.image_token_id is None else tokens[tokens != cfg.image_token_id]
    if d_vocab is None or not words.numel():
        return
    low, high = int(words.min()), int(words.max())
    if low < 0 or high >= d_vocab:
        raise ValueError(
            f"tokens go from {low} to {high}, but this model's ids are 0 ... {d_vocab - 1}, and "
            f"{cfg.image_token_id} for a visual token"
        )
