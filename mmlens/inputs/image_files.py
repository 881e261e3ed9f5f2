"""Image files, which somebody else has written: opened without being decoded, and checked first.

    with open_image("flag.png") as image:    # a PIL image whose pixels are not read yet
        image.size

A file of 20 KB may decode to gigabytes, a named pipe never ends, and PostScript is a program. This
module needs Pillow alone, so that a command can check a file before it imports torch.

Public names: `open_image`, `check_size`, `read_file`.
"""

from __future__ import annotations

import stat
import threading
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

__all__ = ["check_size", "open_image", "read_file"]

PROGRAMS = ("EPS",)
"""Formats that Pillow leaves to another program (Ghostscript)."""

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
LARGEST_FILE = 2**30
"""Bytes: what is read of a stream that says nothing of its end."""

lock = threading.Lock()
"""Held while warnings are switched off, which Python does for all threads at once."""


def open_image(file: str | Path | BytesIO) -> Image.Image:
    """Return an image of which the header alone is read.

    Raises:
        ValueError: no such file, no regular file, not an image, of more pixels than Pillow's limit
            allows; always one line.

    Example:
        >>> with open_image("flag.png") as image:
        ...     image.load()
    """
    name = "the file" if isinstance(file, BytesIO) else str(file)
    if not isinstance(file, BytesIO):
        check_file(Path(file))
    try:
        with lock, warnings.catch_warnings():
            # Pillow warns above its limit, and refuses above twice of it only.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
    except UnidentifiedImageError:
        if name.lower().endswith(VIDEOS):
            raise ValueError(f"{name} is a video; give some of its frames, as images") from None
        raise ValueError(
            f"{name} is not an image, or of a format that Pillow cannot read"
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {one_line(error)}") from None
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise ValueError(f"{name} cannot be read: {one_line(error)}") from error
    try:
        if image.format in PROGRAMS:
            raise ValueError(f"{name} is {image.format}, a program: convert it to PNG first")
        check_size(image, name)
    except ValueError:
        image.close()
        raise
    return image


def read_file(file: Any) -> bytes:
    """Return what is in an open file, from its beginning where it can go there; it stays open.

    Args:
        file: anything with `read`; `seek`, where there is one, goes back to where it was.

    Raises:
        ValueError: opened as text, closed, not for reading, or more than `LARGEST_FILE` bytes.
    """
    place, left = None, LARGEST_FILE + 1
    pieces: list[bytes] = []
    try:
        if callable(getattr(file, "seekable", None)) and file.seekable():
            place = file.tell()
            file.seek(0)
        while piece := file.read(left):  # a raw stream gives less than it was asked for
            if not isinstance(piece, bytes):
                raise ValueError(f"it gives {type(piece).__name__}, not bytes: use mode 'rb'")
            pieces.append(piece)
            left -= len(piece)
        if place is not None:
            file.seek(place)
    except (OSError, ValueError) as error:  # io.UnsupportedOperation is both
        raise ValueError(f"the open file cannot be read: {one_line(error)}") from None
    if not left:
        raise ValueError(f"the open file has more than {LARGEST_FILE:,} bytes")
    return b"".join(pieces)


def check_file(path: Path) -> None:
    """Raise a ValueError where a path is not that of a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # a name that is too long, no permission, a null byte
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder, not an image")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a pipe, a socket or a device, not a regular file")


def check_size(image: Image.Image, name: str = "the image") -> None:
    """Raise a ValueError where an image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{name} has {image.width:,} x {image.height:,} pixels, more than {limit:,}: make it "
            "smaller, or set PIL.Image.MAX_IMAGE_PIXELS to what you expect"
        )


def one_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
