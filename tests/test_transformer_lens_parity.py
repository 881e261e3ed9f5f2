"""Hooks and weights equal those of TransformerLens's bridge wherever both have the name.

The bridge wraps transformers' own model in place, so it is made after ours has been loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import (
    SHAPES,
    Prompts,
    hooked,
    random_language_model,
    random_llava,
    random_prompts,
)
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

TOLERANCE = 1e-4

SHARED_AT_THE_TOP = {"hook_embed", "ln_final.hook_normalized", "ln_final.hook_scale"}
SHARED_IN_A_BLOCK = {
    *(f"attn.hook_{name}" for name in "q k v z rot_q rot_k attn_scores pattern result".split()),
    *(f"mlp.hook_{name}" for name in "pre pre_linear post".split()),
    *(f"{norm}.hook_{name}" for norm in ("ln1", "ln2") for name in ("scale", "normalized")),
    *(f"hook_{name}" for name in "resid_pre resid_mid resid_post attn_out mlp_out".split()),
}

WEIGHTS = "W_E W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in W_gate W_out b_in b_out".split()


def bridge_of(hf: Any) -> Any:
    """TransformerLens's bridge around the model (which it changes)."""
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    bridge.set_use_attn_result(True)
    return bridge


@torch.no_grad()
def both_caches(hf: Any, model: Any, prompts: Prompts) -> tuple[Any, Any]:
    """Everything that each of them caches, ours with `hook_result`."""
    given = prompts.for_hf()
    tokens = given.pop("input_ids")
    logits, theirs = bridge_of(hf).run_with_cache(tokens, **given)
    own, ours = model.run_with_cache(prompts.for_mmlens(model), names_filter=lambda name: True)
    assert float((own - logits)[prompts.real].abs().max()) < TOLERANCE
    return ours, theirs


def compare(name: str, ours: Tensor, theirs: Tensor, real: Tensor) -> float:
    """The largest difference over real positions; where one is masked, so is the other."""
    assert ours.shape == theirs.shape, name
    if not name.endswith(("hook_attn_scores", "hook_pattern")):
        return float((ours - theirs)[real].abs().max())
    ours, theirs = ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
    if name.endswith("scores"):  # -inf here, the smallest finite number there
        masked = ours == -torch.inf
        assert torch.equal(masked, theirs < -1e30), name
        ours, theirs = ours[~masked], theirs[~masked]
    return float((ours - theirs).abs().max())


SAMPLE = ["grouped queries", "biases", "one head", "llama3 rotary", "mistral", "qwen2"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((random_llava, name) for name in [*SAMPLE, "siglip"]),  # it has no LLaVA with Phi
        *((random_language_model, name) for name in [*SAMPLE, "phi"]),
    ],
)
def test_hooks_equal_the_bridge(make: Any, name: str, seed: int, tmp_path: Path) -> None:
    hf = make(SHAPES[name])
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[1, 2] if make is random_llava else [0, 0])
    ours, theirs = both_caches(hf, model, prompts)
    expected = SHARED_AT_THE_TOP | {
        f"blocks.{layer}.{hook}"
        for layer in range(model.cfg.n_layers)
        for hook in SHARED_IN_A_BLOCK
    }
    expected &= set(model.hook_dict)  # Phi has neither ln2 nor a gate, nor a stream in between
    shared = set(ours.keys()) & set(theirs.keys())
    assert shared == expected
    differences = {n: compare(n, ours[n], theirs[n], prompts.real) for n in sorted(shared)}
    assert not {n: value for n, value in differences.items() if not value < TOLERANCE}


@pytest.mark.parametrize("name", ["grouped queries", "biases", "tied"])
def test_weights_have_the_bridges_shapes_and_values(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_llava(SHAPES[name])
    model = hooked(hf, tmp_path)
    bridge = bridge_of(hf)
    for weight in WEIGHTS:
        ours = getattr(model, weight)
        try:
            theirs = getattr(bridge, weight)
        except AttributeError:  # it has none where the checkpoint has none; ours are zeros
            assert weight.startswith("b_") and not ours.any()
            continue
        assert ours.shape == theirs.shape, weight
        assert torch.equal(ours, theirs), weight


@pytest.mark.parametrize("name", ["biases", "phi"])
def test_decompositions_equal_the_bridges(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name])
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[0], words=[7])
    ours, theirs = both_caches(hf, model, prompts)
    for method, options in [
        ("decompose_resid", {}),
        ("decompose_resid", {"layer": 2, "mlp_input": name != "phi", "apply_ln": True}),
        ("accumulated_resid", {"incl_mid": name != "phi"}),
        ("accumulated_resid", {"apply_ln": True}),
        ("stack_head_results", {"pos_slice": -1}),
        ("stack_activation", {"activation_name": "mlp_out"}),
    ]:
        here, there = (getattr(cache, method)(**options) for cache in (ours, theirs))
        assert here.shape == there.shape, method
        assert float((here - there).abs().max()) < TOLERANCE, (method, options)
