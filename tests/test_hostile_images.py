"""Image files that somebody else made: a clear error before memory is taken, or time is lost."""

from __future__ import annotations

import json
import os
import random
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import internvl_models
import numpy as np
import pytest
import qwen_models
import tiled_models
import torch
from checkpoint_folders import load
from limits import GIGABYTE, peak_of, time_limit
from PIL import Image
from small_tiled_models import noise_picture, tiled_model
from tiny_checkpoint import write_tiny_llava
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    LlavaImageProcessorPil,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
)

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.towers.open_clip import image_transform
from mmlens.cli.errors import UserError
from mmlens.cli.options import check_image
from mmlens.inputs.image_files import open_image
from mmlens.inputs.image_frame import measured_frame
from mmlens.inputs.images import as_image_processor, load_image

LIMIT = 50_000
"""Pixels that are allowed here, so that too many are still few."""


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT)


def png(path: Path, width: int, height: int) -> Path:
    """A grey PNG of any size, which is small: written line by line."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    packer, lines = zlib.compressobj(9), []
    for _ in range(height):
        lines.append(packer.compress(bytes(1 + width)))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    content = b"".join(lines) + packer.flush()
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", content), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def refused(path: Path, *said: str) -> None:
    """By the library and by the command line, with the same line."""
    with time_limit(), pytest.raises(ValueError) as error:
        load_image(str(path))
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)
    with time_limit():
        try:
            check_image(path)
        except UserError as again:
            assert str(again) == " ".join(str(error.value).split())
        else:  # what is damaged after its header shows where it is decoded
            assert "damaged" in str(error.value)


@pytest.mark.parametrize("times", [1, 3], ids=["above the limit", "above twice the limit"])
def test_too_many_pixels(times: int, limited: None, seed: int, tmp_path: Path) -> None:
    """Pillow warns at its limit, and decodes; it refuses at twice of it."""
    width = 200 + seed % 50
    path = png(tmp_path / "large.png", width, times * LIMIT // width + 1)
    refused(path, str(path), f"{LIMIT:,}" if times == 1 else "large")
    assert load_image(png(tmp_path / "fits.png", 250, 200)).size == (250, 200)


def test_the_limit_is_pillows(limited: None, tmp_path: Path, monkeypatch: Any) -> None:
    path = png(tmp_path / "large.png", 251, 200)
    refused(path, "251 x 200 pixels", "PIL.Image.MAX_IMAGE_PIXELS")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path).size == (251, 200)


def test_images_that_others_have_opened(limited: None, tmp_path: Path) -> None:
    with Image.open(png(tmp_path / "large.png", 251, 200)) as opened:
        with pytest.raises(ValueError, match="251 x 200"):
            load_image(opened)
        assert getattr(opened, "_im", None) is None  # not decoded
    with pytest.raises(ValueError, match="the file has 251 x 200"):
        open_image(BytesIO((tmp_path / "large.png").read_bytes()))


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, said in (("pipe.png", "not a regular file"), ("zero.png", "not a regular file"),
                       ("loop.png", "cannot be read"), ("", "folder"), ("none.png", "no such file"),
                       ("x" * 300, "cannot be read")):  # fmt: skip
        refused(tmp_path / name, said)


def test_postscript_is_a_program(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    refused(tmp_path / "a.eps", "EPS", "program")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "ico"])
def test_damaged_images(kind: str, seed: int, tmp_path: Path) -> None:
    """Bytes changed or cut off anywhere: an image, or one line that names the file."""
    array = np.random.default_rng(seed).integers(0, 255, (19, 23, 3), dtype=np.uint8)
    path = tmp_path / f"it.{kind}"
    Image.fromarray(array).save(path, kind)
    content, chance = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(40):
        changed = bytearray(content)
        for place in chance.integers(0, min(len(content), 120), 3):
            changed[place] = chance.integers(256)
        path.write_bytes(bytes(changed[: chance.integers(1, len(changed) + 1)]))
        try:
            with time_limit():
                assert load_image(path).mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)


# Scaled


def processors() -> dict[str, Any]:
    size = {"height": 24, "width": 24}
    clip = image_transform({"vision_cfg": {"image_size": 24}}, {})
    return {
        "shorter side": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=size),
        "padded": LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size=size, do_pad=True),
        "open_clip": clip,
        "open_clip, padded": image_transform({"vision_cfg": {"image_size": 24}}, {}, True),
    }


@pytest.mark.parametrize("name", processors())
def test_a_strip_that_would_be_scaled_to_gigabytes(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 x 100,000 pixels, whose shorter side becomes 24, or which is padded to a square."""
    process = as_image_processor(processors()[name])
    width = 60_000 + seed % 1000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 24 * width - 1)
    strip = Image.new("RGB", (width, 1))
    with time_limit(), pytest.raises(ValueError, match=f"{width:,} x 1 pixels"):
        process([strip])
    with pytest.raises(ValueError, match=f"1 x {width:,} pixels"):
        process([strip.transpose(Image.Transpose.ROTATE_90)])
    ordinary = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (31, 90, 3), np.uint8))
    assert process([ordinary]).shape == (1, 3, 24, 24)


PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24]]
FAMILIES: dict[str, Any] = {
    "LLaVA": lambda: processors()["shorter side"],
    "LLaVA, padded": lambda: LlavaImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_pad=True
    ),
    "SigLIP": lambda: SiglipImageProcessor(size={"height": 24, "width": 24}),
    "LLaVA-NeXT": lambda: tiled_model(0, side=6).image_processor,
    "LLaVA-OneVision": lambda: tiled_model(1, side=6, onevision=True).image_processor,
    "Idefics3": lambda: Idefics3ImageProcessor(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 24}
    ),
    "InternVL": lambda: GotOcr2ImageProcessor(
        size={"height": 24, "width": 24}, crop_to_patches=True
    ),
}
SIZES = [(1, 1), (3, 1), (1, 3), (1, 20), (20, 1), (20_000, 10), (10, 20_000)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_extreme_shapes(name: str, size: tuple[int, int], seed: int, monkeypatch: Any) -> None:
    """Every family's image processor keeps the colour of a plain image, or refuses it clearly."""
    colour = np.random.default_rng(seed).integers(0, 256, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 24 * 1000)
    image = load_image(Image.new("RGB", size, tuple(colour.tolist())))
    processor = FAMILIES[name]()
    try:
        with time_limit():
            if name in ("LLaVA", "LLaVA, padded", "SigLIP"):
                tiles = as_image_processor(processor)([image])
            else:
                tiles = processor(images=[image], return_tensors="pt")["pixel_values"]
    except ValueError as error:
        assert max(size) == 20_000 and name in ("LLaVA", "LLaVA, padded")
        assert "scaled for this model" in str(error) and "\n" not in str(error)
        return
    pixels = tiles.reshape(-1, *tiles.shape[-3:])[0]  # of tiles the first: the whole, or a part
    middle = pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
    found = 255 * (middle * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean))
    if name == "LLaVA, padded" and size != (1, 1):
        return  # the middle may be padding
    assert np.abs(found.numpy() - colour).max() <= 2


@pytest.mark.parametrize("onevision", [False, True], ids=["LLaVA-NeXT", "LLaVA-OneVision"])
@pytest.mark.parametrize("size", SIZES)
def test_extreme_shapes_through_a_model_of_tiles(
    onevision: bool, size: tuple[int, int], seed: int
) -> None:
    """One visual token for every cell and every line's end, and as many as the splice takes."""
    model = tiled_model(seed, onevision=onevision)
    inputs = model.prepare("What is this?", noise_picture(seed, *size), template=None)
    (image,) = inputs.images
    n_cells = sum(rows * columns for rows, columns in image.grids)
    assert len(image.positions) == n_cells + image.grids[1][0]
    with time_limit():
        assert model(inputs).isfinite().all()
    cells = inputs.patches((0, 0, *size))  # all that lie in the image by half
    assert set(range(9)) <= {int(at) - image.start for at in cells}


def test_a_processor_for_much_larger_images(seed: int, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path, seed)
    size = {"height": 100_000, "width": 100_000}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"scales images to 100,000 .* takes 24"):
        load(folder)


LARGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a crop": ("clip", {"crop_size": {"height": 10**5, "width": 10**5}}, "100,000 .*crop_size"),
    "tiles": ("idefics3", {"max_image_size": {"longest_edge": 10**5}}, "100,000 .*max_image_size"),
    "an area": (
        "qwen",
        {"size": {"shortest_edge": 10**12, "longest_edge": 10**13}},
        "at least 1,0",
    ),
    "many tiles": ("internvl", {"max_patches": 10**6}, "1,000,000 tiles .*may have 256"),
}


@pytest.mark.parametrize("case", LARGE)
def test_every_field_of_a_processor_that_makes_images_large(
    case: str, seed: int, tmp_path: Path
) -> None:
    kind, fields, message = LARGE[case]
    if kind == "clip":
        write_tiny_llava(tmp_path, seed)
        CLIPImageProcessor(size={"shortest_edge": 24}, **fields).save_pretrained(tmp_path)
    elif kind == "idefics3":
        family = tiled_models.FAMILIES["idefics3"]
        tiled_models.write(family, tmp_path, tiled_models.random_idefics(family), **fields)
    elif kind == "qwen":
        hf = qwen_models.random_qwen("qwen2", random.Random(seed))
        qwen_models.write("qwen2", tmp_path, hf)
        Qwen2VLImageProcessor(**fields).save_pretrained(tmp_path)
        (tmp_path / "processor_config.json").unlink(missing_ok=True)
    else:
        family = internvl_models.FAMILIES["Qwen2"]
        made = internvl_models.write(family, tmp_path, internvl_models.random_internvl(family))
        made.image_processor.max_patches = fields["max_patches"]
        made.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


WITHOUT_SENSE: dict[str, tuple[dict[str, Any], str]] = {
    "a deviation of 0": ({"image_std": [0.5, 0.0, 0.5]}, "image_std=.*may be 0"),
    "a mean of NaN": ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean=.*finite"),
    "an infinite factor": ({"rescale_factor": float("inf")}, "rescale_factor=inf; .*finite"),
    "a word": ({"image_mean": ["half"] * 3}, "image_mean=.*finite"),
    "a side below 0": ({"size": {"height": -1, "width": 24}}, "size=.*one pixel or more"),
    "an empty crop": ({"crop_size": {"height": 0, "width": 0}}, "crop_size=.*one pixel"),
    "no filter": ({"resample": 99}, "resample=99; it is one of 0 .NEAREST., .*3 .BICUBIC."),
}


@pytest.mark.parametrize("case", WITHOUT_SENSE)
def test_fields_of_a_processor_without_sense(case: str, seed: int, tmp_path: Path) -> None:
    fields, message = WITHOUT_SENSE[case]
    folder = write_tiny_llava(tmp_path, seed)
    (folder / "processor_config.json").unlink(missing_ok=True)
    CLIPImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


BOMB = """
import sys
from mmlens.inputs.images import load_image
load_image(sys.argv[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_image_of_a_few_kilobytes_takes_none(tmp_path: Path) -> None:
    path = png(tmp_path / "bomb.png", 13_000, 13_000)
    assert path.stat().st_size < 250_000
    name, said, peak = peak_of(BOMB, str(path), setup="import mmlens.inputs.images")
    assert name == "ValueError" and "13,000 x 13,000" in said
    assert peak < GIGABYTE / 20


FRAME = "measured_frame(CLIPImageProcessor(size=size, crop_size=size), ({side}, {side}))"
SETUP = f"""
from transformers import CLIPImageProcessor
from mmlens.inputs.image_frame import measured_frame
size = {{"height": 24, "width": 24}}
{FRAME.format(side=100)}
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_figure_takes_a_few_images(seed: int) -> None:
    """Pillow's copies of it and torchvision's floats, and none of our own."""
    name, said, peak = peak_of(FRAME.format(side=3000), setup=SETUP)
    assert name == "nothing", said
    assert peak < 8 * 3 * 3000 * 3000  # less than two floats for each channel of each pixel
    assert torch.tensor(measured_frame(processors()["shorter side"], (60, 60))[:2]).abs().max() < 1
