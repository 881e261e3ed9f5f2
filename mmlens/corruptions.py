"""Corrupted inputs: what the clean run is compared with in causal tracing.

- words: `swap_span` (the paper's), `noise_span` (language-model tracing's; also for pictures);
- pictures: `swap_image`, `blur_image`, `mean_image`, `noise_image`, each of them on pixels, and the
  first three on the visual tokens instead (`level="embeddings"`).

What is added to visual tokens travels in the inputs' `noise`, so everything that takes inputs takes
corrupted ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.images import as_image_processor, load_image
from mmlens.inputs import MultimodalInputs
from mmlens.layout import check_one_prompt
from mmlens.spans import token_strings, tokens_of_replacement

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

Level = Literal["pixels", "embeddings"]
Maps = Float[Tensor, "image channel row column"]


def swap_span(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    span: str,
    replacement: str | int = "Paris",
    *,
    pad: bool = True,
) -> MultimodalInputs:
    """The paper's corruption: other words where the constraint was, so that the picture is ignored.

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


@torch.no_grad()
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

    The noise is added where the visual tokens are in place already, so it can hit text, pictures
    or both. Runs on the result have one row per sample; `causal_trace` averages over them.

    Args:
        span: one span of a single prompt, or several ("constraint", "image").
        multiple: standard deviation of the noise, in units of `std`.
        std: by default the embeddings' own: that of all token embeddings for text positions, that
            of the prompt's visual tokens for visual ones. (ROME takes that of the tokens of its
            data set's subjects, `model.W_E[tokens].std()`.)
        samples: how many draws.
        seed: of the draws.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch, inputs that have noise already, no samples.

    Example:
        >>> corrupted = noise_span(model, inputs, ["constraint", "image"], samples=5)
    """
    inputs = model.to_inputs(inputs)
    check_one_prompt(len(inputs), "noise_span")
    check_no_noise(inputs)
    check_samples(samples)
    names = [span] if isinstance(span, str) else list(span)
    hit = torch.cat([inputs.span(name) for name in names]).unique()
    unit = torch.full((inputs.n_pos,), 0.0 if std is None else std, device=inputs.device)
    visual = inputs.is_image[0]
    if std is None:
        unit[~visual] = model.W_E.float().std()
        if bool(visual[hit].any()):
            unit[visual] = model.input_embeddings(inputs)[0, visual].float().std()
    chosen = torch.zeros_like(unit)
    chosen[hit] = multiple * unit[hit]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, inputs.n_pos, model.cfg.d_model, generator=generator)
    return replace(inputs, noise=drawn.to(inputs.device) * chosen[None, :, None])


def swap_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    image: Any,
    *,
    which: int = 0,
    level: Level = "pixels",
) -> MultimodalInputs:
    """Another picture in the place of one of the prompt's.

    Args:
        image: what `model.prepare` takes for a picture.
        which: of the prompt's pictures.
        level: "embeddings" leaves the vision tower's run as it is and exchanges the visual tokens;
            the decoder sees the same.

    Raises:
        ValueError: a batch, inputs without pictures or without that one, no image processor, a
            picture that cannot be read; with "embeddings", inputs that have noise already.

    Example:
        >>> corrupted = swap_image(model, clean, "another_flag.png")
    """
    chosen = chosen_images(inputs, which, "swap_image")
    inputs = model.to_inputs(inputs)
    if model.image_processor is None:
        raise ValueError("the model has no image processor, so it cannot take another picture")
    picture = load_image(image)
    pixels = as_pixels(inputs).clone()
    pixels[chosen] = as_image_processor(model.image_processor)([picture]).to(pixels)
    pictures = None
    if inputs.images is not None:
        pictures = tuple(
            picture if index in chosen else other for index, other in enumerate(inputs.images)
        )
    swapped = replace(inputs, pixel_values=pixels, images=pictures)
    return swapped if level == "pixels" else with_embeddings_of(model, inputs, [swapped])


def blur_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    sigma: float,
    *,
    which: int | None = None,
    level: Level = "pixels",
) -> MultimodalInputs:
    """Pictures without their details: a Gaussian blur (torchvision's).

    Args:
        sigma: of the Gaussian: in pixels of the model's input, or ("embeddings") in patches.
        which: of the prompt's pictures; None for all.
        level: "embeddings" blurs the visual tokens over the grid of patches; a class token stays.

    Raises:
        ValueError: sigma is not positive; otherwise as `swap_image`.

    Example:
        >>> corrupted = blur_image(model, clean, sigma=20)
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}; it must be positive")
    from torchvision.transforms.functional import gaussian_blur

    def blur(maps: Maps) -> Maps:
        # Reflected edges need a kernel that is no wider than the map on each side.
        radii = [min(math.ceil(3 * sigma), size - 1) for size in maps.shape[:1:-1]]
        return gaussian_blur(maps, [2 * radius + 1 for radius in radii], [sigma, sigma])

    return edit_images(model, inputs, blur, which, level, "blur_image")


def mean_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    *,
    which: int | None = None,
    level: Level = "pixels",
) -> MultimodalInputs:
    """Pictures of one colour, their own mean; or ("embeddings") patches that all are their mean.

    Arguments and errors as in `blur_image`.

    Example:
        >>> corrupted = mean_image(model, clean, level="embeddings")
    """

    def mean(maps: Maps) -> Maps:
        return maps.mean(dim=(2, 3), keepdim=True).expand_as(maps)

    return edit_images(model, inputs, mean, which, level, "mean_image")


@torch.no_grad()
def noise_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    *,
    multiple: float = 1.0,
    which: int | None = None,
    samples: int = 10,
    seed: int = 0,
) -> MultimodalInputs:
    """Gaussian noise on the pixels, as the vision tower sees it. (On visual tokens: `noise_span`.)

    Runs on the result have one row per sample, whose visual tokens are those of the noisy picture;
    `causal_trace` averages over them. The vision tower's own run stays clean.

    Args:
        multiple: standard deviation of the noise, in units of the pictures' own.
        which: of the prompt's pictures; None for all.
        samples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: a batch, inputs without pictures or with noise already, no samples.
    """
    inputs = model.to_inputs(inputs)
    chosen = chosen_images(inputs, which, "noise_image")
    check_samples(samples)
    clean = as_pixels(inputs)
    std = multiple * clean[chosen].float().std()
    generator = torch.Generator().manual_seed(seed)
    noisy = []
    for _ in range(samples):
        pixels = clean.clone()
        drawn = torch.randn(pixels[chosen].shape, generator=generator).to(pixels)
        pixels[chosen] += std.to(pixels) * drawn
        noisy.append(replace(inputs, pixel_values=pixels, images=None))
    return with_embeddings_of(model, inputs, noisy)


@torch.no_grad()
def edit_images(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    edit: Callable[[Maps], Maps],
    which: int | None,
    level: Level,
    name: str,
) -> MultimodalInputs:
    """Edit pixels, or visual tokens on their grid: both are maps [image, channel, row, column]."""
    inputs = model.to_inputs(inputs)
    chosen = chosen_images(inputs, which, name)
    if level == "pixels":
        pixels = as_pixels(inputs).clone()
        pixels[chosen] = edit(pixels[chosen])
        return replace(inputs, pixel_values=pixels, images=None)
    check_no_noise(inputs)
    rows, columns = inputs.grid_size or (0, 0)
    before = model.input_embeddings(inputs)[0]
    after = before.clone()
    for image in chosen:
        patches = inputs.patches((0, 0, rows, columns), image=image)
        tokens = before[patches].T.unflatten(1, (rows, columns))
        after[patches] = edit(tokens[None])[0].flatten(1).T
    return replace(inputs, noise=(after - before).float()[None])


@torch.no_grad()
def with_embeddings_of(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    others: Sequence[MultimodalInputs],
) -> MultimodalInputs:
    """The inputs, with a row for each of `others` that has the others' visual tokens."""
    check_no_noise(inputs)
    before = model.input_embeddings(inputs)
    after = torch.cat([model.input_embeddings(other) for other in others])
    return replace(inputs, noise=(after - before).float())


def as_pixels(inputs: MultimodalInputs) -> Float[Tensor, "image channel height width"]:
    """The pixel values; a ValueError where there are none."""
    if inputs.pixel_values is None:
        raise ValueError("these inputs have no picture")
    return inputs.pixel_values


def chosen_images(inputs: MultimodalInputs, which: int | None, name: str) -> list[int]:
    """The pictures that are corrupted, as indices of `pixel_values`.

    Raises:
        ValueError: a batch, no pictures, or not that one.
    """
    check_one_prompt(len(inputs), name)
    n_images = len(as_pixels(inputs))
    if which is None:
        return list(range(n_images))
    if not 0 <= which < n_images:
        raise ValueError(f"which={which}; the prompt has {n_images} picture(s), from 0")
    return [which]


def check_no_noise(inputs: MultimodalInputs) -> None:
    """Raise a ValueError where something is added to the embeddings already."""
    if inputs.noise is not None:
        raise ValueError(
            "these inputs have noise already; corrupt clean ones (noise_span takes several spans)"
        )


def check_samples(samples: int) -> None:
    """Raise a ValueError unless there is at least one."""
    if samples < 1:
        raise ValueError(f"samples={samples}; there must be at least 1")
