"""Pictures in, pixel values out.

    load_image("flag.png")                            # any picture -> PIL, RGB, upright
    process = as_image_processor(image_processor)     # Hugging Face's, open_clip's or your own
    pixel_values = process([load_image("flag.png")])  # [image, channel, height, width]

An `ImageProcessor` is any callable from a list of pictures to their pixel values.

Public names: `load_image`, `ImageProcessor`, `HuggingFaceImages`, `EachImage`,
`as_image_processor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = ["EachImage", "HuggingFaceImages", "ImageProcessor", "as_image_processor", "load_image"]

CHANNELS = (1, 3, 4)


@runtime_checkable
class ImageProcessor(Protocol):
    """What turns pictures into the pixel values that a vision tower was trained on."""

    def __call__(self, images: list[Image.Image], /) -> Float[Tensor, "image channel height width"]:
        """Pixel values of RGB pictures of any size."""
        ...


@dataclass(frozen=True)
class HuggingFaceImages:
    """A transformers image processor as an `ImageProcessor`."""

    processor: Any

    def __call__(self, images: list[Image.Image], /) -> Float[Tensor, "image channel height width"]:
        """Pixel values of RGB pictures of any size."""
        return torch.as_tensor(self.processor(images=images, return_tensors="pt")["pixel_values"])


@dataclass(frozen=True)
class EachImage:
    """A transform of one picture, such as open_clip's, as an `ImageProcessor`."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, images: list[Image.Image], /) -> Float[Tensor, "image channel height width"]:
        """Pixel values of RGB pictures of any size."""
        return torch.stack([self.transform(image) for image in images])


def as_image_processor(processor: Any) -> ImageProcessor:
    """Wrap what is no `ImageProcessor` yet: transformers' image processors, torchvision transforms.

    Anything else that can be called is taken to be an `ImageProcessor`; wrap a function of one
    picture in `EachImage`.

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


def load_image(image: Any) -> Image.Image:
    """Open a picture: RGB, turned upright as its EXIF data says.

    Args:
        image: a path, a PIL image, an array [height, width] or [height, width, channel], or a
            tensor that may also be [channel, height, width]. Arrays and tensors hold 0 ... 255 as
            integers or 0 ... 1 as floats. A transparency channel is dropped, as Hugging Face does.

    Raises:
        ValueError: no such file, not a picture, a shape or values that are not those of a picture;
            always one line.
        TypeError: none of these things.
    """
    if isinstance(image, str | PathLike):
        return _open(Path(image))
    if isinstance(image, Image.Image):
        return _upright(image, "the image")
    if isinstance(image, Tensor):
        array = image.detach().cpu()
        if array.ndim == 3 and array.shape[0] in CHANNELS:
            array = array.permute(1, 2, 0)
        return _from_array((array.float() if array.is_floating_point() else array).numpy())
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise TypeError(
        f"an image must be a path, a PIL image, an array or a tensor, not {type(image).__name__}"
    )


def _open(path: Path) -> Image.Image:
    if str(path).startswith(("http:", "https:")):
        raise ValueError(f"{path} is an address, not a file: download the picture first")
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture")
    try:
        with Image.open(path) as opened:
            return _upright(opened, str(path))
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not a picture, or of a format that Pillow cannot read"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {_one_line(error)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {_one_line(error)}") from None


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:  # a file that ends early shows only now
        raise ValueError(f"{name} is damaged: {_one_line(error)}") from None
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8 instead of scaling them.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in CHANNELS)) or 0 in shape:
        raise ValueError(
            f"an array of shape {shape} is not one picture: it must be [height, width] or "
            f"[height, width, 1, 3 or 4]; for several pictures give a list"
        )
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating):
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"a picture of floats must lie in 0 ... 1, but this one goes from {low:g} to "
                f"{high:g}; ready pixel values go to inputs_from_tokens"
            )
        array = np.round(array * 255)
    elif not (low >= 0 and high <= 255):
        raise ValueError(f"a picture of integers must lie in 0 ... 255, not {low} ... {high}")
    return Image.fromarray(array.astype(np.uint8)).convert("RGB")


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_images(images: Any) -> tuple[Image.Image, ...]:
    """The pictures of one text: None, one picture, or a list of them."""
    if images is None:
        return ()
    if isinstance(images, Sequence) and not isinstance(images, str):
        return tuple(load_image(image) for image in images)
    return (load_image(images),)
