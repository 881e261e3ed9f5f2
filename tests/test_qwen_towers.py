"""The towers and patch mergers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers'."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from half_precision import check_half_precision, rms_error
from qwen_towers import (
    SOURCES,
    as_visual,
    hf_tower_activations,
    model_of,
    packed_inputs,
    random_grids,
    random_patches,
    random_tower,
)
from rounding import assert_same, rounded_otherwise
from test_branching import assert_equal_to_plain_runs
from test_branching_families import any_edit
from torch import Tensor

from mmlens import Intervention, direct_logit_attribution, mean_image, noise_span
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.towers.qwen_vl import merger_config, tower_config
from mmlens.inputs.visual import Visual
from mmlens.interventions.functions import knockout, noise, scale
from mmlens.model.transformer import HookedMultimodalTransformer

EVERY = pytest.mark.parametrize("family", SOURCES)


def seen_by(model: HookedMultimodalTransformer, visual: Any) -> dict[str, Tensor]:
    """Every activation of tower and connector."""
    found: dict[str, Tensor] = {}
    names = [name for name in model.hook_dict if model.SITES.of(name)[0].stack != "decoder"]

    def keep(x: Tensor, hook: Any) -> None:
        found[hook.name] = x

    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model.projector(model.vision.of_images(visual), visual)
    assert set(found) == set(names)
    return found


def shown(name: str, x: Tensor) -> Tensor:
    """Without infinities, whose places the pattern's zeros show."""
    return x.masked_fill(x.isneginf(), 0.0)


@EVERY
@pytest.mark.parametrize("n_images", [1, 3])
@torch.no_grad()
def test_every_hook_equals_transformers(family: str, n_images: int, seed: int) -> None:
    chance = random.Random(seed)
    tower = random_tower(family, chance, d_out=18)
    batch = random_patches(tower, random_grids(chance, tower.config.spatial_merge_size, n_images))
    model = model_of(family, tower, d_model=18)

    def theirs(tower: Any) -> dict[str, Tensor]:
        found = hf_tower_activations(family, tower, batch)
        return {name: shown(name, x) for name, x in found.items()}

    expected, visual = theirs(tower), as_visual(batch)
    ours = {name: shown(name, x) for name, x in seen_by(model, visual).items()}
    optional = ("in", "input", "result")
    left = {name for name in ours if name not in expected}
    assert all(name.rpartition("_")[2] in optional for name in left), left
    kept = {name: ours[name] for name in expected}
    assert_same(kept, expected, lambda: theirs(rounded_otherwise(tower)))


@EVERY
@torch.no_grad()
def test_what_is_spliced_equals_transformers(family: str, seed: int) -> None:
    """Without hooks, so in the fused kernels, segment by segment."""
    chance = random.Random(seed)
    tower = random_tower(family, chance, d_out=18)
    merge = tower.config.spatial_merge_size
    model = model_of(family, tower, d_model=18)
    for n_images in (1, 2, 4):
        batch = random_patches(tower, random_grids(chance, merge, n_images))

        def theirs(tower: Any, batch: dict[str, Tensor] = batch) -> Tensor:
            output = tower(batch["pixel_values"], batch["image_grid_thw"])
            deeper = getattr(output, "deepstack_features", [])
            return torch.cat([output.pooler_output, *deeper], dim=-1)[None]

        visual = as_visual(batch)
        ours = model.projector(model.vision.of_images(visual), visual)
        assert_same(ours, theirs(tower), lambda: theirs(rounded_otherwise(tower)))


# Runs on them


def drawn(
    family: str, chance: random.Random, images: list[int]
) -> tuple[HookedMultimodalTransformer, Any]:
    """A model and prompts with so many images."""
    tower = random_tower(family, chance, d_out=18)
    grids = random_grids(chance, tower.config.spatial_merge_size, sum(images))
    model = model_of(family, tower, d_model=18)
    return model, packed_inputs(model, random_patches(tower, grids), images, chance)


@EVERY
def test_every_hook_is_alive(family: str, seed: int) -> None:
    chance = random.Random(seed)
    model, _ = drawn(family, chance, [1])
    assert model.cfg.vision is not None
    merge = model.cfg.vision.merge_size  # an image of several windows, and one of few patches
    tower = random_tower(family, random.Random(seed), d_out=18)
    batch = random_patches(tower, [(4 * merge, 3 * merge), (merge, merge)])
    inputs = packed_inputs(model, batch, [2], chance)
    assert model.verify_hooks(inputs) == []


@EVERY
@pytest.mark.parametrize("images", [[1], [2], [1, 0, 2]], ids=str)
@torch.no_grad()
def test_branches_equal_plain_runs(family: str, images: list[int], seed: int) -> None:
    chance = random.Random(seed)
    model, inputs = drawn(family, chance, images)
    last = sum(inputs.visual.counts["pixel_values"]) - 1
    layer = chance.randrange(4)
    branches = [[any_edit(model, inputs, chance)] for _ in range(5)]
    branches += [
        [Intervention("projector.in", None, [0, last], scale(1.4))],
        [Intervention("projector.ln.normalized", None, [last], scale(1.4))],
        [Intervention("projector.pre", None, [0], scale(1.4))],
        [Intervention("projector.out", None, [1 if last > 8 else 0], scale(1.4))],
        [Intervention("vision.patch_embed", None, [last], scale(1.4))],
        [Intervention("vision.out", None, [last], scale(1.4))],
        [Intervention("vision.mlp_out", layer, [1, last], scale(1.4))],
        [Intervention("vision.rot_k", layer, [last], scale(1.4))],
        [Intervention("vision.attn_scores", layer, None, knockout([0, last]))],
        [Intervention("vision.pattern", layer, [last], scale(0.5))],
    ]
    if family == "qwen3":
        n_deepstack = model.cfg.n_deepstack
        of_images = inputs.images[-1].positions[-1:].tolist()
        branches += [
            [Intervention("vision.pos_embed", None, [last], scale(1.4))],
            [Intervention("projector.deepstack.pre", 0, [0], scale(1.4))],
            [Intervention("projector.deepstack.out", n_deepstack - 1, [0], scale(1.4))],
            [
                Intervention("projector.deepstack.ln.scale", 0, [0], scale(1.4)),
                Intervention("resid_mid", 0, [inputs.n_pos - 1], scale(1.2)),
            ],
            [Intervention("deepstack", range(n_deepstack), of_images, scale(-1.4))],
            [Intervention("deepstack", 0, [inputs.n_pos - 1], noise(0.7))],
            [Intervention("deepstack", 0, None, noise(0.7))],
        ]
    assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=chance.choice([None, 3]))


@pytest.mark.parametrize("images", [[1], [1, 0, 2], [0]], ids=str)
@torch.no_grad()
def test_deepstack_is_a_part_of_the_first_blocks(images: list[int], seed: int) -> None:
    """What the mergers give is added at the visual tokens, and is part of a block's output."""
    chance = random.Random(seed)
    model, inputs = drawn("qwen3", chance, images)
    logits, cache = model.run_with_cache(inputs)
    assert torch.equal(logits, model(inputs))
    stream = cache["hook_input_embed"]
    for layer in range(model.cfg.n_layers):
        assert torch.equal(stream, cache["resid_pre", layer])
        added = [cache["attn_out", layer], cache["mlp_out", layer]]
        if layer < model.cfg.n_deepstack:
            seen = torch.zeros_like(stream)
            if sum(images):
                seen[inputs.is_image] = cache[f"projector.deepstack.{layer}.hook_out"][0]
            assert torch.equal(cache["deepstack", layer], seen)
            added.append(seen)
        after = cache["resid_post", layer]
        assert_same(after, stream + sum(added), lambda after=after: after)
        stream = after
    n_deepstack = model.cfg.n_deepstack
    assert [f"blocks.{i}.hook_deepstack" in cache for i in range(n_deepstack + 1)].count(True) == (
        min(n_deepstack, model.cfg.n_layers)
    )
    for n_before in range(model.cfg.n_layers + 1):
        stream = cache["resid_post", n_before - 1] if n_before else cache["hook_input_embed"]
        for parts in (
            cache.decompose_resid(n_before),
            cache.get_full_resid_decomposition(n_before),
        ):
            torch.testing.assert_close(parts.sum(dim=0), stream, rtol=0, atol=1e-4)
    if images == [1]:
        for per_head in (False, True):
            found = direct_logit_attribution(model, inputs, 5, per_head=per_head)
            torch.testing.assert_close(found.values.sum(dim=0), found.logits, rtol=0, atol=1e-3)
            assert [f"{layer}.deepstack" in found.components for layer in range(4)] == [
                layer < n_deepstack for layer in range(4)
            ]
    for layer in range(model.cfg.n_layers):
        given = {"start_at_layer": layer, **model.resuming(inputs, layer)}
        again = model(cache["resid_pre", layer], **given)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_corrupted_visual_tokens_are_corrupted_in_deepstack_too(seed: int) -> None:
    """Otherwise the clean image would still be seen from the second block on."""
    chance = random.Random(seed)
    model, inputs = drawn("qwen3", chance, [2])
    n_deepstack = model.cfg.n_deepstack
    clean = model.run_with_cache(inputs)[1]
    names = ["hook_input_embed", *(f"blocks.{i}.hook_deepstack" for i in range(n_deepstack))]
    where = inputs.images[0].positions

    merged = mean_image(model, inputs, which=0, level="embeddings")
    found = model.run_with_cache(merged)[1]
    for name in names:
        expected = clean[name].clone()
        expected[:, where] = expected[:, where].mean(dim=1, keepdim=True)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)

    noisy = noise_span(model, inputs, ["image_1", "last"], samples=40, seed=seed)
    found = model.run_with_cache(noisy)[1]
    where, last = inputs.images[1].positions, inputs.n_pos - 1
    for name in names:
        moved = found[name] - clean[name]
        other = [i for i in range(inputs.n_pos) if i not in {*where.tolist(), last}]
        assert float(moved[:, other].abs().max()) == 0
        assert bool(moved[:, last].any()) == (name == "hook_input_embed")
        std = 3 * clean[name][inputs.is_image].std()
        n = moved[:, where].numel()  # 40 samples or more of 18 numbers: five standard errors
        assert float(moved[:, where].std() / std) == pytest.approx(1, abs=5 / (2 * n) ** 0.5)
    text = noise_span(model, inputs, "last", samples=2)
    assert text.noise.shape[-1] == model.cfg.d_model
    branches = [
        [Intervention("mlp_out", 0, [last], scale(1.4))],
        [Intervention("projector.deepstack.out", 0, [1], scale(1.4))],
        [Intervention("deepstack", 0, where[-1:].tolist(), scale(1.4))],
    ]
    for corrupted in (merged, noise_span(model, inputs, "image", samples=2)):
        assert_equal_to_plain_runs(model, corrupted, branches, chance)


@EVERY
@torch.no_grad()
def test_prompts_that_begin_alike_share_their_images(family: str, seed: int) -> None:
    chance = random.Random(seed)
    model, inputs = drawn(family, chance, [2])
    others = inputs.tokens.clone()
    others[0, -1] = others[0, -1] % 50 + 2
    last = sum(inputs.visual.counts["pixel_values"]) - 1
    edited = inputs.visual["pixel_values"].clone()
    edited[last] += 1  # of the second image
    asked = [
        inputs,
        replace(inputs, tokens=others),
        replace(inputs, visual=inputs.visual.replaced(pixel_values=edited)),
    ]
    branch = [Intervention("mlp_out", 0, [inputs.n_pos - 1], scale(1.5))]
    for each, recording in zip(asked, model.record_many(asked), strict=True):
        plain = model(each)[:, -1].softmax(-1)
        found = recording.logits()[:, -1].softmax(-1)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
        assert_equal_to_plain_runs(model, each, [branch], chance)


@EVERY
@torch.no_grad()
def test_a_cache_of_some_rows_has_the_patches_of_their_images(family: str, seed: int) -> None:
    chance = random.Random(seed)
    model, inputs = drawn(family, chance, [1, 0, 2])
    cache = model.run_with_cache(inputs)[1]
    for rows in ([0], [2], [2, 0]):
        alone = model.run_with_cache(inputs.rows(rows))[1]
        some = cache.apply_slice_to_batch_dim(rows)
        kept = [name for name in alone if model.SITES.of(name)[0].stack != "decoder"]
        assert "vision.blocks.3.attn.hook_pattern" in kept
        for name in kept:
            torch.testing.assert_close(some[name], alone[name], rtol=0, atol=1e-4)


@EVERY
def test_gradients_of_a_run_by_segments_are_those_with_all_pairs(family: str, seed: int) -> None:
    """The fused segments, against scores with a mask, in float64."""
    chance = random.Random(seed)
    model, inputs = drawn(family, chance, [3])
    model = model.double()
    visual = inputs.visual.replaced(pixel_values=inputs.visual["pixel_values"].double())

    def gradient(*hooks: Any) -> Tensor:
        pixels = visual["pixel_values"].clone().requires_grad_()
        with model.hooks(fwd_hooks=list(hooks)):
            seen = visual.replaced(pixel_values=pixels)
            out = model.projector(model.vision.of_images(seen), seen)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return torch.autograd.grad((out * weights).sum(), pixels)[0]

    names = [f"vision.blocks.{layer}.attn.hook_pattern" for layer in range(4)]
    plain, all_pairs = gradient(), gradient(*((name, lambda x, hook: x) for name in names))
    torch.testing.assert_close(plain, all_pairs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("listening", [False, True], ids=["fused", "all hooks listen"])
@pytest.mark.slow
@torch.no_grad()
def test_half_precision_is_as_exact_as_transformers(
    listening: bool, dtype: torch.dtype, seed: int
) -> None:
    """As in test_model_parity: the geometric mean of ratios of root mean square errors.

    Of 40 models of one family it is 0.88 to 0.98, with single ones to 2.7.
    """
    ratios = []
    for index in range(90):
        chance, family = random.Random(seed + index), list(SOURCES)[index % len(SOURCES)]
        tower = random_tower(family, chance, d_out=18)
        batch = random_patches(tower, random_grids(chance, tower.config.spatial_merge_size, 2))
        batch["pixel_values"] = batch["pixel_values"].to(dtype)  # both towers begin with this
        model, visual = model_of(family, tower, d_model=18).to(dtype), as_visual(batch)
        tower.to(dtype).set_attn_implementation("eager" if listening else "sdpa")
        if listening:
            ours = seen_by(model, visual)["projector.hook_out"][0]
        else:
            ours = model.projector(model.vision.of_images(visual), visual)[0, :, :18]
        theirs = tower(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
        tower.double().set_attn_implementation("sdpa")
        exact = tower(batch["pixel_values"].double(), batch["image_grid_thw"]).pooler_output
        ratios.append(rms_error(ours, exact) / rms_error(theirs, exact))
    check_half_precision(ratios)


# What is no tower, and no image


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"model_type": "qwen9_vision"}, "a 'qwen9_vision' tower; supported are"),
        ("qwen2", {"patch_size": [3, 4]}, r"patch_size is \[3, 4\]; both sides must be equal"),
        ("qwen2", {"embed_dim": 30, "num_heads": 5}, "a tower of 30 dimensions and 5 heads"),
        ("qwen2", {"embed_dim": 30, "num_heads": 4}, "a tower of 30 dimensions and 4 heads"),
        ("qwen2", {"spatial_merge_size": 0}, "squares have 0 patches a side"),
        ("qwen2", {"hidden_act": "swoosh"}, "hidden_act is 'swoosh'"),
        ("qwen2", {"hidden_size": 19}, "makes 19 dimensions, but the decoder has 18"),
        ("qwen2.5", {"window_size": 2}, "window_size is 2 pixels, less than"),
        ("qwen2.5", {"out_hidden_size": 19}, "makes 19 dimensions, but the decoder has 18"),
        ("qwen3", {"num_position_embeddings": 26}, "is 26; positions must be a square"),
        ("qwen3", {"deepstack_visual_indexes": [2, 1]}, r"are \[2, 1\]; they must ascend"),
        ("qwen3", {"deepstack_visual_indexes": [1, 4]}, "from 0 to 3"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ],
    ids=str,
)
def test_a_tower_that_is_not_built_is_refused(
    family: str, change: dict[str, Any], message: str, seed: int
) -> None:
    hf = random_tower(family, random.Random(seed), d_out=18).config
    merger_config(tower_config(hf), hf, 18)
    for name, value in change.items():
        object.__setattr__(hf, name, value)
    with pytest.raises(CheckpointError, match=message):
        merger_config(tower_config(hf), hf, 18)


@EVERY
def test_patches_that_are_no_images_are_refused(family: str, seed: int) -> None:
    model, inputs = drawn(family, random.Random(seed), [1])
    pixels, grids = inputs.visual["pixel_values"], inputs.visual["image_grid_thw"]
    merge = model.cfg.vision.merge_size
    ((_, rows, columns),) = grids.tolist()
    odd = torch.tensor([[1, merge + 1, columns]])
    for given, at, message in (
        (pixels[:-1], grids, f"which have {rows * columns}$"),
        (pixels[:, :-1], grids, "patches of .* numbers, but this tower's have"),
        (pixels, grids * torch.tensor([2, 1, 1]), "videos are not taken"),
        (pixels[:1].expand(int(odd.prod()), -1), odd, f"of {merge + 1} x {columns} patches"),
    ):
        counts = {"pixel_values": (len(given),), "image_grid_thw": (1,)}
        visual = Visual({"pixel_values": given, "image_grid_thw": at}, counts)
        with pytest.raises(ValueError, match=message):
            model.vision.of_images(visual)
