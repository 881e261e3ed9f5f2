"""Corrupted words: what the clean run is compared with in causal tracing.

`swap_span` is the paper's, `noise_span` language-model tracing's, and it hits images, too. What
changes images themselves stands in `mmlens.analyses.image_corruptions` and can be imported from
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmlens.analyses.image_corruptions import (
    blur_image,
    check_no_noise,
    check_samples,
    mean_image,
    noise_image,
    swap_image,
)
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.spans import token_strings, tokens_of_replacement
from mmlens.utils.grad_mode import without_gradients

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["blur_image", "mean_image", "noise_image", "noise_span", "swap_image", "swap_span"]


def swap_span(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    span: str,
    replacement: str | int = "Paris",
    *,
    pad: bool = True,
) -> MultimodalInputs:
    """The paper's corruption: other words where the constraint was, so that the image is ignored.

    Every token of the span becomes the first token of `replacement`; the length is kept, so that
    positions mean the same in both runs (MultiModalCausalTrace, Basu et al. 2024; in the released
    scripts the default word is "Paris").

    Args:
        span: name of a span of the inputs, a single prompt.
        replacement: a word, tokenised where it will stand, or a token id.
        pad: False takes the whole replacement, which must be as many tokens as the span.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch; a span of visual tokens; the replacement is empty or no token, or with
            `pad=False` has another length.

    Example:
        >>> corrupted = swap_span(model, inputs, "constraint", "Paris")
    """
    check_one_prompt(len(inputs), "swap_span")
    positions = inputs.span(span)
    if bool(inputs.is_image[0, positions].any()):
        raise ValueError(f"the span {span!r} holds visual tokens; only words can be swapped")
    new = replacement_tokens(model, inputs, span, replacement)
    if not pad and len(new) != len(positions):
        raise ValueError(
            f"{replacement!r} is {len(new)} tokens, the span {span!r} {len(positions)}; with "
            "pad=False they must be as many (pad=True repeats the first token)"
        )
    tokens = inputs.tokens.clone()
    ids = new[:1] * len(positions) if pad else new
    tokens[0, positions] = torch.tensor(ids, device=tokens.device)
    strings = None
    if inputs.str_tokens is not None:
        strings = list(inputs.str_tokens[0])
        known = model.tokenizer is not None
        words = token_strings(model.tokenizer, ids) if known else [f"[{i}]" for i in ids]
        for position, word in zip(positions.tolist(), words, strict=True):
            strings[position] = word
    # The words that texts and char_spans describe are gone.
    return replace(
        inputs,
        tokens=tokens,
        str_tokens=None if strings is None else (strings,),
        texts=None,
        char_spans=None,
    )


def replacement_tokens(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, span: str, replacement: str | int
) -> list[int]:
    """Token ids of what replaces a span: its first token first, as it is where it will stand."""
    if isinstance(replacement, str):
        if inputs.texts is None or inputs.char_spans is None or span not in inputs.char_spans[0]:
            raise ValueError(
                f"the text of the span {span!r} is not known (inputs from tokens, or swapped "
                "before); give the replacement as a token id"
            )
        return tokens_of_replacement(
            model.tokenizer, inputs.texts[0], inputs.char_spans[0][span], replacement
        )
    if not 0 <= replacement < model.cfg.d_vocab or replacement == model.cfg.image_token_id:
        raise ValueError(
            f"replacement={replacement} is no word: token ids are 0 ... {model.cfg.d_vocab - 1}, "
            f"and {model.cfg.image_token_id} is the image token"
        )
    return [replacement]


@without_gradients
def noise_span(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    span: str | Sequence[str],
    *,
    multiple: float = 3.0,
    std: float | None = None,
    samples: int = 10,
    seed: int = 0,
) -> MultimodalInputs:
    """The language-model corruption: Gaussian noise on the embeddings of spans (ROME, 2022).

    The noise is added where the visual tokens are in place already, so it can hit text, images
    or both; of images also what they add in the first blocks (deepstack), each part in units of
    its own. Runs on the result have one row per sample; `causal_trace` averages over them.

    Args:
        span: one span of a single prompt, or several ("constraint", "image").
        multiple: standard deviation of the noise, in units of `std`.
        std: by default the embeddings' own, as they enter the first layer: that of all token
            embeddings for text positions, that of the prompt's visual tokens for visual ones. (ROME
            takes that of the tokens of its data set's subjects, which is
            `model.W_E[tokens].std() * model.cfg.embed_scale`.)
        samples: how many draws.
        seed: of the draws.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch, inputs that have noise already, no samples, a `multiple` or `std`
            that is negative, infinite or NaN.

    Example:
        >>> corrupted = noise_span(model, inputs, ["constraint", "image"], samples=5)
    """
    inputs = model.to_inputs(inputs)
    check_one_prompt(len(inputs), "noise_span")
    check_no_noise(inputs)
    check_samples(samples, multiple)
    if std is not None and not 0 <= std < math.inf:
        raise ValueError(f"std={std}; it is 0 or more, and no infinity")
    names = [span] if isinstance(span, str) else list(span)
    hit = torch.cat([inputs.span(name) for name in names]).unique()
    visual = inputs.is_image[0]
    # Of an image's tokens, and of what it adds in the first blocks: the noise has parts of each.
    parts = 1 + model.cfg.n_deepstack * bool(visual[hit].any())
    unit = torch.zeros(parts, inputs.n_pos, device=inputs.device)
    if std is not None:
        unit[0], unit[:, visual] = std, std
    else:
        # Noise is added to what the embedding returns, which multiplies its rows by a scale.
        unit[0, ~visual] = model.W_E.float().std() * model.cfg.embed_scale
        if bool(visual[hit].any()):
            found = model.all_embeddings(inputs)[0, visual].float()
            unit[:, visual] = found.unflatten(1, (parts, -1)).std(dim=(0, 2))[:, None]
    chosen = torch.zeros_like(unit)
    chosen[:, hit] = multiple * unit[:, hit]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, inputs.n_pos, parts * model.cfg.d_model, generator=generator)
    scaled = drawn.to(inputs.device).unflatten(2, (parts, -1)) * chosen.T[None, :, :, None]
    return replace(inputs, noise=scaled.flatten(2))
