"""InternVL: prompts, pixels, logits, hooks, branches and saved files equal transformers'."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cell_checks import check_cells
from checkpoint_checks import (
    check_branches,
    check_greedy_generation,
    check_logits_and_hooks,
    check_same_images,
    check_saved,
    check_traces_over_tiles,
    inputs_of,
    positioned,
)
from checkpoint_folders import load, merge_config, refused
from half_precision import check_towers_and_logits
from internvl_models import (
    FAMILIES,
    Family,
    internvl_activations,
    random_batch,
    random_internvl,
    write,
)
from random_models import in_dtype
from rounding import assert_same, rounded_otherwise
from slow_cases import some_fast
from tiled_models import SIZES, random_image, random_texts
from transformers import AutoTokenizer

from mmlens import Intervention, causal_trace, swap_image
from mmlens.analyses.trace_grid import labels_at
from mmlens.data.image_pairs import ImagePair
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.interventions.functions import scale

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def ours_of(text: str) -> str:
    """A prompt as mmlens has it."""
    return text.replace("<IMG_CONTEXT>", "<image>")


def same_inputs(inputs: MultimodalInputs, batch: dict[str, Any]) -> None:
    assert torch.equal(inputs.tokens, batch["input_ids"])
    assert torch.equal(inputs.attention_mask, batch["attention_mask"].bool())
    if inputs.visual is None:
        assert "pixel_values" not in batch
    else:
        assert torch.equal(inputs.visual["pixel_values"], batch["pixel_values"])


# Inputs


@EVERY
def test_prompts_of_one_image_equal_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    theirs = write(family, tmp_path, random_internvl(family))
    ours = Processor.from_pretrained(tmp_path)
    n_views = set()
    for size in SIZES:
        image = random_image(size, chance.randrange(2**31))
        text = chance.choice(
            ["<IMG_CONTEXT>Which?", "The flag <IMG_CONTEXT>", "In\n<IMG_CONTEXT>\n"]
        )
        batch = dict(theirs(text=text, images=image, return_tensors="pt"))
        inputs = ours(ours_of(text), image, template=None)
        same_inputs(inputs, batch)
        ids = batch.pop("input_ids")
        check_same_images(inputs, ours.from_tokens(ids, **batch))
        n_views.add(len(inputs.images[0].views))
    assert len(n_views) > 1


@EVERY
def test_batches_of_several_images_equal_transformers(
    family: Family, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    theirs = write(family, tmp_path, random_internvl(family))
    ours = Processor.from_pretrained(tmp_path)
    for counts in ([2], [3], [1, 3, 2], [1, 0, 2], [0, 0]):
        texts, images = random_texts(counts, "<IMG_CONTEXT>", chance)
        flat = [image for row in images for image in row] or None
        batch = dict(theirs(text=texts, images=flat, padding=True, return_tensors="pt"))
        inputs = ours(list(map(ours_of, texts)), images, template=None)
        same_inputs(inputs, batch)
        assert inputs.n_images == tuple(counts)
        ids = batch.pop("input_ids")
        check_same_images(inputs, ours.from_tokens(ids, **batch))


@EVERY
def test_the_chat_template_is_that_of_transformers(
    family: Family, seed: int, tmp_path: Path
) -> None:
    theirs = write(family, tmp_path, random_internvl(family))
    ours = Processor.from_pretrained(tmp_path)
    images = [random_image((30, 20), seed), random_image((20, 60), seed + 1)]
    for n_images in (0, 1, 2):
        parts = [*[{"type": "image"}] * n_images, {"type": "text", "text": "Which country?"}]
        turn = [{"role": "user", "content": parts}]
        text = theirs.apply_chat_template(turn, add_generation_prompt=True)
        assert text.startswith("<|im_start|>user\n" + "<IMG_CONTEXT>\n" * n_images + "Which")
        given = images[:n_images] or None
        batch = theirs(text=text, images=given, return_tensors="pt")
        same_inputs(ours("Which country?", images[:n_images]), dict(batch))


def test_spans_and_labels(seed: int, tmp_path: Path) -> None:
    family = FAMILIES["Qwen2"]
    write(family, tmp_path, random_internvl(family))
    processor = Processor.from_pretrained(tmp_path)
    size = (family.side * 3, family.side * 2)
    inputs = processor("What is this?", random_image(size, seed), spans={"constraint": "this"})
    (image,) = inputs.images
    assert image.grids == ((3, 3),) * 7
    labels = inputs.labels()
    assert (labels[image.start - 1], labels[image.start + image.length]) == ("<img>", "</img>")
    assert labels[inputs.patch(0, 2)] == "<img 0:0,2>"
    assert labels[inputs.patch(2, 0, view=5)] == "<img 5:2,0>"
    assert inputs.texts is not None and "<image>" in inputs.texts[0]
    assert inputs.str_tokens is not None
    assert "".join(inputs.str_tokens[0][i] for i in inputs.span("constraint")).strip() == "this"
    left = family.side  # the second tile of the first row
    shown = inputs.patches((left, 0, 2 * left, left))
    views = {int(view) for view in inputs.grid[0, shown, 1]}
    assert views == {0, 2}


# The model


@EVERY
@pytest.mark.parametrize("images", [[1], [1, 0, 2], [0, 0]], ids=str)
def test_logits_and_every_hook_equal_hugging_face(
    family: Family, images: list[int], seed: int, tmp_path: Path
) -> None:
    hf = random_internvl(family)
    batch = random_batch(write(family, tmp_path, hf), images, random.Random(seed))
    check_logits_and_hooks(load(tmp_path), hf, batch, lambda hf: internvl_activations(hf, batch))


@EVERY
@torch.no_grad()
def test_tiles_of_another_size_have_interpolated_positions(
    family: Family, seed: int, tmp_path: Path
) -> None:
    hf = random_internvl(family)
    write(family, tmp_path, hf)
    model = load(tmp_path)
    side = 2 * family.factor * family.patch + 2 * family.factor * family.patch * (seed % 2)
    pixels = torch.randn(2, 3, side, side)
    block = [model.cfg.image_token_id] * (side // family.patch // family.factor) ** 2
    ids = torch.tensor([[5, *block, 7, *block, 9, 8]])
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    theirs = hf(**batch).logits
    assert_same(model(**batch), theirs, lambda: rounded_otherwise(hf)(**batch).logits)


@EVERY
def test_greedy_generation_equals_hugging_face(family: Family, seed: int, tmp_path: Path) -> None:
    hf = random_internvl(family)
    batch = random_batch(write(family, tmp_path, hf), [1, 0, 2], random.Random(seed))
    check_greedy_generation(load(tmp_path), hf, batch, 9)


@some_fast("family", FAMILIES, ["Qwen2"])
def test_every_hook_is_alive(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_internvl(family))
    model = load(tmp_path)
    inputs = model.prepare("Which?", random_image((2 * family.side, family.side), seed))
    assert model.verify_hooks(inputs) == []
    of_norms = {f"vision.blocks.0.attn.{which}_norm.hook_scale" for which in "qk"}
    assert (of_norms <= set(model.hook_dict)) == family.qk_norm
    assert "projector.ln.hook_normalized" in model.hook_dict


@EVERY
def test_branches_equal_plain_runs(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    batch = random_batch(write(family, tmp_path, random_internvl(family)), [1, 2], chance)
    model = load(tmp_path)
    layer = chance.randrange(len(model.vision.blocks))
    own = [
        Intervention("projector.ln.scale", None, [1], scale(1.4)),
        Intervention("projector.pre", None, [2], scale(1.4)),
        Intervention("vision.pos_embed", None, [2], scale(1.4)),
        Intervention("vision.mlp_out", layer, [1, 2], scale(1.4)),
    ]
    if family.qk_norm:
        own.append(Intervention("vision.q_norm.scale[1]", layer, [1, 3], scale(1.4)))
    check_branches(model, inputs_of(model, batch), own, chance)


@EVERY
def test_traces_over_images_in_tiles(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_internvl(family))
    model = load(tmp_path)
    wide, high = (2 * family.side, family.side), (family.side, 3 * family.side)
    image, other = random_image(wide, seed), random_image(high, seed + 1)
    of_connector = ["projector.pre", "projector.out"]
    clean = check_traces_over_tiles(model, image, other, of_connector, seed % 2)
    squares = family.grid // family.factor
    for site in ("projector.pre", "projector.ln.scale"):
        labels = labels_at(model, clean, site)
        name = "img" if family.factor > 1 else "patch"
        assert len(labels) == squares**2
        assert labels[-1] == f"<{name} *:{squares - 1},{squares - 1}>"
    assert len(labels_at(model, clean, "projector.in")) == family.grid**2
    assert labels_at(model, clean, "vision.resid_post")[:2] == ["<cls *>", "<patch *:0,0>"]


def test_as_many_tiles_that_lie_otherwise_are_refused(seed: int, tmp_path: Path) -> None:
    """Neither the tokens nor their cells differ, but each shows another part of its image."""
    family = FAMILIES["Qwen2"]
    write(family, tmp_path, random_internvl(family))
    model = load(tmp_path)
    down, across = random.choice([(1, 2), (2, 3), (1, 3)])
    unit = 2 * family.side
    size = across * unit, down * unit
    image, other = random_image(size, seed), random_image(size[::-1], seed + 1)
    pair = ImagePair.of("Which country is it?", image, "red", other, "blue")
    clean, turned = (model.prepare("Which country is it?", each) for each in (image, other))
    assert torch.equal(clean.tokens, turned.tokens)
    assert len(clean.images[0].views) == len(turned.images[0].views) > 2
    refused_calls: list[Any] = [
        lambda: swap_image(model, clean, other),
        lambda: pair.inputs(model),
        lambda: causal_trace(model, clean, turned, positions=[clean.span("image")]),
    ]
    for call in refused_calls:
        with pytest.raises(ValueError, match="as many tiles, but they lie otherwise.*fit=True"):
            call()
    assert swap_image(model, clean, other, fit=True).images[0].image.size == size
    larger = random_image((2 * size[0], 2 * size[1]), seed + 2)
    assert swap_image(model, clean, larger).images[0].image is not None


@EVERY
@torch.no_grad()
def test_a_saved_model_opens_in_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    hf = random_internvl(family)
    batch = random_batch(write(family, tmp_path / "a", hf), [2, 1], random.Random(seed))
    model = load(tmp_path / "a")
    model.vision.blocks[1].ls_2.mul_(2.0)
    model.projector.ln.w.mul_(1.5)
    if family.qk_norm:
        model.vision.blocks[0].attn.q_norm.w[3:9].mul_(2.0)
    again = check_saved(model, hf, batch, positioned(batch), tmp_path / "b")
    assert again.processor("Which?", random_image((9, 9), seed)).tokens.equal(
        model.processor("Which?", random_image((9, 9), seed)).tokens
    )


def in_half_precision(
    family: Family, folder: Path, dtype: torch.dtype, chance: random.Random
) -> tuple[Any, Any, Any]:
    """Write a random checkpoint; transformers' model, a batch, and what that model is given."""
    hf = in_dtype(random_internvl(family), dtype)
    batch = random_batch(write(family, folder, hf), [1, 2], chance)
    return hf, batch, positioned(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("listening", [False, True], ids=["fused", "all hooks listen"])
@pytest.mark.slow
def test_half_precision_is_as_exact_as_hugging_face(
    dtype: torch.dtype, listening: bool, seed: int, tmp_path: Path
) -> None:
    check_towers_and_logits(
        list(FAMILIES.values()),
        in_half_precision,
        lambda output: output.image_outputs.pooler_output.flatten(0, 1),
        dtype=dtype,
        listening=listening,
        seed=seed,
        folder=tmp_path,
    )


@EVERY
@pytest.mark.parametrize("size", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_a_cell_covers_the_pixels_that_its_token_depends_on(
    family: Family, size: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    write(family, tmp_path, random_internvl(family))
    unit = 4 * family.side
    width, height = (side * unit for side in size)
    check_cells(load(tmp_path), (width, height), unit, family.n_tokens, random.Random(seed))


# What is refused


def test_the_placeholder_of_prepare_is_no_token_of_texts(seed: int, tmp_path: Path) -> None:
    """Its id would be that of no token of the checkpoint's."""
    family = FAMILIES["Qwen2"]
    write(family, tmp_path, random_internvl(family))
    model, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "What is <image_1> <img> here?"
    assert model.to_tokens(text)[0].tolist() == theirs(text)["input_ids"]
    for texts in ("What is <image> here?", ["Paris", "<image>"]):
        with pytest.raises(ValueError, match=r"has <image> in it.*<IMG_CONTEXT>"):
            model.to_tokens(texts)


def test_tokens_that_do_not_fit_are_refused(seed: int, tmp_path: Path) -> None:
    family = FAMILIES["Qwen2"]
    write(family, tmp_path, random_internvl(family))
    processor = Processor.from_pretrained(tmp_path)
    inputs = processor("What is this?", random_image((family.side * 2, family.side), seed))
    assert inputs.visual is not None
    pixels = inputs.visual["pixel_values"]
    with pytest.raises(ValueError, match=r"2 tiles, but the image tokens are those of \[3\]"):
        processor.from_tokens(inputs.tokens, pixels[:2])
    last = int(inputs.images[0].positions[-1])
    fewer = torch.cat([inputs.tokens[:, :last], inputs.tokens[:, last + 1 :]], dim=1)
    with pytest.raises(ValueError, match=r"26 image tokens from position \d+ on in row 0; each"):
        processor.from_tokens(fewer, pixels)
    alone = Processor(processor.cfg, None).from_tokens(inputs.tokens, pixels)
    assert alone.images[0].positions.equal(inputs.images[0].positions)
    with pytest.raises(ValueError, match=r"pixel_values_videos \(this model takes no videos\)"):
        processor.from_tokens(inputs.tokens, pixels, pixel_values_videos=pixels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "internvl_chat"},
            "take the same model in transformers' format, whose name",
        ),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3, but a tile has 6 x 6 patches"),
        ({"downsample_ratio": 0.25}, "downsample_ratio is 0.25, but"),
        ({"vision_feature_layer": [-1, 2]}, "vision_feature_layer [-1, 2], which is no number"),
        ({"vision_feature_layer": 7}, "vision_feature_layer is 7, but a tower of 3 layers"),
        ({"vision_feature_select_strategy": "full"}, "strategy 'full', which leaves the class"),
        ({"vision_config": {"patch_size": [3, 2]}}, "patches of (3, 2) in tiles of (18, 18)"),
        (
            {"vision_config": {"use_qk_norm": True, "layer_norm_eps": 1e-5}},
            "use_qk_norm with layer_norm_eps 1e-05",
        ),
        (
            {"vision_config": {"use_mean_pooling": False, "norm_type": "rms_norm"}},
            "use_mean_pooling false with norm_type 'rms_norm'",
        ),
        ({"text_config": {"model_type": "gpt2"}}, "'gpt2' decoder"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_built_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(FAMILIES["Qwen2"], tmp_path, random_internvl(FAMILIES["Qwen2"]))
    merge_config(tmp_path, change)
    refused(tmp_path, message)
