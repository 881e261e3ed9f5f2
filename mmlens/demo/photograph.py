"""A drawing as a photograph would show it: other images of the same flag, drawn from a seed.

Much milder than what the demo model was trained on (`training/demo/augment.py`), and never flipped.
"""

from __future__ import annotations

import random

from PIL import Image, ImageEnhance, ImageFilter

MARGIN = 0.15
"""How far a corner may move inwards, as a share of the side."""
TURN = 6.0
"""Degrees, to either side."""
LIGHT = 0.15
"""How much brightness, contrast and saturation may differ."""


def photograph(image: Image.Image, seed: int | str) -> Image.Image:
    """Return the image turned, tilted, on a ground of one grey, in other light, a little blurred.

    Args:
        image: what is photographed.
        seed: the same gives the same pixels.
    """
    chance = random.Random(seed)
    grey = (chance.randrange(64, 192),) * 3
    width, height = image.size

    def corner(x: int, y: int) -> tuple[float, float]:
        """The point of the drawing that a corner of the photograph shows: outside of it."""
        shift = (chance.uniform(0, MARGIN * width), chance.uniform(0, MARGIN * height))
        return (x * width + (2 * x - 1) * shift[0], y * height + (2 * y - 1) * shift[1])

    corners = [corner(*at) for at in ((0, 0), (0, 1), (1, 1), (1, 0))]
    shown = image.convert("RGB").transform(
        image.size,
        Image.Transform.QUAD,
        [number for point in corners for number in point],
        Image.Resampling.BICUBIC,
        fillcolor=grey,
    )
    angle = chance.uniform(-TURN, TURN)
    shown = shown.rotate(angle, Image.Resampling.BICUBIC, fillcolor=grey)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        shown = enhance(shown).enhance(chance.uniform(1 - LIGHT, 1 + LIGHT))
    return shown.filter(ImageFilter.GaussianBlur(chance.uniform(0, 0.8)))
