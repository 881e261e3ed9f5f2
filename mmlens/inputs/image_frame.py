"""`measured_frame`: which part of an image a model's patches cover.

An image processor resizes, pads and crops: the patches cover some rectangle of the original
image, a `Box`, which is smaller than the image where it was cropped and larger where it was
padded. The box is measured, not derived from a processor's settings: the processor is given
images whose grey levels tell where they came from. So it holds for every processor, the user's
own included, and for whatever rounding it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from mmlens.inputs.image_tokens import Box
from mmlens.inputs.images import as_image_processor

#: images with fewer pixels than this on a side are measured magnified
SMALL = 8
#: of the measured places, in parts of the image's side: more is no scaling with crop and padding
LARGEST_ERROR = 0.02


def measured_frame(
    processor: Any, size: tuple[int, int], covered: tuple[int, int] | None = None
) -> Box:
    """Measure which rectangle of an image of that size the processor's output shows.

    Args:
        covered: height and width of the output that is cut into patches, from its top left corner;
            all of it by default. (A tower for 384 pixels with patches of 14 leaves 6 out.)
    """
    # An odd factor: what lies in the middle of a pixel stays in the middle of one.
    factor = next(f for f in range(1, 2 * SMALL, 2) if f * min(size) >= SMALL)
    width, height = (factor * side for side in size)
    across, down = (np.linspace(0, 255, side).round().astype(np.uint8) for side in (width, height))
    black, white, x, y = (
        _processed(processor, np.broadcast_to(levels, (height, width)))  # a byte a pixel, no more
        for levels in (np.uint8(0), np.uint8(255), across, down[:, None])
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
    return Box(left / factor, top / factor, right / factor, bottom / factor)


def _processed(
    processor: Any, levels: UInt8[np.ndarray, "height width"]
) -> Float[np.ndarray, "out_height out_width"]:
    """Return the processor's output for a grey image, in its first channel."""
    grey = Image.fromarray(np.ascontiguousarray(levels)).convert("RGB")
    return as_image_processor(processor)([grey])[0, 0].double().numpy()


def _ends(shares: Float[np.ndarray, "line place"], side: int, covered: int) -> tuple[float, float]:
    """Return where the output begins and ends in a side of the image, by a fitted straight line.

    `shares` tell of every pixel of the output how far along the side it came from: 0 is the middle
    of the first pixel, 1 that of the last. NaN at the padding.
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
    """Return places away from the image's ends, where resampling bends the line; all if none is."""
    step = (found.max() - found.min()) / max(1, len(found) - 1)
    margin = 2 * max(1.0, step)
    inner = (found > margin) & (found < side - margin)
    return inner if inner.sum() >= 2 else np.ones_like(inner)
