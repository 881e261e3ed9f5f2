"""The towers and patch mergers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers'."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from qwen_towers import (
    SOURCES,
    as_visual,
    hf_tower_activations,
    model_of,
    random_grids,
    random_patches,
    random_tower,
)
from rounding import assert_same, rounded_otherwise
from torch import Tensor

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
