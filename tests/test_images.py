"""An image is the same in whatever form it comes: mode, depth, array, file; or it is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mmlens.inputs import image_files
from mmlens.inputs.images import image_key, load_image, load_images

# Of 16 bits 257 are one step of 8: rounding moves a pixel by at most 1. Modes with less resolution
# (YCbCr, HSV, LAB) lose a little more, as Pillow's own conversion shows.
STEP = 257


def drawn() -> np.ndarray:
    """Grey levels of all sizes, at least one of them black and one white."""
    rng = np.random.default_rng(random.getrandbits(32))
    grey = rng.integers(0, 256, (rng.integers(5, 20), rng.integers(5, 20)), dtype=np.uint8)
    grey.flat[:2] = 0, 255
    return grey


def as_png(image: Image.Image) -> np.ndarray:
    """The pixels of an image of 8 bits after a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return np.asarray(Image.open(file).convert("RGB")).astype(float)


def difference(given: Any, expected: np.ndarray) -> float:
    """Mean over the pixels."""
    loaded = load_image(given)
    assert loaded.mode == "RGB"
    return float(np.abs(np.asarray(loaded).astype(float) - expected).mean())


def written(array: np.ndarray, name: str, **options: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, name, **options)
    return file.getvalue()


def pgm(grey: np.ndarray, white: int) -> bytes:
    """A PGM of so many levels, written by hand."""
    deep = np.round(grey.astype(float) * white / 255)
    bytes_each = ">u2" if white > 255 else "u1"
    return (
        f"P5\n{grey.shape[1]} {grey.shape[0]}\n{white}\n".encode()
        + deep.astype(bytes_each).tobytes()
    )


DEEP_GREY: dict[str, Callable[[np.ndarray], Any]] = {
    "PNG of 16 bits": lambda grey: written(grey.astype(np.uint16) * STEP, "PNG"),
    "TIFF of 16 bits": lambda grey: written(grey.astype(np.uint16) * STEP, "TIFF"),
    "TIFF of 16 bits, big-endian": lambda grey: written(
        (grey.astype(np.uint16) * STEP).astype(">u2"), "TIFF"
    ),
    "PGM of 16 bits": lambda grey: pgm(grey, 65535),
    "PGM of 12 bits": lambda grey: pgm(grey, 4095),
    "PGM of 8 bits": lambda grey: pgm(grey, 255),
    "TIFF of floats": lambda grey: written(grey.astype(np.float32) / 255, "TIFF"),
    "I;16": lambda grey: Image.fromarray(grey.astype(np.uint16) * STEP),
    "I of 16 bits": lambda grey: Image.fromarray(grey.astype(np.int32) * STEP),
    "I of 8 bits": lambda grey: Image.fromarray(grey).convert("I"),
    "F of 0 ... 1": lambda grey: Image.fromarray(grey.astype(np.float32) / 255),
    "F of 0 ... 255": lambda grey: Image.fromarray(grey).convert("F"),
    "uint16": lambda grey: grey.astype(np.uint16) * STEP,
    "uint16, big-endian": lambda grey: (grey.astype(np.uint16) * STEP).astype(">u2"),
    "uint16 of 8 bits": lambda grey: grey.astype(np.uint16),
    "int64": lambda grey: grey.astype(np.int64),
    "float16": lambda grey: (grey / 255).astype(np.float16),
    "float64, [1, h, w]": lambda grey: grey[None] / 255,
    "torch.uint16": lambda grey: torch.from_numpy(grey.astype(np.uint16) * STEP),
    "torch.bfloat16": lambda grey: torch.from_numpy(grey / 255).bfloat16(),
    "torch.int64, [h, w, 1]": lambda grey: torch.from_numpy(grey[..., None].astype(np.int64)),
}


@pytest.mark.parametrize("kind", DEEP_GREY)
def test_grey_of_any_depth(seed, kind):
    grey = drawn()
    expected = as_png(Image.fromarray(grey))
    # bfloat16 has 8 bits for the digits: a level of 255 is off by up to 1/2.
    assert difference(DEEP_GREY[kind](grey), expected) <= (0.5 if "bfloat" in kind else 0.01)


@pytest.mark.parametrize("name", ["PNG", "PPM"])
def test_a_dark_image_of_16_bits_stays_dark(seed, name):
    """Its file says how many bits it has, whatever its pixels are."""
    dark = np.random.default_rng(seed).integers(0, 256, (6, 7)).astype(np.uint16)
    file = written(dark, name)
    assert np.asarray(load_image(file)).max() <= 1


def test_black_and_white(seed):
    mask = np.random.default_rng(seed).random((9, 11)) < 0.5
    expected = as_png(Image.fromarray(mask.astype(np.uint8) * 255))
    for given in (
        mask,
        torch.from_numpy(mask),
        torch.from_numpy(mask)[None],
        Image.fromarray(mask.astype(np.uint8) * 255).convert("1"),
        written(mask.astype(np.uint8) * 255, "PNG"),
    ):
        assert difference(given, expected) == 0


def coloured() -> Image.Image:
    shape = (random.randint(5, 20), random.randint(5, 20), 3)
    return Image.fromarray(
        np.random.default_rng(random.getrandbits(32)).integers(0, 256, shape, dtype=np.uint8)
    )


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBA", "RGBX", "L", "LA", "P"])
def test_modes(seed, mode):
    image = coloured()
    if mode == "LAB":
        lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        changed = ImageCms.profileToProfile(image, *lab, outputMode="LAB")
    else:
        changed = image.convert(mode)
    original = image.convert("L") if mode in ("L", "LA") else image
    # What these conversions lose by themselves is at most 2 levels on average, but for the palette,
    # which has few colours.
    lost = 60 if mode == "P" else 2
    assert difference(changed, np.asarray(original.convert("RGB")).astype(float)) <= lost


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGBa", "La"])
def test_what_is_transparent_keeps_its_colour(seed, mode, recwarn):
    """As Hugging Face's processors see it: `convert("RGB")` drops the transparency."""
    image = coloured()
    alpha = Image.fromarray(
        np.random.default_rng(seed).integers(128, 256, image.size[::-1], dtype=np.uint8)
    )
    if mode == "P":
        given = image.convert("P")
        given.info["transparency"] = bytes(random.choices(range(256), k=256))
        expected = image.convert("P").convert("RGB")
    else:
        opaque = image.convert({"LA": "L", "La": "L", "PA": "P"}.get(mode, "RGB"))
        given = opaque.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
        given.putalpha(alpha)
        given = given.convert(mode)
        expected = opaque.convert("RGB")
    # Colours times alpha / 255, rounded, and back: half a step is at most 1 where alpha is >= 128.
    bound = 1 if mode in ("RGBa", "La") else 0
    assert difference(given, np.asarray(expected).astype(float)) <= bound
    assert not recwarn.list


def test_channels_first_and_last(seed):
    image = coloured()
    pixels = np.array(image)
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for given in (pixels, first, pixels / 255, first / 255):
        assert difference(given, pixels) == 0
        assert difference(torch.from_numpy(given), pixels) == 0
        alpha = np.ones_like(given[..., :1] if given.shape[-1] == 3 else given[:1])
        with_alpha = np.concatenate([given, alpha], axis=2 if given.shape[-1] == 3 else 0)
        assert difference(with_alpha, pixels) == 0
    # Where both orders are possible, each library's own is meant.
    small = np.random.default_rng(seed).integers(0, 256, (3, 6, 3), dtype=np.uint8)
    assert load_image(small).size == (6, 3)
    assert load_image(torch.from_numpy(small)).size == (3, 6)


def test_deep_colours(seed):
    pixels = np.asarray(coloured())
    deep = pixels.astype(np.uint16) * STEP
    assert difference(deep, pixels) <= 0.01
    assert difference(torch.from_numpy(deep).permute(2, 0, 1), pixels) <= 0.01
    ppm = f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n65535\n".encode()
    assert difference(ppm + deep.astype(">u2").tobytes(), pixels) <= 1


def turned(image: Image.Image, orientation: int) -> bytes:
    """A file without loss, whose EXIF data says how to turn it."""
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(seed, orientation, tmp_path):
    """By the EXIF standard: where row 0 and column 0 of the stored image lie when it is upright."""
    image = coloured()
    stored = np.asarray(image)
    file = turned(image, orientation)
    sides = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0)}  # (rows, columns) run backwards
    turned_sides = {5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}  # after rows became columns
    expected = stored if orientation in sides else stored.transpose(1, 0, 2)
    rows, columns = (sides | turned_sides)[orientation]
    expected = expected[:: -1 if rows else 1, :: -1 if columns else 1]
    (tmp_path / "turned.png").write_bytes(file)
    with Image.open(BytesIO(file)) as opened:
        for given in (file, BytesIO(file), tmp_path / "turned.png", opened):
            assert np.array_equal(np.asarray(load_image(given)), expected)


class Stream:
    """A response of a server: it can be read once, in small pieces, and says nothing of its end."""

    def __init__(self, content: bytes) -> None:
        self.left = content

    def read(self, size: int = -1) -> bytes:
        piece, self.left = self.left[: min(size, 7)], self.left[min(size, 7) :]
        return piece


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "BMP"])
def test_a_file_in_any_form(seed, name, tmp_path):
    """A path, bytes, an open file, wherever it stands; and they stay as they were."""
    image = coloured()
    path = tmp_path / f"it.{name}"
    image.save(path, name, **({"lossless": True} if name == "WEBP" else {}))
    content = path.read_bytes()
    forms = [str(path), path, content, bytearray(content), memoryview(content), Stream(content)]
    with path.open("rb") as file, path.open("rb", buffering=0) as raw, BytesIO(content) as memory:
        memory.seek(len(content))  # as after writing
        file.seek(3)
        for given in [*forms, file, raw, memory, memory]:
            assert np.array_equal(np.asarray(load_image(given)), np.asarray(image))
        assert (file.tell(), memory.tell()) == (3, len(content))
        assert not file.closed and not memory.closed
        assert len(load_images([file, content, memory])) == 3
        assert image_key(file) == image_key(memory) == image_key(image)
    for one in (content, bytearray(content), memoryview(content), BytesIO(content)):
        assert len(load_images(one)) == 1  # one image, no list of numbers


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(seed, name):
    """Of a file; a PIL image shows the frame that it is at."""
    first, *others = (coloured().resize((9, 7)) for _ in range(3))
    options = {"lossless": True} if name == "WEBP" else {}
    file = BytesIO()
    first.save(file, name, save_all=True, append_images=others, **options)
    with Image.open(file) as opened:
        assert opened.n_frames == 3
        expected = np.asarray(opened.convert("RGB")).astype(float)
        # A GIF has a palette for 63 pixels of any colour: it loses nothing.
        assert np.abs(expected - np.asarray(first).astype(float)).max() == 0
        assert difference(file, expected) == difference(file.getvalue(), expected) == 0
        opened.seek(2)
        assert difference(opened, np.asarray(others[-1]).astype(float)) == 0


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (3, 1), (1, 3)])
def test_extreme_shapes_in_any_form(seed, size):
    """Those where one cannot tell channels from lines by their number included."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for given in (image, pixels, written(pixels, "PNG"), BytesIO(written(pixels, "PNG"))):
        assert difference(given, pixels) == 0
    assert difference(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), pixels) == 0


class Text:
    def read(self, size: int = -1) -> str:
        return "no bytes"


def test_open_files_that_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "it.png"
    coloured().save(path)
    with path.open("rb") as closed:
        pass
    with path.open("ab") as appending, (tmp_path / "a.txt").open("w+") as text:
        text.write("words")
        for given, message in [
            (closed, "closed file"),
            (appending, "cannot be read"),
            (text, "str, not bytes: use mode 'rb'"),
            (Text(), "str, not bytes"),
            (BytesIO(b""), "not an image"),
            (BytesIO(b"no image"), "not an image"),
        ]:
            with pytest.raises(ValueError, match=message) as error:
                load_image(given)
            assert "\n" not in str(error.value)
        assert text.tell() == 5
    monkeypatch.setattr(image_files, "LARGEST_FILE", 20)
    with pytest.raises(ValueError, match="more than 20 bytes"):
        load_image(Stream(path.read_bytes()))
    with pytest.raises(TypeError, match="bytes, an open file"):
        load_image(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full((4, 4), 256), r"integers must lie in 0 \.\.\. 255, .* 256 to 256"),
        (np.full((4, 4), 300, np.int16), r"0 \.\.\. 255"),
        (np.full((4, 4), -1), r"goes from -1"),
        (np.full((4, 4), 70_000, np.uint32), r"0 \.\.\. 255"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), r"0 \.\.\. 65535"),
        (Image.fromarray(np.full((4, 4), -5, np.int32)), "goes from -5"),
        (Image.fromarray(np.full((4, 4), 1000, np.float32)), r"floats must lie in 0 \.\.\. 255"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "nan"),
        (np.full((4, 4), 1j), "complex128 is no image"),
        (np.array([["a", "b"]]), "is no image"),
        (np.zeros((5, 6, 2)), r"shape \(5, 6, 2\) is not one image"),
        (torch.zeros(1, 3, 5, 6), r"shape \(1, 3, 5, 6\)"),
        (b"no image", "not an image"),
        ("x" * 300 + ".png", "cannot be read: File name too long"),
        ("a\0b.png", "cannot be read: .*null"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message) as error:
        load_image(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "AVIF"])
def test_damaged_files_are_one_line(seed, name, recwarn):
    """Whatever the damage is: an image, or a ValueError in one line."""
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {name}")
    file = BytesIO()
    coloured().save(file, name)
    for _ in range(40):
        data = bytearray(file.getvalue())
        for _ in range(random.randint(1, 6)):
            data[random.randrange(len(data))] = random.randrange(256)
        data = data[: random.randint(1, len(data))]
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error)
