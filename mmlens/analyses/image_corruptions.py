"""Corrupted images: `swap_image`, `blur_image`, `mean_image`, `noise_image`.

Each of them changes the image itself, which goes through the model's processor again, so that it
holds for every family; the first three change the visual tokens instead where one asks for
`level="embeddings"`.

What is added to visual tokens travels in the inputs' `noise`, so everything that takes inputs takes
corrupted ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.image_tokens import check_same_cells
from mmlens.inputs.images import fitted, load_image
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.visual import Visual
from mmlens.model.components.norm import float32_or_wider
from mmlens.utils.grad_mode import without_gradients

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

Level = Literal["pixels", "embeddings"]
Maps = Float[Tensor, "image channel row column"]


def swap_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    image: Any,
    *,
    which: int = 0,
    level: Level = "pixels",
    fit: bool = False,
) -> MultimodalInputs:
    """Another image in the place of one of the prompt's.

    Args:
        image: what `model.prepare` takes for an image.
        which: of the prompt's images.
        level: "embeddings" leaves the vision tower's run as it is and exchanges the visual tokens;
            the decoder sees the same, to the rounding of float32.
        fit: bring the other image to this one's size first, so that both have the same patches in
            families whose number of visual tokens depends on the image.

    Raises:
        ValueError: a batch, inputs without images or without that one, no image processor, an
            image that cannot be read or that has other patches; with "embeddings", inputs that
            have noise already; with `fit`, inputs that do not hold the image.

    Example:
        >>> corrupted = swap_image(model, clean, "another_flag.png")
    """
    check_level(level)
    if which is None:
        raise ValueError("swap_image changes one image: which=0 is the prompt's first")
    (chosen,) = chosen_images(inputs, which, "swap_image")
    inputs = model.to_inputs(inputs)
    other = load_image(image)
    if fit:
        other = fitted(other, image_at(inputs, chosen, "fit=True").size)
    swapped = with_images(model, inputs, {chosen: other})
    return swapped if level == "pixels" else with_embeddings_of(model, inputs, [swapped])


def with_images(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    others: Mapping[int, Image.Image],
) -> MultimodalInputs:
    """A prompt with other images, through the model's processor.

    Raises:
        ValueError: no image processor, or an image that has other patches than the one before.
    """
    if model.image_processor is None:
        raise ValueError("the model has no image processor, so it cannot take another image")
    assert inputs.visual is not None  # it has images
    known = {i: image.image for i, image in enumerate(inputs.images) if image.image is not None}
    shown = {**known, **others}
    # How an image is seen may depend on how many there are: unknown ones have a substitute.
    substitute = next(iter(shown.values()))
    own = (inputs.images[i].image_processor for i in others)
    processed = model.processor.layout.processed(
        next((each for each in own if each is not None), model.image_processor),
        model.tokenizer,
        [shown.get(i, substitute) for i in range(len(inputs.images))],
    )
    visual, images = [inputs.visual.of([i]) for i in range(len(inputs.images))], [*inputs.images]
    for i, other in others.items():
        new, old = processed[i], inputs.images[i]
        check_same_cells(new.tokens, old)
        visual[i] = Visual.of_one(new.visual).to(inputs.device)
        images[i] = replace(old, image=other, boxes=new.tokens.boxes)
    return replace(inputs, visual=Visual.joined(visual), images=tuple(images))


def image_at(inputs: MultimodalInputs, index: int, name: str) -> Image.Image:
    """An image as it was given; a ValueError where the inputs do not hold it."""
    image = inputs.images[index].image
    if image is None:
        raise ValueError(
            f"{name} needs the image itself, which these inputs do not hold (inputs from tokens, "
            "or with other pixels): make them with model.prepare"
        )
    return image


def blur_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    sigma: float,
    *,
    which: int | None = None,
    level: Level = "pixels",
) -> MultimodalInputs:
    """Images without their details: a Gaussian blur (torchvision's).

    Args:
        sigma: of the Gaussian: in pixels of the image, or ("embeddings") in patches.
        which: of the prompt's images; None for all.
        level: "pixels" blurs the image, which goes through the model's processor again;
            "embeddings" blurs the visual tokens over the grid of each view, and tokens that are no
            patch stay.

    Raises:
        ValueError: sigma is not positive; inputs that do not hold the image; otherwise as
            `swap_image`.

    Example:
        >>> corrupted = blur_image(model, clean, sigma=20)
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma}; it must be positive, and no infinity")
    from torchvision.transforms.functional import gaussian_blur

    def blur(maps: Maps) -> Maps:
        # One axis at a time, since both at once would cost the square of the radius. Reflected
        # edges need a kernel that is no wider than the map on each side.
        width, height = (2 * min(math.ceil(3 * sigma), size - 1) + 1 for size in maps.shape[:1:-1])
        for kernel in ([width, 1], [1, height]):
            maps = gaussian_blur(maps, kernel, [sigma, sigma])
        return maps

    return edit_images(model, inputs, blur, which, level, "blur_image")


def mean_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    *,
    which: int | None = None,
    level: Level = "pixels",
) -> MultimodalInputs:
    """Images of one colour, their own mean; or ("embeddings") patches that all are their mean.

    Arguments and errors as in `blur_image`.

    Example:
        >>> corrupted = mean_image(model, clean, level="embeddings")
    """

    def mean(maps: Maps) -> Maps:
        return maps.mean(dim=(2, 3), keepdim=True).expand_as(maps)

    return edit_images(model, inputs, mean, which, level, "mean_image")


@without_gradients
def noise_image(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    *,
    multiple: float = 1.0,
    which: int | None = None,
    samples: int = 10,
    seed: int = 0,
) -> MultimodalInputs:
    """Gaussian noise on the pixels of the image. (On visual tokens: `noise_span`.)

    Values beyond black and white are cut off. Runs on the result have one row per sample, whose
    visual tokens are those of the noisy image; `causal_trace` averages over them. The vision
    tower's own run stays clean.

    Args:
        multiple: standard deviation of the noise, in units of the images' own.
        which: of the prompt's images; None for all.
        samples: how many draws.
        seed: of the draws.

    Raises:
        ValueError: a batch, inputs without images or with noise already, no samples, a negative
            `multiple` or one without end, inputs that do not hold the image.
    """
    inputs = model.to_inputs(inputs)
    chosen = chosen_images(inputs, which, "noise_image")
    check_samples(samples, multiple)
    maps = {i: as_maps(image_at(inputs, i, "noise_image")) for i in chosen}
    std = multiple * torch.cat([map.flatten() for map in maps.values()]).std()
    generator = torch.Generator().manual_seed(seed)
    noisy = []
    for _ in range(samples):
        drawn = {
            i: map + std * torch.randn(map.shape, generator=generator) for i, map in maps.items()
        }
        others = {i: as_image(map) for i, map in drawn.items()}
        noisy.append(with_images(model, inputs, others))
    return with_embeddings_of(model, inputs, noisy)


@without_gradients
def edit_images(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    edit: Callable[[Maps], Maps],
    which: int | None,
    level: Level,
    name: str,
) -> MultimodalInputs:
    """Edit images, or visual tokens on their grids: both are maps [image, channel, row, column]."""
    check_level(level)
    inputs = model.to_inputs(inputs)
    chosen = chosen_images(inputs, which, name)
    if level == "pixels":
        others = {i: as_image(edit(as_maps(image_at(inputs, i, name)))) for i in chosen}
        return with_images(model, inputs, others)
    check_no_noise(inputs)
    before = float32_or_wider(model.all_embeddings(inputs))[0]
    after = before.clone()
    for image in (inputs.images[i] for i in chosen):
        for view, grid in enumerate(image.grids):
            if not math.prod(grid):
                continue  # of an image so narrow that its tiles are padding alone
            patches = image.block((0, 0, *grid), view)
            tokens = before[patches].T.unflatten(1, grid)
            after[patches] = edit(tokens[None])[0].flatten(1).T
    return replace(inputs, noise=(after - before).float()[None])


def as_maps(image: Image.Image) -> Maps:
    """An image as numbers from 0 to 255, [1, channel, row, column]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def as_image(maps: Maps) -> Image.Image:
    """Such numbers as an image; what is below 0 or above 255 is cut off."""
    pixels = maps[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


@without_gradients
def with_embeddings_of(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    others: Sequence[MultimodalInputs],
) -> MultimodalInputs:
    """The inputs, with a row for each of `others` that has the others' visual tokens."""
    check_no_noise(inputs)
    before = float32_or_wider(model.all_embeddings(inputs))  # half precision would round again
    after = torch.cat([float32_or_wider(model.all_embeddings(other)) for other in others])
    return replace(inputs, noise=(after - before).float())


def chosen_images(inputs: MultimodalInputs, which: int | None, name: str) -> list[int]:
    """The images that are corrupted, as indices of `inputs.images`.

    Raises:
        ValueError: a batch, no images, or not that one.
    """
    check_one_prompt(len(inputs), name)
    if not inputs.images:
        raise ValueError("these inputs have no image")
    n_images = len(inputs.images)
    if which is None:
        return list(range(n_images))
    if not 0 <= which < n_images:
        raise ValueError(f"which={which}; the prompt has {n_images} image(s), from 0")
    return [which]


def check_no_noise(inputs: MultimodalInputs) -> None:
    """Raise a ValueError where something is added to the embeddings already."""
    if inputs.noise is not None:
        raise ValueError(
            "these inputs have noise already; corrupt clean ones (noise_span takes several spans)"
        )


def check_level(level: str) -> None:
    """Raise a ValueError for a level that there is not."""
    if level not in get_args(Level):
        raise ValueError(f"level={level!r}; it is {' or '.join(map(repr, get_args(Level)))}")


def check_samples(samples: int, multiple: float) -> None:
    """Raise a ValueError unless there is at least one, of noise that has a size."""
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples={samples!r}; it is a whole number, at least 1")
    if not 0 <= multiple < math.inf:
        raise ValueError(f"multiple={multiple}; it is 0 or more, and no infinity")
