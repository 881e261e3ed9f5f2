"""Idefics3 and SmolVLM: masks, generation, branches, files, half precision and geometry."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import in_dtype
from rounding import assert_same, rounded_otherwise
from test_branching import assert_equal_to_plain_runs
from test_branching_families import any_edit
from test_model_parity import rms_error
from tiled_models import (
    FAMILIES,
    Family,
    random_batch,
    random_idefics,
    random_image,
    write,
)
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from mmlens import Intervention, causal_trace, swap_image
from mmlens.checkpoints.errors import CheckpointError
from mmlens.inputs.image_tokens import Box
from mmlens.inputs.processor import Processor
from mmlens.inputs.visual import Visual
from mmlens.interventions.functions import scale
from mmlens.model.components.tower_positions import nearest_positions
from mmlens.model.transformer import HookedMultimodalTransformer

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def opened(folder: Path, **options: Any) -> HookedMultimodalTransformer:
    return HookedMultimodalTransformer.from_pretrained(folder, device="cpu", **options)


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
    whole = opened(tmp_path)(**batch)
    batch["pixel_attention_mask"] = padded_masks(batch, family.patch, chance)
    model = opened(tmp_path)
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
    model = opened(tmp_path)
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
    hf.generation_config = GenerationConfig()
    model = opened(tmp_path)
    model.generation_config = GenerationConfig()
    suppressed = [model.cfg.image_token_id]
    n_new = 9
    theirs = hf.generate(
        **batch,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        suppress_tokens=suppressed,
        pad_token_id=0,
    )
    of_batch = model.generate(**batch, max_new_tokens=n_new, stop_at_eos=False)
    assert torch.equal(of_batch, theirs)
    inputs = model.inputs_from_tokens(batch.pop("input_ids"), **batch)
    ours = model.generate(inputs, n_new, return_type="tokens", stop_at_eos=False)
    assert torch.equal(ours, theirs)


@EVERY
def test_every_hook_is_alive(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_idefics(family))
    model = opened(tmp_path)
    image = random_image((2 * family.side, family.side), seed)
    model.image_processor.size = {"longest_edge": 2 * family.side}  # two tiles
    assert model.verify_hooks(model.prepare("Which?", image)) == []
    assert {"vision.ln_final.hook_scale", "vision.ln_final.hook_normalized"} <= set(model.hook_dict)


@EVERY
@pytest.mark.parametrize("masked", [False, True], ids=["whole tiles", "padded tiles"])
@torch.no_grad()
def test_branches_equal_plain_runs(family: Family, masked: bool, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    batch = random_batch(write(family, tmp_path, random_idefics(family)), [1, 2], chance)
    if masked:
        batch["pixel_attention_mask"] = padded_masks(batch, family.patch, chance)
    model = opened(tmp_path)
    inputs = model.inputs_from_tokens(batch.pop("input_ids"), **batch)
    branches = [
        [any_edit(model, inputs, chance) for _ in range(chance.choice([1, 1, 2]))] for _ in range(8)
    ]
    visual = inputs.images[0].positions[-2:].tolist()
    layer = chance.randrange(3)
    branches += [
        [Intervention("mlp_out", layer, visual, scale(1.7))],
        [Intervention("resid_post", layer, [inputs.n_pos - 1], scale(1.3))],
        [Intervention("projector.in", None, [0, 3], scale(1.4))],
        [Intervention("projector.out", None, [1], scale(1.4))],
        [Intervention("vision.pos_embed", None, [2], scale(1.4))],
        [Intervention("vision.ln_final.scale", None, [2], scale(1.4))],
        [Intervention("vision.mlp_out", layer, [1, 2], scale(1.4))],
    ]
    assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=chance.choice([None, 3]))


@EVERY
@torch.no_grad()
def test_traces_over_images_in_tiles(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    write(family, tmp_path, random_idefics(family))
    model = opened(tmp_path)
    model.image_processor.size = {"longest_edge": 2 * family.side}  # two tiles
    image, other = random_image((40, 20), seed), random_image((20, 60), seed + 1)
    clean = model.prepare("Which country?", image)
    with pytest.raises(ValueError, match="give one of the same size, or fit=True"):
        swap_image(model, clean, other)
    corrupted = swap_image(model, clean, other, fit=True)
    fitted = model.prepare("Which country?", other.resize((40, 20), Image.Resampling.BICUBIC))
    assert torch.equal(corrupted.visual["pixel_values"], fitted.visual["pixel_values"])
    whole, tile = (clean.images[0].block((0, 0, 1, 1), view=view) for view in (0, 2))
    for site, positions in (
        ("resid_post", [whole, tile, clean.span("last"), clean.patches((0, 0, 20, 20))]),
        ("vision.mlp_out", [[0], [3, 5]]),
        ("projector.out", [[0], [2]]),
    ):
        layers = None if site == "projector.out" else [chance.randrange(3)]
        given = {"sites": (site,), "positions": positions, "layers": layers, "window": 1}
        found, expected = (
            causal_trace(model, clean, corrupted, method=method, **given)
            for method in ("branch", "naive")
        )
        assert float((found.restored - expected.restored).abs().max()) < 1e-5
        assert float((expected.restored - expected.corrupted).abs().max()) > 0


@EVERY
@torch.no_grad()
def test_prompts_on_one_image_share_it(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_idefics(family))
    model = opened(tmp_path)
    image = random_image((30, 50), seed)
    asked = [model.prepare(text, image) for text in ("Which country?", "Which flag is it?")]
    asked.append(model.prepare("Which country?", random_image((30, 50), seed + 1)))
    for inputs, recording in zip(asked, model.record_many(asked), strict=True):
        plain = model(inputs)[:, -1]
        assert float((recording.logits()[:, -1] - plain).abs().max()) < 1e-4


@EVERY
@torch.no_grad()
def test_a_saved_model_opens_in_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    hf = random_idefics(family, tie_word_embeddings=random.Random(seed).random() < 0.5)
    batch = random_batch(write(family, tmp_path / "a", hf), [2, 1], random.Random(seed))
    model = opened(tmp_path / "a")
    model.blocks[1].mlp.W_out[2:5].mul_(-2.0)
    model.vision.blocks[0].attn.W_V[0].mul_(3.0)
    model.vision.ln_final.w.mul_(1.5)
    model.projector.linear_1.weight.add_(torch.randn_like(model.projector.linear_1.weight) / 9)
    model.save_pretrained(tmp_path / "b")
    reread = type(hf).from_pretrained(tmp_path / "b")
    real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def theirs(hf: Any) -> Tensor:
        return hf(**batch, position_ids=positions).logits[real]

    ours = model(**batch)[real]
    assert_same(ours, theirs(reread), lambda: theirs(rounded_otherwise(reread)))
    assert float((ours - theirs(hf)).abs().max()) > 1e-2
    again = opened(tmp_path / "b")
    assert torch.equal(again(**batch)[real], ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("listening", [False, True], ids=["fused", "all hooks listen"])
@pytest.mark.slow
@torch.no_grad()
def test_half_precision_is_as_exact_as_hugging_face(
    dtype: torch.dtype, listening: bool, seed: int, tmp_path: Path
) -> None:
    """As in test_model_parity: the geometric mean of ratios of root mean square errors.

    Texts of one tag a token reach position 160, tags in many tokens position 700.
    """
    ratios: dict[str, list[float]] = {"logits": [], "visual tokens": []}
    families = list(FAMILIES.values())
    for index in range(36):
        family = families[index % len(families)]
        folder = tmp_path / str(index)
        hf = in_dtype(random_idefics(family), dtype)
        batch = random_batch(write(family, folder, hf), [1, 2], random.Random(seed + index))
        model = opened(folder)
        assert model.cfg.dtype == dtype and model.W_E.dtype == dtype
        hf.set_attn_implementation("eager" if listening else "sdpa")
        names = None if listening else ["projector.hook_out"]
        logits, cache = model.run_with_cache(**batch, names_filter=names)
        seen = {"logits": logits, "visual tokens": cache["projector.hook_out"][0]}
        theirs = both(hf, batch)
        rounded = batch["pixel_values"].to(dtype).double()  # both towers begin with this
        hf = in_dtype(hf, torch.float64)
        hf.set_attn_implementation("sdpa")  # eager attention takes its softmax in float32
        exact = both(hf, {**batch, "pixel_values": rounded})
        real = batch["attention_mask"].bool()
        for name, found in seen.items():
            ours, other, right = (
                each[real] if name == "logits" else each
                for each in (found, theirs[name], exact[name])
            )
            ratios[name].append(rms_error(ours, right) / rms_error(other, right))
    for name, found in ratios.items():
        ratio = float(torch.tensor(found).log().mean().exp())
        print(f"{name}: error / Hugging Face's: {ratio:.3f}, single models to {max(found):.2f}")
        assert ratio <= 1.1


def both(hf: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Transformers' logits and visual tokens."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = hf(**batch, position_ids=positions)
    return {"logits": output.logits, "visual tokens": torch.cat(output.image_outputs.pooler_output)}


# Geometry


@torch.no_grad()
def without_attention(model: HookedMultimodalTransformer) -> None:
    """Each feature then depends on the pixels of its own patch alone."""
    for block in model.vision.blocks:
        block.attn.W_O.zero_()


@EVERY
@pytest.mark.parametrize("size", [(2, 1), (1, 2), (4, 3)], ids=str)
@torch.no_grad()
def test_a_cell_covers_the_pixels_that_its_token_depends_on(
    family: Family, size: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    """Of squares all over the image, each changed alone, the one that moves a token most lies in
    its cell, in every view."""
    chance = random.Random(seed)
    write(family, tmp_path, random_idefics(family))
    model = opened(tmp_path)
    without_attention(model)
    assert model.projector is not None
    unit = family.side * (2 if max(size) > 2 else 4)
    width, height = (side * unit + chance.randrange(9) for side in size)
    plain = np.full((height, width, 3), 128, dtype=np.uint8)
    (tokens,) = model.prepare("Which?", Image.fromarray(plain)).images
    tiles = tokens.views[1:]
    assert len(tiles) in (8, 12, 16)
    squares = [
        view.cell_box(row, col)
        for view in tiles
        for row in range(view.grid[0])
        for col in range(view.grid[1])
    ]
    images = [Image.fromarray(plain)]
    for box in squares:
        changed = plain.copy()
        middle = (box.top + box.bottom) / 2, (box.left + box.right) / 2
        y, x = (slice(int(at - unit / 40), int(at + unit / 40) + 1) for at in middle)
        changed[y, x] = chance.choice([0, 255])
        images.append(Image.fromarray(changed))
    processed = model.processor.layout.processed(model.image_processor, model.tokenizer, images)
    visual = Visual.joined([Visual.of_one(one.visual) for one in processed])
    assert visual is not None
    found = model.projector(model.vision.of_images(visual), visual)[0]
    found = found.unflatten(0, (len(images), -1))
    moved = (found[1:] - found[:1]).norm(dim=-1)  # [square, token]
    cells = tokens.cells[tokens.is_visual].tolist()
    assert len(cells) == moved.shape[1] == family.n_tokens * len(tokens.views)
    for (view, row, col), most in zip(cells, moved.argmax(dim=0).tolist(), strict=True):
        box, square = tokens.views[view].cell_box(row, col), squares[most]
        assert box == square if view else near(box, square), (view, row, col)


def near(box: Box, square: Box) -> bool:
    """Whether the middle of a square lies in a box, or a tenth of its side beyond."""
    x, y = (square.left + square.right) / 2, (square.top + square.bottom) / 2
    width, height = 0.1 * (box.right - box.left), 0.1 * (box.bottom - box.top)
    return (
        box.left - width <= x <= box.right + width and box.top - height <= y <= box.bottom + height
    )


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
    model = opened(tmp_path)
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
    model = opened(tmp_path)
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
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(tmp_path)
