"""Hooks and weights equal those of TransformerLens's bridge wherever both have the name.

The bridge wraps transformers' own model in place, so it is made after ours has been loaded.
"""

from __future__ import annotations

import copy
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
from rounding import assert_same, rounded_otherwise
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

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
def bridge_cache(hf: Any, prompts: Prompts) -> tuple[Tensor, Any]:
    """Logits, and everything that the bridge caches; of a copy of the model."""
    given = prompts.for_hf()
    tokens = given.pop("input_ids")
    return bridge_of(copy.deepcopy(hf)).run_with_cache(tokens, **given)


@torch.no_grad()
def our_cache(model: Any, prompts: Prompts) -> tuple[Tensor, Any]:
    """The same of ours, with `hook_result`."""
    return model.run_with_cache(prompts.for_mmlens(model), names_filter=lambda name: True)


def comparable(logits: Tensor, cache: Any, names: set[str], real: Tensor) -> dict[str, Tensor]:
    """What stands at real positions; masked scores are -inf here and finite there."""
    found = {"logits": logits[real]}
    for name in names:
        by_query = name.endswith(("hook_attn_scores", "hook_pattern"))
        found[name] = (cache[name].transpose(1, 2) if by_query else cache[name])[real]
        if name.endswith("scores"):
            found[name] = found[name].clamp(min=-1e30)
    return found


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
    logits, ours = our_cache(model, prompts)
    bridge_logits, theirs = bridge_cache(hf, prompts)
    expected = SHARED_AT_THE_TOP | {
        f"blocks.{layer}.{hook}"
        for layer in range(model.cfg.n_layers)
        for hook in SHARED_IN_A_BLOCK
    }
    expected &= set(model.hook_dict)  # Phi has neither ln2 nor a gate, nor a stream in between
    shared = set(ours.keys()) & set(theirs.keys())
    assert shared == expected
    assert_same(
        comparable(logits, ours, shared, prompts.real),
        comparable(bridge_logits, theirs, shared, prompts.real),
        lambda: comparable(*bridge_cache(rounded_otherwise(hf), prompts), shared, prompts.real),
    )


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
    _, ours = our_cache(model, prompts)
    _, theirs = bridge_cache(hf, prompts)
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
        assert_same(
            here,
            there,
            lambda: getattr(bridge_cache(rounded_otherwise(hf), prompts)[1], method)(**options),  # noqa: B023
        )
