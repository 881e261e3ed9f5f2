"""Models over several devices: accelerate's plans, and hooks in a model that it has spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import load
from random_models import SHAPES, hooked, random_llama, random_llava, random_prompts

from mmlens.checkpoints.devices import PLANS, planned
from mmlens.checkpoints.errors import CheckpointError
from mmlens.model.transformer import HookedMultimodalTransformer

PARTS = ("vision", "projector", "embed", "blocks.0", "blocks.1", "blocks.2", "ln_final", "unembed")
MAPS = {"whole": {"": "cpu"}, "in parts": dict.fromkeys(PARTS, "cpu")}


def place_of(name: str, device_map: dict[str, Any]) -> Any:
    """Where the map puts a parameter: the longest name that is a part of its own."""
    found = [key for key in device_map if not key or name == key or name.startswith(f"{key}.")]
    return device_map[max(found, key=len)] if found else None


def on_meta(model: HookedMultimodalTransformer) -> HookedMultimodalTransformer:
    with torch.device("meta"):
        return HookedMultimodalTransformer(model.cfg)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["grouped queries", "tied", "phi on siglip"])
def test_a_plan_keeps_blocks_whole(plan: str, name: str, seed: int, tmp_path: Path) -> None:
    hf = random_llava(SHAPES[name], n_layers=6)
    model = on_meta(hooked(hf, tmp_path))
    size = sum(p.nbytes for p in model.parameters())
    # Two GPUs, either of which is too small for everything, with room for one block to spare.
    spare = max(sum(p.nbytes for p in part.parameters()) for part in model.children())
    room: dict[int | str, int | str] = {0: size // 2 + 2 * spare, 1: size // 2 + 2 * spare}
    device_map = planned(model, plan, room)
    places = {name: place_of(name, device_map) for name, _ in model.named_parameters()}
    assert set(places.values()) <= {0, 1}
    for part in [*(f"blocks.{layer}." for layer in range(6)), "vision.", "projector."]:
        there = {place for name, place in places.items() if name.startswith(part)}
        assert len(there) == 1, (part, there)
    if model.cfg.tie_word_embeddings:
        assert place_of("unembed.weight", device_map) == places["embed.W_E"]
        assert model.unembed.weight is model.embed.W_E


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("name", ["grouped queries", "tied"])
@torch.no_grad()
def test_a_model_that_accelerate_has_spread(
    name: str, device_map: dict[str, str], seed: int, tmp_path: Path
) -> None:
    """Its forward functions are accelerate's; everything else is as before."""
    hf = random_llava(SHAPES[name])
    plain = hooked(hf, tmp_path)
    model = load(tmp_path, device=None, device_map=device_map)
    assert hasattr(model.get_submodule("" if "" in device_map else "blocks.1"), "_hf_hook")
    prompts = random_prompts(hf.config, images=[1, 2])
    inputs = prompts.for_mmlens(model)
    expected = plain(inputs)
    assert torch.equal(model(inputs), expected)
    (logits, cache), (wanted, activations) = (
        each.run_with_cache(inputs) for each in (model, plain)
    )
    assert torch.equal(logits, wanted)
    assert cache.keys() == activations.keys()
    assert all(torch.equal(cache[name], activations[name]) for name in activations)

    def double(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return 2 * activation

    for site in ("blocks.1.hook_mlp_out", "vision.blocks.0.attn.hook_z", "hook_input_embed"):
        edited, wanted = (
            each.run_with_hooks(inputs, fwd_hooks=[(site, double)]) for each in (model, plain)
        )
        assert torch.equal(edited, wanted) and not torch.equal(edited, expected)
    assert torch.equal(model(inputs), expected)
    assert model.generate(inputs, 4, return_type="tokens").equal(
        plain.generate(inputs, 4, return_type="tokens")
    )


# What goes wrong


def refused(folder: Path, device_map: Any, *said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(folder, device=None, device_map=device_map)
    for text in said:
        assert text in str(error.value)


def test_maps_that_do_not_work(seed: int, tmp_path: Path) -> None:
    random_llama().save_pretrained(tmp_path)
    refused(tmp_path, "anywhere", "'anywhere'", *PLANS)
    for away in ("disk", "cpu"):
        partly = {"embed": 0, "blocks": away, "ln_final": 0, "unembed": 0}
        refused(tmp_path, partly, "'blocks'", "offloaded", "dtype=torch.bfloat16")
    refused(tmp_path, {"embed": "cpu", "blocks": "cpu"}, "leaves 2 parameters out", "ln_final.w")
    with pytest.raises(ValueError, match="give one of the two"):
        load(tmp_path, device="cpu", device_map="auto")
