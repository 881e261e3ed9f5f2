"""Where patches lie in the original image, against what the image processors really do."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessorPil, SiglipImageProcessor

from mmlens.checkpoints.towers.open_clip import image_transform
from mmlens.inputs.image_frame import measured_frame
from mmlens.inputs.images import as_image_processor

PATCH, GRID = 14, 4
SIDE = PATCH * GRID
SQUARE = {"height": SIDE, "width": SIDE}


def open_clip(mode: str, do_pad: bool = False) -> Any:
    """Its transform, as towers get it."""
    return image_transform({"vision_cfg": {"image_size": SIDE}}, {"resize_mode": mode}, do_pad)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    "siglip": lambda: SiglipImageProcessor(size=SQUARE),
    "llava padded": lambda: LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, do_pad=True
    ),
    "open_clip shortest": lambda: open_clip("shortest"),
    "open_clip longest": lambda: open_clip("longest"),
    "open_clip squash": lambda: open_clip("squash"),
    "open_clip padded": lambda: open_clip("squash", do_pad=True),
}
CROPPED = ("clip", "open_clip shortest")
PADDED = ("llava padded", "open_clip longest", "open_clip padded")


def odd_size() -> tuple[int, int]:
    return random.randint(61, 433), random.randint(61, 433)


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_drawn_in_a_patch_is_seen_in_it(seed: int, name: str) -> None:
    processor = PROCESSORS[name]()
    for _ in range(3):
        width, height = odd_size()
        frame = measured_frame(processor, (width, height))
        columns, rows = frame.columns(GRID), frame.rows(GRID)
        cells = []
        for row in range(GRID):
            for column in range(GRID):
                x = np.clip(columns[[column, column + 1]], 0, width)
                y = np.clip(rows[[row, row + 1]], 0, height)
                area = float((x[1] - x[0]) * (y[1] - y[0]))
                cells.append((area, row, column, np.round(x).astype(int), np.round(y).astype(int)))
        # Of a patch that is nearly all padding, too little is seen to tell it apart.
        largest = max(area for area, *_ in cells)
        _, row, column, x, y = random.choice([cell for cell in cells if cell[0] > 0.8 * largest])
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        black = as_image_processor(processor)([Image.fromarray(pixels)])
        pixels[y[0] : y[1], x[0] : x[1]] = 255
        seen = as_image_processor(processor)([Image.fromarray(pixels)])
        change = (seen - black)[0].abs().sum(dim=0)
        by_patch = change.view(GRID, PATCH, GRID, PATCH).sum(dim=(1, 3))
        assert divmod(int(by_patch.argmax()), GRID) == (row, column)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_frame_is_what_the_settings_say(seed: int, name: str) -> None:
    width, height = odd_size()
    frame = measured_frame(PROCESSORS[name](), (width, height))
    side = {True: min(width, height), False: max(width, height)}
    if name in CROPPED or name in PADDED:
        length = side[name in CROPPED]
        left, top = (width - length) / 2, (height - length) / 2
        expected = (left, top, left + length, top + length)
        pixel = length / SIDE
    else:
        expected, pixel = (0, 0, width, height), max(width, height) / SIDE
    # Sizes and offsets are whole pixels of the output (or of the image), each rounded once.
    off = 1.5
    if name == "open_clip longest":
        # The short side may be scaled by half an output pixel too much or too little, and the
        # padding's edge is that much off for each length of the side between it and the middle.
        shown = round(SIDE * min(width, height) / max(width, height))
        off = max(off, 0.5 + SIDE / (4 * shown))
    for got, wanted in zip(frame, expected, strict=True):
        assert abs(got - wanted) <= off * pixel + 1


def test_pixels_that_no_patch_covers_are_left_out() -> None:
    processor = SiglipImageProcessor(size={"height": 60, "width": 60})
    frame = measured_frame(processor, (120, 240), covered=(SIDE, SIDE))
    assert frame == pytest.approx((0, 0, 112, 224), abs=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (7, 4)])
def test_tiny_images(size: tuple[int, int]) -> None:
    frame = measured_frame(PROCESSORS["siglip"](), size)
    assert frame == pytest.approx((0, 0, *size), abs=0.5)


def test_large_images() -> None:
    frame = measured_frame(PROCESSORS["clip"](), (3001, 1999))
    assert frame == pytest.approx((501, 0, 2500, 1999), abs=1999 / SIDE)


def test_a_processor_of_the_users_own() -> None:
    def upper_left_quarter(images: list[Image.Image]) -> torch.Tensor:
        halves = [image.resize((80, 80)).crop((0, 0, 40, 40)) for image in images]
        return torch.stack([torch.tensor(np.array(half)) for half in halves]).permute(0, 3, 1, 2)

    frame = measured_frame(upper_left_quarter, (200, 100))
    assert frame == pytest.approx((0, 0, 100, 50), abs=2)


def test_what_cannot_be_measured_is_an_error() -> None:
    def turned(images: list[Image.Image]) -> torch.Tensor:
        half = [image.resize((40, 40)).transpose(Image.Transpose.ROTATE_180) for image in images]
        return torch.stack([torch.tensor(np.array(each)) for each in half]).permute(0, 3, 1, 2)

    with pytest.raises(ValueError, match="scale, crop and pad"):
        measured_frame(turned, (200, 100))
