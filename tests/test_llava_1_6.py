"""LLaVA 1.6 in the format of LLaVA's own code: `anyres`, `spatial_unpad`, `model.image_newline`.

The references: LLaVA's `mm_utils.py` for pixels (with Pillow, by hand) and for the size of what is
kept; transformers' `pack_image_features` for the arrangement of the visual tokens.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llava_code_checkpoints as published
import numpy as np
import pytest
import torch
from checkpoint_folders import edit_config, load
from llava_code_checkpoints import Parts, parts, write
from PIL import Image
from rounding import assert_same
from safetensors.torch import load_file
from test_llava_code_prompts import PROMPT, QUESTION, llama_files, picture
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mmlens.checkpoints.errors import CheckpointError
from mmlens.config import AnyResConfig
from mmlens.inputs.layouts.anyres import Tiling
from mmlens.model.transformer import HookedMultimodalTransformer

SIDE = published.GRID * published.PATCH
POSSIBLE = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
PINPOINTS = [[SIDE * across, SIDE * down] for across, down in POSSIBLE]
"""As LLaVA's code has them: width, height."""
SIZES = [(10, 10), (31, 52), (77, 20), (8, 50), (40, 40), (300, 2), (1, 1), (2, 300), (61, 60)]


@dataclass
class Opened:
    """A random LLaVA 1.6: its parts, and the model that mmlens has made of its folder."""

    these: Parts
    newline: Tensor
    model: HookedMultimodalTransformer
    tokenizer: Any


def opened(folder: Path, pinpoints: Any = PINPOINTS) -> Opened:
    """A random checkpoint with its tokenizer."""
    tokenizer = llama_files(folder)
    these = parts("llama", "clip", vocabulary=len(tokenizer))
    newline = torch.randn(these.decoder.config.hidden_size)
    config, tensors = published.llava(these)
    config |= {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": pinpoints,
    }
    model = load(write(folder, (config, tensors | {"model.image_newline": newline})))
    these.image_id = model.cfg.image_token_id or -1
    return Opened(these, newline, model, tokenizer)


def best_resolution(width: int, height: int) -> tuple[int, int]:
    """LLaVA's `select_best_resolution`: (width, height)."""

    def rank(pair: list[int]) -> tuple[int, int]:
        scale = min(pair[0] / width, pair[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return -used, pair[0] * pair[1] - used

    return tuple(min(PINPOINTS, key=rank))  # type: ignore[return-value]


def normalised(image: Image.Image) -> np.ndarray:
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    return ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)


def tiles_of(image: Image.Image) -> np.ndarray:
    """LLaVA's `process_anyres_image`: the whole, then the tiles row by row."""
    across, down = best_resolution(*image.size)
    scales = across / image.width, down / image.height
    if scales[0] < scales[1]:
        size = across, min(math.ceil(image.height * scales[0]), down)
    else:
        size = min(math.ceil(image.width * scales[1]), across), down
    padded = Image.new("RGB", (across, down))
    padded.paste(image.resize(size), ((across - size[0]) // 2, (down - size[1]) // 2))
    corners = [(x, y) for y in range(0, down, SIDE) for x in range(0, across, SIDE)]
    tiles = [padded.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    return np.stack([normalised(tile) for tile in [image.resize((SIDE, SIDE)), *tiles]])


def visual_tokens(made: Opened, these: Parts, image: Image.Image, tiles: Tensor) -> Tensor:
    """What an image becomes: transformers' arrangement of LLaVA's features."""
    vision = SimpleNamespace(image_size=SIDE, patch_size=published.PATCH)
    resolutions = [[height, width] for width, height in PINPOINTS]
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=resolutions)
    found, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),  # type: ignore[arg-type]
        [these.visual_tokens(tiles)],
        torch.tensor([[image.height, image.width]]),
        "default",
        image_newline=made.newline,
    )
    return found[0]


@torch.no_grad()
def test_from_questions_and_images_to_the_logits(seed: int, tmp_path: Path) -> None:
    made = opened(tmp_path)
    assert made.model.cfg.projector is not None and made.model.cfg.projector.anyres is not None
    for size in [*SIZES, *((random.randint(1, 200), random.randint(1, 200)) for _ in range(12))]:
        image = picture(*size)
        inputs = made.model.prepare(QUESTION, image)
        assert inputs.texts == (PROMPT,) and inputs.visual is not None
        pixels = inputs.visual["pixel_values"]
        expected = tiles_of(image)
        assert pixels.shape == expected.shape, size
        # 3 roundings of float32 at values below 4.
        assert np.abs(pixels.numpy() - expected).max() < 1e-6

        def reference(these: Parts, image: Image.Image = image, pixels: Tensor = pixels) -> Tensor:
            pieces = [made.tokenizer(piece)["input_ids"] for piece in PROMPT.split("<image>")]
            before, after = torch.tensor(pieces[0]), torch.tensor(pieces[1][1:])
            embed = these.decoder.get_input_embeddings()
            visual = visual_tokens(made, these, image, pixels)
            whole = torch.cat([embed(before), visual, embed(after)])
            return these.decoder(inputs_embeds=whole[None]).logits

        assert_same(
            made.model(inputs),
            reference(made.these),
            lambda again=reference: again(made.these.rounded_otherwise()),
        )


@torch.no_grad()
def test_several_images_are_all_seen_in_tiles(seed: int, tmp_path: Path) -> None:
    made = opened(tmp_path)
    images = [picture(40, 20), picture(9, 70)]
    inputs = made.model.prepare("Compare <image> with <image>.", images, template=None)
    _, cache = made.model.run_with_cache(inputs, names_filter="projector.hook_out")
    expected = torch.cat(
        [
            visual_tokens(made, made.these, image, torch.tensor(tiles_of(image)).float())
            for image in images
        ]
    )
    assert float((cache["projector.hook_out"][0] - expected).abs().max()) < 1e-4


def test_what_is_kept_is_cut_off_and_not_rounded(seed: int) -> None:
    """LLaVA's `unpad_image`: `int(height * scale)`, where transformers rounds to 7 digits first."""
    cfg = AnyResConfig(
        resolutions=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        tile_size=336,
        tile_grid=(24, 24),
        rounded=False,
    )
    # Of the first ones the product is a whole number, and its float a little less.
    sizes = [(55, 176), (205, 656)]
    sizes += [(random.randint(1, 999), random.randint(1, 999)) for _ in range(400)]
    for height, width in sizes:
        tiling = Tiling.of((height, width), cfg)
        rows, cols = (24 * n for n in tiling.tiles)
        if width / height > cols / rows:
            padding = (rows - int(height * (cols / width))) // 2
            assert tiling.kept == (slice(padding, rows - padding), slice(0, cols))
        else:
            padding = (cols - int(width * (rows / height))) // 2
            assert tiling.kept == (slice(0, rows), slice(padding, cols - padding))
    for size in sizes[:2]:
        assert Tiling.of(size, cfg) != Tiling.of(size, replace(cfg, rounded=True))


def test_pinpoints_as_a_text(seed: int, tmp_path: Path) -> None:
    text = str([tuple(pair) for pair in PINPOINTS])
    anyres = opened(tmp_path, text).model.cfg.projector.anyres  # type: ignore[union-attr]
    assert anyres is not None
    assert anyres.resolutions == tuple((height, width) for width, height in PINPOINTS)


@pytest.mark.parametrize(
    "pinpoints",
    ["(1x1),...,(6x6)", "__import__('os')", None, 3, [[15, 30, 45]], [["15", 30]], [[7, 15]], []],
)
def test_pinpoints_that_are_none(pinpoints: Any, seed: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*(image_grid_pinpoints|resolutions)"):
        opened(tmp_path, pinpoints)


@pytest.mark.parametrize("merge", ["spatial", "flat", None])
def test_other_arrangements_are_refused(merge: Any, seed: int, tmp_path: Path) -> None:
    opened(tmp_path)
    edit_config(tmp_path, mm_patch_merge_type=merge)
    with pytest.raises(CheckpointError, match="image_aspect_ratio|mm_patch_merge_type"):
        load(tmp_path)


def test_written_in_its_own_format_again(seed: int, tmp_path: Path) -> None:
    made = opened(tmp_path / "one")
    made.model.save_pretrained(tmp_path / "two")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert before.keys() == after.keys() and "model.image_newline" in after
    assert all(torch.equal(before[name], after[name]) for name in before)
