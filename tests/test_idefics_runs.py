"""Idefics3 and SmolVLM: masks, generation, branches, files, half precision and geometry."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cell_checks import check_cells
from checkpoint_checks import (
    check_branches,
    check_greedy_generation,
    check_saved,
    check_shared_images,
    check_traces_over_tiles,
    inputs_of,
    positioned,
)
from checkpoint_folders import load, merge_config, refused
from half_precision import check_towers_and_logits
from PIL import Image
from random_models import in_dtype
from rounding import assert_same, rounded_otherwise
from tiled_models import (
    FAMILIES,
    Family,
    random_batch,
    random_idefics,
    random_image,
    write,
)
from torch import Tensor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from mmlens import Intervention
from mmlens.inputs.processor import Processor
from mmlens.interventions.functions import scale
from mmlens.model.components.tower_positions import nearest_positions

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def padded_masks(batch: dict[str, Any], patch: int, chance: random.Random) -> Tensor:
    """Pixel masks that leave out some rows and columns of every tile, as of images not scaled."""
    masks = torch.zeros_like(batch["pixel_attention_mask"])
    for row in masks:
        for mask in row:
            height, width = (chance.randint(patch + 1, side) for side in mask.shape)
            mask[:height, :width] = 1
    return masks


# The tower


def test_positions_are_those_of_transformers_for_every_grid(seed: int) -> None:
    """A weight that is its own number shows which was taken."""
    chance = random.Random(seed)
    moved = 0
    for learnt in (4, 7, 25, 26, 27, 31, 32, 70):
        config = Idefics3VisionConfig(hidden_size=1, patch_size=1, image_size=learnt)
        theirs = Idefics3VisionEmbeddings(config)
        for parameter in theirs.parameters():
            parameter.data.zero_()
        theirs.position_embedding.weight.data[:, 0] = torch.arange(learnt**2)
        for rows, cols in [(learnt, learnt), (chance.randint(1, 80), chance.randint(1, 80))]:
            seen = torch.zeros(3, rows, cols, dtype=torch.bool)
            seen[0] = True
            for tile in seen[1:]:
                tile[: chance.randint(1, rows), : chance.randint(1, cols)] = True
            with torch.no_grad():
                expected = theirs(torch.zeros(3, 3, rows, cols), seen)[..., 0].long()
            found = nearest_positions(seen, (learnt, learnt))
            assert torch.equal(found, expected)
            if (rows, cols) == (learnt, learnt):
                moved += int((found[0] != torch.arange(learnt**2)).any())
    assert moved  # rounding moves some, so that the learnt positions in order would be wrong


@EVERY
@torch.no_grad()
def test_masked_pixels_equal_hugging_face(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    hf = random_idefics(family)
    batch = random_batch(write(family, tmp_path, hf), [1, 2], chance)
    real = batch["attention_mask"].bool()
    whole = load(tmp_path)(**batch)
    batch["pixel_attention_mask"] = padded_masks(batch, family.patch, chance)
    model = load(tmp_path)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def theirs(hf: Any) -> Tensor:
        return hf(**batch, position_ids=positions).logits[real]

    ours = model(**batch)
    assert_same(ours[real], theirs(hf), lambda: theirs(rounded_otherwise(hf)))
    listening = model.run_with_cache(**batch)[0]
    assert_same(listening[real], theirs(hf), lambda: theirs(rounded_otherwise(hf)))
    assert float((ours - whole)[real].abs().max()) > 1e-2


@EVERY
@torch.no_grad()
def test_a_cache_of_some_rows_has_the_positions_of_their_tiles(
    family: Family, seed: int, tmp_path: Path
) -> None:
    """Each tile has learnt positions of its own where masks differ."""
    chance = random.Random(seed)
    batch = random_batch(write(family, tmp_path, random_idefics(family)), [1, 0, 2], chance)
    batch["pixel_attention_mask"] = padded_masks(batch, family.patch, chance)
    model = load(tmp_path)
    inputs = model.inputs_from_tokens(batch.pop("input_ids"), **batch)
    cache = model.run_with_cache(inputs)[1]
    for rows in ([0], [2], [2, 0]):
        alone = model.run_with_cache(inputs.rows(rows))[1]
        some = cache.apply_slice_to_batch_dim(rows)
        kept = [name for name in alone if name.startswith(("vision.", "projector."))]
        assert "vision.hook_pos_embed" in kept
        for name in kept:
            torch.testing.assert_close(some[name], alone[name], rtol=0, atol=1e-4)


# Runs


@EVERY
def test_greedy_generation_equals_hugging_face(family: Family, seed: int, tmp_path: Path) -> None:
    hf = random_idefics(family)
    batch = random_batch(write(family, tmp_path, hf), [1, 0, 2], random.Random(seed))
    check_greedy_generation(load(tmp_path), hf, batch, 9)


@EVERY
def test_every_hook_is_alive(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_idefics(family))
    model = load(tmp_path)
    image = random_image((2 * family.side, family.side), seed)
    model.image_processor.size = {"longest_edge": 2 * family.side}  # two tiles
    assert model.verify_hooks(model.prepare("Which?", image)) == []
    assert {"vision.ln_final.hook_scale", "vision.ln_final.hook_normalized"} <= set(model.hook_dict)


@EVERY
@pytest.mark.parametrize("masked", [False, True], ids=["whole tiles", "padded tiles"])
def test_branches_equal_plain_runs(family: Family, masked: bool, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    batch = random_batch(write(family, tmp_path, random_idefics(family)), [1, 2], chance)
    if masked:
        batch["pixel_attention_mask"] = padded_masks(batch, family.patch, chance)
    model = load(tmp_path)
    own = [
        Intervention("vision.pos_embed", None, [2], scale(1.4)),
        Intervention("vision.ln_final.scale", None, [2], scale(1.4)),
        Intervention("vision.mlp_out", chance.randrange(3), [1, 2], scale(1.4)),
    ]
    check_branches(model, inputs_of(model, batch), own, chance)


@EVERY
def test_traces_over_images_in_tiles(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_idefics(family))
    model = load(tmp_path)
    model.image_processor.size = {"longest_edge": 2 * family.side}  # two tiles
    image, other = random_image((40, 20), seed), random_image((20, 60), seed + 1)
    check_traces_over_tiles(model, image, other, ["projector.out"], seed % 3)


@EVERY
def test_prompts_on_one_image_share_it(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_idefics(family))
    images = [random_image((30, 50), seed + number) for number in range(2)]
    check_shared_images(load(tmp_path), images)


@EVERY
@torch.no_grad()
def test_a_saved_model_opens_in_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    hf = random_idefics(family, tie_word_embeddings=random.Random(seed).random() < 0.5)
    batch = random_batch(write(family, tmp_path / "a", hf), [2, 1], random.Random(seed))
    model = load(tmp_path / "a")
    model.vision.ln_final.w.mul_(1.5)
    model.projector.linear_1.weight.add_(torch.randn_like(model.projector.linear_1.weight) / 9)
    check_saved(model, hf, batch, positioned(batch), tmp_path / "b")


def in_half_precision(
    family: Family, folder: Path, dtype: torch.dtype, chance: random.Random
) -> tuple[Any, Any, Any]:
    """Write a random checkpoint; transformers' model, a batch, and what that model is given."""
    hf = in_dtype(random_idefics(family), dtype)
    batch = random_batch(write(family, folder, hf), [1, 2], chance)
    return hf, batch, positioned(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("listening", [False, True], ids=["fused", "all hooks listen"])
@pytest.mark.slow
def test_half_precision_is_as_exact_as_hugging_face(
    dtype: torch.dtype, listening: bool, seed: int, tmp_path: Path
) -> None:
    """Texts of one tag a token reach position 160, tags in many tokens position 700."""
    check_towers_and_logits(
        list(FAMILIES.values()),
        in_half_precision,
        lambda output: torch.cat(output.image_outputs.pooler_output),
        dtype=dtype,
        listening=listening,
        seed=seed,
        folder=tmp_path,
    )


# Geometry


@EVERY
@pytest.mark.parametrize("size", [(2, 1), (1, 2), (4, 3)], ids=str)
def test_a_cell_covers_the_pixels_that_its_token_depends_on(
    family: Family, size: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    write(family, tmp_path, random_idefics(family))
    model = load(tmp_path)
    unit = family.side * (2 if max(size) > 2 else 4)
    width, height = (side * unit + chance.randrange(9) for side in size)
    (tokens,) = model.prepare("Which?", Image.new("RGB", (width, height))).images
    assert len(tokens.views) - 1 in (8, 12, 16)
    check_cells(model, (width, height), unit, family.n_tokens, chance)


# What is no prompt of an image


@EVERY
def test_separators_are_text(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_idefics(family))
    processor = Processor.from_pretrained(tmp_path)
    inputs = processor("What is this?", random_image((family.side * 3, family.side * 2), seed))
    (image,) = inputs.images
    rows, cols = 3, 4  # of the longest edge, 4 tiles
    assert len(image.grids) == rows * cols + 1 and len(set(image.grids)) == 1
    assert len(image.positions) == family.n_tokens * (rows * cols + 1)
    labels = inputs.labels()
    assert inputs.str_tokens is not None
    separators = [
        image.start + offset for offset, cell in enumerate(image.cells.tolist()) if cell[0] < 0
    ]
    assert all(re.fullmatch(r"<img [^<>]+>", labels[position]) for position in separators)
    block = "".join(inputs.str_tokens[0][position] for position in separators)
    fence = "<fake_token_around_image>"
    lines = [
        "".join(f"{fence}<row_{row}_col_{col}>" for col in range(1, cols + 1))
        for row in range(1, rows + 1)
    ]
    assert block == "\n".join([*lines, "", f"{fence}<global-img>{fence}"])
    last = image.grids[0][1] - 1
    assert labels[inputs.patch(0, last)] == f"<img 0:0,{last}>"
    assert labels[inputs.patch(last, 0, view=5)] == f"<img 5:{last},0>"
    assert set(inputs.span("text").tolist()).isdisjoint(inputs.span("image").tolist())


@EVERY
def test_tiles_in_another_order_are_refused(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_idefics(family))
    processor = Processor.from_pretrained(tmp_path)
    inputs = processor("What is this?", random_image((family.side * 3, family.side * 2), seed))
    (image,) = inputs.images
    visual = dict(inputs.visual)
    n = family.n_tokens
    last = image.positions[-n:]
    without_whole = torch.cat([inputs.tokens[:, : last[0]], inputs.tokens[:, last[-1] + 1 :]], 1)
    fewer = {name: tensor[:-1] for name, tensor in visual.items()}
    with pytest.raises(ValueError, match=r"the tiles of an image are \[\(1, 1\), .*0 x 0"):
        processor.from_tokens(without_whole, **fewer)
    second = image.positions[2 * n]  # from the third tile on
    between = image.start + (image.cells[:, 0] == 1).nonzero().flatten()[-1] + 1
    without_second = torch.cat([inputs.tokens[:, :between], inputs.tokens[:, second:]], 1)
    with pytest.raises(ValueError, match=r"row by row"):
        processor.from_tokens(without_second, **fewer)
    with pytest.raises(ValueError, match=r"tiles, but tokens of"):
        processor.from_tokens(inputs.tokens, **fewer)
    if n > 1:
        with pytest.raises(ValueError, match=r"has \d+ of them without a gap"):
            processor.from_tokens(inputs.tokens[:, : last[-1]], **visual)
    batched = {name: tensor[None] for name, tensor in fewer.items()}
    with pytest.raises(ValueError, match=r"for rows whose tokens are of \[13\] tiles"):
        processor.from_tokens(inputs.tokens, **batched)
    with pytest.raises(ValueError, match=r"has no tokenizer to read it"):
        Processor(processor.cfg, None).from_tokens(inputs.tokens, **visual)


def test_a_tile_without_text_before_it_is_a_whole_image(seed: int, tmp_path: Path) -> None:
    family = FAMILIES["smolvlm"]
    write(family, tmp_path, random_idefics(family))
    model = load(tmp_path)
    block = [model.cfg.image_token_id] * family.n_tokens
    tokens = torch.tensor([[1, 9, *block, 11, *block, *block, 5]])
    pixels = torch.randn(3, 3, family.side, family.side)
    inputs = model.inputs_from_tokens(tokens, pixels)
    assert [image.start for image in inputs.images] == [2, 7, 11]
    assert [len(image.grids) for image in inputs.images] == [1, 1, 1]
    model.tokenizer = None
    two = model.inputs_from_tokens(tokens[:, :11], pixels[:2])
    assert [image.start for image in two.images] == [2, 7]
    assert model(two).isfinite().all()


def test_videos_are_refused(seed: int, tmp_path: Path) -> None:
    family = FAMILIES["smolvlm"]
    write(family, tmp_path, random_idefics(family))
    model = load(tmp_path)
    with pytest.raises(ValueError, match=r"pixel_values_videos \(this model takes no videos\)"):
        model(torch.tensor([[1, 2]]), pixel_values_videos=torch.zeros(1, 2, 3, 4, 4))
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ValueError, match=r"clip\.mp4 is a video; .* images"):
        model.prepare("What happens?", video)
    assert "num2words" not in sys.modules  # which videos need, and images do not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"model_type": "gpt2"}}, "'gpt2' decoder"),
        ({"scale_factor": 5}, "scale_factor is 5, but a tile has 6 x 6 patches"),
        ({"scale_factor": 0}, "scale_factor is 0, but"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_built_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(FAMILIES["idefics3"], tmp_path, random_idefics(FAMILIES["idefics3"]))
    merge_config(tmp_path, change)
    refused(tmp_path, message)
