"""Images in, pixel values out.

    load_image("flag.png")                            # any image -> PIL, RGB, upright
    process = as_image_processor(image_processor)     # Hugging Face's, open_clip's or your own
    pixel_values = process([load_image("flag.png")])  # [image, channel, height, width]

An `ImageProcessor` is any callable from a list of images to their pixel values.

Public names: `load_image`, `ImageProcessor`, `HuggingFaceImages`, `EachImage`,
`as_image_processor`, `image_key`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from mmlens.inputs.image_files import check_size, one_line, open_image, read_file

__all__ = [
    "EachImage",
    "HuggingFaceImages",
    "ImageProcessor",
    "as_image_processor",
    "image_key",
    "load_image",
]

CHANNELS = (1, 3, 4)
WHITE_8, WHITE_16 = 2**8 - 1, 2**16 - 1
"""What Pillow's decoders raise."""
DEEP = ("PNG", "PPM")
"""Formats whose integers Pillow reads as 16 bits in its mode "I"."""


@runtime_checkable
class ImageProcessor(Protocol):
    """A callable that turns images into the pixel values that a vision tower was trained on."""

    def __call__(self, images: list[Image.Image], /) -> Float[Tensor, "image channel height width"]:
        """Return pixel values of RGB images of any size."""
        ...


@dataclass(frozen=True)
class HuggingFaceImages:
    """A transformers image processor as an `ImageProcessor`."""

    processor: Any

    def __call__(self, images: list[Image.Image], /) -> Float[Tensor, "image channel height width"]:
        """Return pixel values of RGB images of any size."""
        padded, edge = bool(getattr(self.processor, "do_pad", False)), largest_edge(self.processor)
        check_scaled(images, 0 if has_fixed_size(self.processor) else edge, padded)
        return torch.as_tensor(self.processor(images=images, return_tensors="pt")["pixel_values"])


@dataclass(frozen=True)
class EachImage:
    """A transform of one image, such as open_clip's, as an `ImageProcessor`."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, images: list[Image.Image], /) -> Float[Tensor, "image channel height width"]:
        """Return pixel values of RGB images of any size."""
        check_scaled(images, largest_edge(self.transform))
        return torch.stack([self.transform(image) for image in images])


def as_image_processor(processor: Any) -> ImageProcessor:
    """Wrap what is no `ImageProcessor` yet: transformers' image processors, torchvision transforms.

    Anything else that can be called is taken to be an `ImageProcessor`; wrap a function of one
    image in `EachImage`.

    Raises:
        TypeError: not callable.
    """
    if hasattr(processor, "preprocess") and hasattr(processor, "model_input_names"):
        return HuggingFaceImages(processor)
    if type(processor).__module__.startswith("torchvision.transforms"):
        return EachImage(processor)
    if not callable(processor):
        raise TypeError(
            f"{processor!r} is no image processor: it must be callable, from a list of PIL images "
            f"to pixel values [image, channel, height, width]"
        )
    return processor


def largest_edge(processor: Any) -> int:
    """Return how many pixels an image processor makes an image's shorter side, at most; 0 unknown.

    Args:
        processor: transformers', or one of torchvision's transforms.
    """
    size = getattr(processor, "size", None)
    sides = list(size) if isinstance(size, list | tuple) else [size]
    named = sides_of(size)
    if named.pop("longest_edge", None):  # with one, these two bound an area
        named.pop("shortest_edge", None)
    sides += [*named.values(), *map(largest_edge, getattr(processor, "transforms", ()))]
    return max((side for side in sides if isinstance(side, int)), default=0)


def sides_of(size: Any) -> dict[str, int]:
    """Return the sides that a size of transformers' image processors names; {} for another one."""
    size = SimpleNamespace(**size) if isinstance(size, Mapping) else size
    names = ("height", "width", "shortest_edge", "longest_edge")
    found = {name: getattr(size, name, None) for name in names}
    return {name: side for name, side in found.items() if isinstance(side, int)}


def has_fixed_size(processor: Any) -> bool:
    """Return whether a transformers image processor gives all images one height and width."""
    size = getattr(processor, "size", None)
    size = SimpleNamespace(**size) if isinstance(size, Mapping) else size
    return bool(getattr(size, "height", None) and getattr(size, "width", None))


def check_scaled(images: Sequence[Image.Image], edge: int, padded: bool = False) -> None:
    """Raise a ValueError where an image, scaled or padded, would exceed Pillow's limit on pixels.

    Scaled so that its shorter side fits a tower, a strip of 1 x 100,000 pixels fills gigabytes.

    Args:
        edge: pixels of the shorter side, as `largest_edge` gives them; 0 where images do not keep
            their shape.
        padded: whether images become squares first.
    """
    limit = Image.MAX_IMAGE_PIXELS
    for image in images:
        short, long = sorted(image.size)
        short = long if padded else short
        pixels = max(short * long, edge * edge * long // short)
        if limit is not None and pixels > limit:
            done = "padded to a square and scaled" if padded else "scaled"
            raise ValueError(
                f"an image of {image.width:,} x {image.height:,} pixels, {done} for this model, "
                f"would have {pixels:,}, more than {limit:,}: crop it, or set "
                "PIL.Image.MAX_IMAGE_PIXELS to what you expect"
            )


def load_image(image: Any) -> Image.Image:
    """Open an image: RGB, turned upright as its EXIF data says.

    Args:
        image: a path, the bytes of a file, a file that is open for reading, a PIL image of any
            mode, an array or a tensor. Files are read from their beginning and stay open; of an
            animation the first frame is taken, of a PIL image the frame that it is at. Arrays and
            tensors are [height, width], [height, width, channel] or [channel, height, width]
            (where both are possible, an array is the former and a tensor the latter). They hold
            booleans, 0 ... 255 as integers, 0 ... 65,535 as uint16 (up to 255 they are taken for 8
            bits), or 0 ... 1 as floats. Files of 16 bits are scaled to 8. A transparency channel
            is dropped, as transformers does with files; PIL images that its processors get are
            laid on white in transformers 5.24.

    Raises:
        ValueError: no such file, not an image, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, a
            shape or values that are not those of an image; always one line.
        TypeError: none of these things.
    """
    if isinstance(image, str | PathLike):
        return _open(Path(image))
    if isinstance(image, bytes | bytearray | memoryview):
        with open_image(BytesIO(image)) as opened:
            return _upright(opened, f"a file of {len(image):,} bytes")
    if callable(getattr(image, "read", None)):
        content = read_file(image)
        with open_image(BytesIO(content)) as opened:
            return _upright(opened, f"a file of {len(content):,} bytes")
    if isinstance(image, Image.Image):
        return _upright(image, "the image")
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return _from_array(_channels_last(array, first=True))
    if isinstance(image, np.ndarray):
        return _from_array(_channels_last(image, first=False))
    raise TypeError(
        "an image must be a path, bytes, an open file, a PIL image, an array or a tensor, not "
        f"{type(image).__name__}"
    )


def _open(path: Path) -> Image.Image:
    if str(path).startswith(("http:", "https:")):
        raise ValueError(f"{path} is an address, not a file: download the image first")
    with open_image(Path(os.path.expanduser(path))) as opened:  # expanduser of Path can fail
        return _upright(opened, str(path))


def _upright(image: Image.Image, name: str) -> Image.Image:
    check_size(image, name)
    depth = 16 if image.format in DEEP else None  # a copy does not know its format any more
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a file that ends early shows only now
        raise ValueError(f"{name} is damaged: {one_line(error)}") from None
    return _as_rgb(image, depth)


def _as_rgb(image: Image.Image, depth: int | None) -> Image.Image:
    """Return an image of any mode in RGB, whose 8 bits Pillow would fill by cutting off.

    Args:
        depth: bits of the integers of mode "I", where the file says so.
    """
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and depth == 16):
        return _scaled(np.asarray(image).astype(np.int64), WHITE_16)
    if mode == "I":
        return _scaled(np.asarray(image), _white_of_integers(np.asarray(image), True))
    if mode == "F":
        array = np.asarray(image)
        return _scaled(array, 1 if array.max() <= 1 else WHITE_8)  # Pillow's own F is 0 ... 255
    if mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        changed = ImageCms.buildTransform(lab, rgb, "LAB", "RGB")
        return ImageCms.applyTransform(image, changed)  # type: ignore[return-value]
    # Pillow has no direct conversion of these modes, and warns about transparent palettes.
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _channels_last(array: np.ndarray, first: bool) -> np.ndarray:
    """Return an image as [height, width, channel].

    Args:
        first: whether the channels are expected to come first; the other order is taken where only
            that one is possible.
    """
    if array.ndim != 3:
        return array
    possible = [array.shape[axis] in CHANNELS for axis in (0, 2)]
    if possible[0] and (first or not possible[1]):
        return array.transpose(1, 2, 0)
    return array


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in CHANNELS)) or 0 in shape:
        raise ValueError(
            f"an array of shape {shape} is not one image: it must be [height, width], or "
            f"[height, width, channel] or [channel, height, width] with 1, 3 or 4 channels; for "
            "several images give a list"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(f"an array of {array.dtype} is no image: it must hold numbers")
    if array.dtype.kind in "bf":
        return _scaled(array, 1)
    is_deep = array.dtype.newbyteorder("=") == np.uint16  # as TIFF files have it, perhaps
    return _scaled(array, _white_of_integers(array, is_deep))


def _white_of_integers(array: np.ndarray, may_be_deep: bool) -> int:
    """Return what integers in memory are white at: 16 bits can only be told by large ones."""
    return WHITE_16 if may_be_deep and array.max() > WHITE_8 else WHITE_8


def _scaled(array: np.ndarray, white: int) -> Image.Image:
    """Return numbers between 0 and `white` as an image of 8 bits.

    Raises:
        ValueError: some are less or more.
    """
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= white):  # NaN is neither
        kind = "floats" if array.dtype.kind == "f" else "integers"
        raise ValueError(
            f"an image of {kind} must lie in 0 ... {white}, but this one goes from {low:g} to "
            f"{high:g}; ready pixel values go to inputs_from_tokens"
        )
    if white != WHITE_8:
        array = np.round(array * (WHITE_8 / white))
    return Image.fromarray(array.astype(np.uint8)).convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image scaled to a width and a height, so that it has the same patches.

    An image of another shape is distorted.
    """
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def image_key(image: Any) -> str:
    """Return what tells images apart: a file's path, or a hash of the size and pixels of others."""
    if isinstance(image, str | PathLike):
        return str(image)
    try:
        opened = load_image(image)
    except (ValueError, TypeError, OSError):
        return "unreadable image"
    pixels = f"{opened.size}".encode() + opened.tobytes()
    return f"sha256:{hashlib.sha256(pixels).hexdigest()[:16]}"


def load_images(images: Any) -> tuple[Image.Image, ...]:
    """Open the images of one text: None, one image, or a list of them."""
    if images is None:
        return ()
    if isinstance(images, Sequence) and not isinstance(
        images, str | bytes | bytearray | memoryview
    ):
        return tuple(load_image(image) for image in images)
    return (load_image(images),)
