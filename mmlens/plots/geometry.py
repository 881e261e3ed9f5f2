"""Where a model's patches lie in the original picture.

An image processor resizes, pads and crops: the patches cover some rectangle of the original
picture, its `Frame`, which is smaller than the picture where it was cropped and larger where it was
padded. The frame is measured, not derived from a processor's settings: the processor is given
pictures whose grey levels tell where they came from. So it holds for every processor, the user's
own included, and for whatever rounding it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from mmlens.images import as_image_processor

if TYPE_CHECKING:
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer

#: pictures with fewer pixels than this on a side are measured magnified
SMALL = 8
#: of the measured places, in parts of the picture's side: more is no scaling with crop and padding
LARGEST_ERROR = 0.02


class Frame(NamedTuple):
    """The rectangle that the patches cover, in pixels of the original picture.

    Beyond 0 ... width or height lies padding.
    """

    left: float
    top: float
    right: float
    bottom: float

    def columns(self, n: int) -> Float[np.ndarray, " edge"]:
        """The n + 1 vertical lines between n columns of patches."""
        return np.linspace(self.left, self.right, n + 1)

    def rows(self, n: int) -> Float[np.ndarray, " edge"]:
        """The n + 1 horizontal lines between n rows of patches."""
        return np.linspace(self.top, self.bottom, n + 1)


def picture_frame(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, image: int = 0
) -> Frame:
    """Where the patches of a picture lie in it.

    Args:
        model: whose image processor made the pixel values.
        inputs: with the picture as it was given (`model.prepare` keeps it).
        image: which picture, in reading order.

    Raises:
        ValueError: no such picture, no image processor, or one that does more than scale, crop and
            pad.

    Example:
        >>> picture_frame(model, inputs)        # a picture of 640 x 480, padded to a square
        Frame(left=0.0, top=-80.0, right=640.0, bottom=560.0)
    """
    picture = picture_of(inputs, image)
    if model.image_processor is None or model.cfg.vision is None or inputs.grid_size is None:
        raise ValueError(
            "the model has no image processor, so where its patches lie is unknown: give frame="
        )
    patch = model.cfg.vision.patch_size
    rows, columns = inputs.grid_size
    return measured_frame(model.image_processor, picture.size, (rows * patch, columns * patch))


def picture_of(inputs: MultimodalInputs, image: int) -> Image.Image:
    """A picture as it was given.

    Raises:
        ValueError: the inputs hold no such picture.
    """
    if inputs.images is None:
        raise ValueError(
            "these inputs hold no picture: model.prepare keeps it, tokens alone do not"
        )
    if not 0 <= image < len(inputs.images):
        raise ValueError(f"image {image} of {len(inputs.images)}, counted from 0")
    return inputs.images[image]


def measured_frame(
    processor: Any, size: tuple[int, int], covered: tuple[int, int] | None = None
) -> Frame:
    """The rectangle of a picture of that size that the processor's output shows.

    Args:
        processor: anything that `mmlens.images.as_image_processor` takes.
        size: width and height of the picture.
        covered: height and width of the output that is cut into patches, from its top left corner;
            all of it by default. (A tower for 384 pixels with patches of 14 leaves 6 out.)

    Raises:
        ValueError: the processor does more than scale, crop and pad.
    """
    # An odd factor: what lies in the middle of a pixel stays in the middle of one.
    factor = next(f for f in range(1, 2 * SMALL, 2) if f * min(size) >= SMALL)
    width, height = (factor * side for side in size)
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    black, white, x, y = (
        _processed(processor, levels)
        for levels in (np.zeros_like(across), np.full_like(across, 255), across, down)
    )
    contrast = white - black
    strong = np.abs(contrast) > 0.5 * np.abs(contrast).max()
    full = np.median(contrast[strong])
    seen = np.abs(contrast - full) < 0.01 * abs(full)  # neither padding nor blended with it
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = (x - black) / contrast, (y - black) / contrast
    out_height, out_width = covered or contrast.shape
    left, right = _ends(np.where(seen, x, np.nan), width, out_width)
    top, bottom = _ends(np.where(seen, y, np.nan).T, height, out_height)
    return Frame(left / factor, top / factor, right / factor, bottom / factor)


def _processed(
    processor: Any, levels: Float[np.ndarray, "height width"]
) -> Float[np.ndarray, "out_height out_width"]:
    """What the processor makes of a grey picture, in its first channel."""
    grey = Image.fromarray(np.round(levels).astype(np.uint8)).convert("RGB")
    return as_image_processor(processor)([grey])[0, 0].double().numpy()


def _ends(shares: Float[np.ndarray, "line place"], side: int, covered: int) -> tuple[float, float]:
    """Where the output begins and ends in a side of the picture, by a straight line through it.

    Args:
        shares: for every pixel of the output, how far along the side it came from: 0 is the middle
            of the first pixel, 1 that of the last. NaN at the padding.
        side: pixels of the picture.
        covered: pixels of the output.
    """
    some = ~np.isnan(shares).all(axis=0)
    places = np.flatnonzero(some) + 0.5
    found = np.nanmean(shares[:, some], axis=0) * (side - 1) + 0.5
    inner = _inside(found, side)
    slope, begin = np.polyfit(places[inner], found[inner], deg=1)
    error = np.abs(begin + slope * places[inner] - found[inner]).max()
    if slope <= 0 or error > LARGEST_ERROR * side + 1:
        raise ValueError(
            "the image processor does more than scale, crop and pad, so where its patches lie "
            f"cannot be measured (pixels are up to {error:.1f} of {side} off a straight line)"
        )
    return float(begin), float(begin + slope * covered)


def _inside(found: Float[np.ndarray, " place"], side: int) -> Bool[np.ndarray, " place"]:
    """Places away from the picture's ends, where resampling bends the line; all if none is."""
    step = (found.max() - found.min()) / max(1, len(found) - 1)
    margin = 2 * max(1.0, step)
    inner = (found > margin) & (found < side - margin)
    return inner if inner.sum() >= 2 else np.ones_like(inner)
