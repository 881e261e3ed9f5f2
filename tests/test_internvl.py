"""InternVL: prompts, pixels, logits, hooks, branches and saved files equal transformers'."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from internvl_models import (
    FAMILIES,
    SIZES,
    Family,
    internvl_activations,
    random_batch,
    random_image,
    random_internvl,
    random_texts,
    write,
)
from PIL import Image
from random_models import in_dtype
from rounding import assert_same, rounded_otherwise
from test_branching import assert_equal_to_plain_runs
from test_branching_families import any_edit
from test_idefics_runs import near, without_attention
from test_model_parity import rms_error
from torch import Tensor
from transformers import GenerationConfig

from mmlens import Intervention, causal_trace, swap_image
from mmlens.analyses.trace_grid import labels_at
from mmlens.checkpoints.errors import CheckpointError
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.processor import Processor
from mmlens.inputs.visual import Visual
from mmlens.interventions.functions import scale
from mmlens.model.transformer import HookedMultimodalTransformer

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def opened(folder: Path, **options: Any) -> HookedMultimodalTransformer:
    return HookedMultimodalTransformer.from_pretrained(folder, device="cpu", **options)


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


def same_images(inputs: MultimodalInputs, others: MultimodalInputs) -> None:
    """Whatever both have: those from tokens know no text and no images."""
    assert (inputs.visual is None) == (others.visual is None)
    if inputs.visual is not None and others.visual is not None:
        assert inputs.visual.counts == others.visual.counts
    for one, other in zip(inputs.images, others.images, strict=True):
        assert (one.row, one.start, one.grids) == (other.row, other.start, other.grids)
        assert torch.equal(one.cells, other.cells)


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
        same_images(inputs, ours.from_tokens(ids, **batch))
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
        texts, images = random_texts(counts, chance)
        flat = [image for row in images for image in row] or None
        batch = dict(theirs(text=texts, images=flat, padding=True, return_tensors="pt"))
        inputs = ours(list(map(ours_of, texts)), images, template=None)
        same_inputs(inputs, batch)
        assert inputs.n_images == tuple(counts)
        ids = batch.pop("input_ids")
        same_images(inputs, ours.from_tokens(ids, **batch))


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
    model = opened(tmp_path)
    real = batch["attention_mask"].bool()

    def compared(name: str, x: Tensor) -> Tensor:
        if name.startswith(("vision.", "projector.")):
            return x
        if not name.endswith(("hook_attn_scores", "hook_pattern")):
            return x[real]
        n_pos = real.shape[1]
        visible = torch.ones(n_pos, n_pos, dtype=torch.bool).tril() & real[:, None]
        return x.masked_fill(~visible[:, None], 0.0).transpose(1, 2)[real]

    def theirs(hf: Any) -> dict[str, Tensor]:
        output, found = internvl_activations(hf, batch)
        found = {**found, "logits": output.logits, "fused logits": output.logits}
        return {name: compared(name, x) for name, x in found.items()}

    expected = theirs(hf)
    with torch.no_grad():
        logits, cache = model.run_with_cache(**batch)
        ours = {**cache, "logits": logits, "fused logits": model(**batch)}
    ours = {name: compared(name, x) for name, x in ours.items()}
    assert expected["logits"].std() > 0.1
    assert_same(ours, expected, lambda: theirs(rounded_otherwise(hf)))


@EVERY
@torch.no_grad()
def test_tiles_of_another_size_have_interpolated_positions(
    family: Family, seed: int, tmp_path: Path
) -> None:
    hf = random_internvl(family)
    write(family, tmp_path, hf)
    model = opened(tmp_path)
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
    hf.generation_config = GenerationConfig()
    model = opened(tmp_path)
    model.generation_config = GenerationConfig()
    n_new = 9
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    suppressed = [model.cfg.image_token_id]
    theirs = hf.generate(**batch, **options, suppress_tokens=suppressed, pad_token_id=0)
    of_batch = model.generate(**batch, max_new_tokens=n_new, stop_at_eos=False)
    assert torch.equal(of_batch, theirs)
    inputs = model.inputs_from_tokens(batch.pop("input_ids"), **batch)
    ours = model.generate(inputs, n_new, return_type="tokens", stop_at_eos=False)
    assert torch.equal(ours, theirs)


@EVERY
def test_every_hook_is_alive(family: Family, seed: int, tmp_path: Path) -> None:
    write(family, tmp_path, random_internvl(family))
    model = opened(tmp_path)
    inputs = model.prepare("Which?", random_image((2 * family.side, family.side), seed))
    assert model.verify_hooks(inputs) == []
    of_norms = {f"vision.blocks.0.attn.{which}_norm.hook_scale" for which in "qk"}
    assert (of_norms <= set(model.hook_dict)) == family.qk_norm
    assert "projector.ln.hook_normalized" in model.hook_dict


@EVERY
@torch.no_grad()
def test_branches_equal_plain_runs(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    batch = random_batch(write(family, tmp_path, random_internvl(family)), [1, 2], chance)
    model = opened(tmp_path)
    inputs = model.inputs_from_tokens(batch.pop("input_ids"), **batch)
    branches = [
        [any_edit(model, inputs, chance) for _ in range(chance.choice([1, 1, 2]))] for _ in range(8)
    ]
    visual = inputs.images[0].positions[-2:].tolist()
    layer = chance.randrange(3)
    tower = chance.randrange(len(model.vision.blocks))
    branches += [
        [Intervention("mlp_out", layer, visual, scale(1.7))],
        [Intervention("resid_post", layer, [inputs.n_pos - 1], scale(1.3))],
        [Intervention("projector.in", None, [0, 3], scale(1.4))],
        [Intervention("projector.ln.scale", None, [1], scale(1.4))],
        [Intervention("projector.pre", None, [2], scale(1.4))],
        [Intervention("projector.out", None, [1], scale(1.4))],
        [Intervention("vision.pos_embed", None, [2], scale(1.4))],
        [Intervention("vision.mlp_out", tower, [1, 2], scale(1.4))],
    ]
    if family.qk_norm:
        branches.append([Intervention("vision.q_norm.scale[1]", tower, [1, 3], scale(1.4))])
    assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=chance.choice([None, 3]))


@EVERY
@torch.no_grad()
def test_traces_over_images_in_tiles(family: Family, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    write(family, tmp_path, random_internvl(family))
    model = opened(tmp_path)
    wide, high = (2 * family.side, family.side), (family.side, 3 * family.side)
    image, other = random_image(wide, seed), random_image(high, seed + 1)
    clean = model.prepare("Which country?", image)
    with pytest.raises(ValueError, match="give one of the same size, or fit=True"):
        swap_image(model, clean, other)
    corrupted = swap_image(model, clean, other, fit=True)
    fitted = model.prepare("Which country?", other.resize(wide, Image.Resampling.BICUBIC))
    assert torch.equal(corrupted.visual["pixel_values"], fitted.visual["pixel_values"])
    whole, tile = (clean.images[0].block((0, 0, 1, 1), view=view) for view in (0, 2))
    for site, positions in (
        ("resid_post", [whole, tile, clean.span("last"), clean.patches((0, 0, 20, 20))]),
        ("vision.mlp_out", [[0], [3, 5]]),
        ("projector.pre", [[0], [2]]),
        ("projector.out", [[0], [2]]),
    ):
        layers = [chance.randrange(2)] if "projector" not in site else None
        given = {"sites": (site,), "positions": positions, "layers": layers, "window": 1}
        found, expected = (
            causal_trace(model, clean, corrupted, method=method, **given)
            for method in ("branch", "naive")
        )
        assert float((found.restored - expected.restored).abs().max()) < 1e-5
        assert float((expected.restored - expected.corrupted).abs().max()) > 0
    squares = family.grid // family.factor
    for site in ("projector.pre", "projector.ln.scale"):
        labels = labels_at(model, clean, site)
        name = "img" if family.factor > 1 else "patch"
        assert len(labels) == squares**2
        assert labels[-1] == f"<{name} *:{squares - 1},{squares - 1}>"
    assert len(labels_at(model, clean, "projector.in")) == family.grid**2
    assert labels_at(model, clean, "vision.resid_post")[:2] == ["<cls *>", "<patch *:0,0>"]


@EVERY
@torch.no_grad()
def test_a_saved_model_opens_in_transformers(family: Family, seed: int, tmp_path: Path) -> None:
    hf = random_internvl(family)
    batch = random_batch(write(family, tmp_path / "a", hf), [2, 1], random.Random(seed))
    model = opened(tmp_path / "a")
    model.blocks[1].mlp.W_out[2:5].mul_(-2.0)
    model.vision.blocks[0].attn.W_V[0].mul_(3.0)
    model.vision.blocks[1].ls_2.mul_(2.0)
    model.projector.ln.w.mul_(1.5)
    if family.qk_norm:
        model.vision.blocks[0].attn.q_norm.w[3:9].mul_(2.0)
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
    assert again.processor("Which?", random_image((9, 9), seed)).tokens.equal(
        model.processor("Which?", random_image((9, 9), seed)).tokens
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("listening", [False, True], ids=["fused", "all hooks listen"])
@pytest.mark.slow
@torch.no_grad()
def test_half_precision_is_as_exact_as_hugging_face(
    dtype: torch.dtype, listening: bool, seed: int, tmp_path: Path
) -> None:
    """As in test_model_parity: the geometric mean of ratios of root mean square errors."""
    ratios: dict[str, list[float]] = {"logits": [], "visual tokens": []}
    for index in range(36):
        family = list(FAMILIES.values())[index % len(FAMILIES)]
        folder = tmp_path / str(index)
        hf = in_dtype(random_internvl(family), dtype)
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
        hf.set_attn_implementation("sdpa")
        exact = both(hf, {**batch, "pixel_values": rounded})
        real = batch["attention_mask"].bool()
        for name, found in seen.items():
            ours, other, right = (
                each[real] if name == "logits" else each
                for each in (found, theirs[name], exact[name])
            )
            ratios[name].append(rms_error(ours, right) / rms_error(other, right))
    for name, values in ratios.items():
        ratio = float(torch.tensor(values).log().mean().exp())
        print(f"{name}: error / Hugging Face's: {ratio:.3f}, single models to {max(values):.2f}")
        assert ratio <= 1.1


def both(hf: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Transformers' logits and visual tokens."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = hf(**batch, position_ids=positions)
    return {
        "logits": output.logits,
        "visual tokens": output.image_outputs.pooler_output.flatten(0, 1),
    }


@EVERY
@pytest.mark.parametrize("size", [(2, 1), (1, 2), (2, 2)], ids=str)
@torch.no_grad()
def test_a_cell_covers_the_pixels_that_its_token_depends_on(
    family: Family, size: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    """Of squares all over the image, each changed alone, the one that moves a token most lies in
    its cell, in every view."""
    chance = random.Random(seed)
    write(family, tmp_path, random_internvl(family))
    model = opened(tmp_path)
    without_attention(model)
    assert model.projector is not None
    unit = 4 * family.side
    width, height = (side * unit for side in size)
    plain = np.full((height, width, 3), 128, dtype=np.uint8)
    (tokens,) = model.prepare("Which?", Image.fromarray(plain)).images
    tiles = tokens.views[1:]
    assert len(tiles) > 1
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
    cells = tokens.cells[tokens.cells[:, 0] >= 0].tolist()
    assert len(cells) == moved.shape[1] == family.n_tokens * len(tokens.views)
    for (view, row, col), most in zip(cells, moved.argmax(dim=0).tolist(), strict=True):
        box, square = tokens.views[view].cell_box(row, col), squares[most]
        assert box == square if view else near(box, square), (view, row, col)


# What is refused


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
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        opened(tmp_path)
