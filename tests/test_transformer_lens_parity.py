"""Hooks and weights equal those of TransformerLens's bridge wherever both have the name.

The bridge wraps transformers' own model in place, so it is made after ours has been loaded.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
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
from torch import Tensor, nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

MAJOR = int(version("transformer_lens").split(".")[0])
SHARED_AT_THE_TOP = {"hook_embed", "ln_final.hook_normalized", "ln_final.hook_scale"}
SHARED_IN_A_BLOCK = {
    *(f"attn.hook_{name}" for name in "q k v z rot_q rot_k attn_scores pattern result".split()),
    *(f"mlp.hook_{name}" for name in "pre pre_linear post".split()),
    *(
        f"{norm}.hook_{name}"
        for norm in ("ln1", "ln2", "attn.q_norm", "attn.k_norm")
        for name in ("scale", "normalized")
    ),
    *(f"hook_{name}" for name in "resid_pre resid_mid resid_post attn_out mlp_out".split()),
    *(f"hook_{name}" for name in "q_input k_input v_input mlp_in".split()),
}
NOT_OF_PARALLEL_BLOCKS = ".hook_mlp_in"
"""TransformerLens's own never fires there."""

WEIGHTS = "W_E W_U b_U W_Q W_K W_V W_O b_Q b_K b_V b_O W_in W_gate W_out b_in b_out".split()


def bridge_of(hf: Any) -> Any:
    """TransformerLens's bridge around the model (which it changes)."""
    bridge = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    return bridge


@torch.no_grad()
def bridge_cache(hf: Any, prompts: Prompts) -> tuple[Tensor, Any]:
    """Logits, and everything that the bridge caches; of a copy of the model."""
    given = prompts.for_hf()
    tokens = given.pop("input_ids")
    return bridge_of(copy.deepcopy(hf)).run_with_cache(tokens, **given)


def with_one_eps(hf: Any) -> Any:
    """The model with its decoder's eps in every norm of its tower.

    TransformerLens 3 takes the decoder's for the norm before the tower's blocks; 4 takes its own.
    """
    hf.config.vision_config.layer_norm_eps = hf.config.text_config.rms_norm_eps
    for module in hf.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = hf.config.text_config.rms_norm_eps
    return hf


@torch.no_grad()
def our_cache(model: Any, prompts: Prompts) -> tuple[Tensor, Any]:
    """The same of ours, with all that is kept on demand."""
    return model.run_with_cache(prompts.for_mmlens(model), names_filter=lambda name: True)


def comparable(
    logits: Tensor, cache: Any, names: set[str], real: Tensor, *, heads_first: str = " "
) -> dict[str, Tensor]:
    """What stands at real positions; masked scores are -inf here and finite there.

    `heads_first` is in the names of what else has heads before positions.
    """
    found = {"logits": logits[real]}
    for name in names:
        by_query = name.endswith(("hook_attn_scores", "hook_pattern")) or heads_first in name
        found[name] = (cache[name].transpose(1, 2) if by_query else cache[name])[real]
        if name.endswith("scores"):
            found[name] = found[name].clamp(min=-1e30)
    return found


SAMPLE = ["grouped queries", "biases", "one head", "llama3 rotary", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((random_llava, name) for name in [*SAMPLE, "siglip"]),  # it has no LLaVA with Phi
        *((random_language_model, name) for name in [*SAMPLE, "phi", "gpt_neox"]),
    ],
)
def test_hooks_equal_the_bridge(make: Any, name: str, seed: int, tmp_path: Path) -> None:
    hf = make(SHAPES[name])
    if MAJOR == 3 and make is random_llava:
        hf = with_one_eps(hf)
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
    if model.cfg.parallel_ln2:  # its GPT-NeoX has none after the rotation
        expected = {each for each in expected if ".hook_rot_" not in each}
    elif model.cfg.parallel_attn_mlp:
        expected = {each for each in expected if not each.endswith(NOT_OF_PARALLEL_BLOCKS)}
    shared = set(ours.keys()) & set(theirs.keys())
    assert shared == expected
    of_bridge = partial(comparable, names=shared, real=prompts.real, heads_first="_norm.")
    assert_same(
        comparable(logits, ours, shared, prompts.real),
        of_bridge(bridge_logits, theirs),
        lambda: of_bridge(*bridge_cache(rounded_otherwise(hf), prompts)),
    )


@pytest.mark.parametrize("name", ["grouped queries", "biases", "phi", "gpt_neox"])
@pytest.mark.parametrize("hook", ["q_input", "k_input", "v_input", "mlp_in", "attn_in"])
def test_edits_of_what_one_part_reads_equal_the_bridges(
    name: str, hook: str, seed: int, tmp_path: Path
) -> None:
    """Some heads, or the MLP, read an edited copy of the residual stream."""
    shape = SHAPES[name]
    if hook == "attn_in":  # with grouped queries the bridge mixes groups up
        shape = replace(shape, n_kv_heads=shape.n_heads)
    hf = random_language_model(shape)
    model = hooked(hf, tmp_path)
    bridge = bridge_of(copy.deepcopy(hf))
    if hook == "attn_in":
        bridge.set_use_split_qkv_input(False)
        bridge.set_use_attn_in(True)
    if hook == "mlp_in" and model.cfg.parallel_attn_mlp and not model.cfg.parallel_ln2:
        pytest.skip("TransformerLens's own never fires in parallel blocks")
    tokens = random_prompts(hf.config, images=[0], words=[6]).tokens
    direction = torch.randn(hf.config.hidden_size)

    def edit(activation: Tensor, hook: Any) -> Tensor:
        heads = slice(0, None, 2) if activation.ndim == 4 else slice(None)
        edited = activation.clone()
        edited[:, 2:, heads] += direction if activation.ndim == 4 else direction[heads]
        return edited

    pairs = [(f"blocks.1.hook_{hook}", edit)]
    with torch.no_grad():
        ours, theirs = (each.run_with_hooks(tokens, fwd_hooks=pairs) for each in (model, bridge))
        assert (ours - model(tokens)).abs().max() > 0.05
        assert_same(
            ours,
            theirs,
            lambda: bridge_of(rounded_otherwise(hf)).run_with_hooks(tokens, fwd_hooks=pairs),
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
        except (AttributeError, TypeError):  # 4 has none where the checkpoint has none, 3 fails
            assert weight.startswith("b_") and not ours.any()
            continue
        assert ours.shape == theirs.shape, weight
        assert torch.equal(ours, theirs), weight


@pytest.mark.parametrize("name", ["grouped queries", "biases", "phi", "granite", "gemma2"])
def test_circuits_and_parameters_equal_the_bridges(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name])
    n_params = sum(parameter.numel() for parameter in hf.parameters())
    model = hooked(hf, tmp_path)
    bridge = bridge_of(hf)
    for circuit in ("QK", "OV"):
        torch.testing.assert_close(getattr(model, circuit).AB, getattr(bridge, circuit).AB)
        layers, factored = getattr(model, f"{circuit}_for_attn_layers")()
        assert layers == list(range(model.cfg.n_layers)) and factored.shape == model.QK.shape
    for mode in ("Q", "K", "V"):
        ours, theirs = (each.all_composition_scores(mode) for each in (model, bridge))
        torch.testing.assert_close(ours, theirs.scores)
        assert ours.head_labels == theirs.head_labels and ours.layer_indices == theirs.layer_indices
    with pytest.raises(ValueError, match="'Q', 'K' or 'V'"):
        model.all_composition_scores("O")
    ours, theirs = model.tl_parameters(), bridge.tl_parameters()
    only_ours = set()
    if model.cfg.parallel_attn_mlp:
        only_ours = {f"blocks.{layer}.ln2.{each}" for layer in range(3) for each in "wb"}
    if model.cfg.post_norms:
        only_ours = {f"blocks.{layer}.ln{n}_post.w" for layer in range(3) for n in (1, 2)}
    assert set(ours) - set(theirs) == only_ours
    assert set(theirs) <= set(ours)
    assert not model.cfg.rmsnorm_uses_offset  # Gemma's 1 is in the weights
    for weight, value in theirs.items():
        is_less = ".ln" in f".{weight}" and getattr(bridge.cfg, "rmsnorm_uses_offset", False)
        assert torch.equal(ours[weight], value + 1 if is_less else value), weight
    assert next(iter(model.tl_named_parameters()))[0] == "embed.W_E"
    assert model.n_params_total == n_params
    for layer in range(model.cfg.n_layers + 1):
        for options in ({}, {"include_mlp_biases": False}):
            torch.testing.assert_close(
                model.accumulated_bias(layer, **options), bridge.accumulated_bias(layer, **options)
            )
    assert model.all_head_labels == bridge.all_head_labels == model.attn_head_labels
    assert model.layer_types() == ["attn+mlp"] * model.cfg.n_layers


@pytest.mark.parametrize("name", ["biases", "phi"])
def test_decompositions_equal_the_bridges(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name])
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[0], words=[7])
    _, ours = our_cache(model, prompts)
    _, theirs = bridge_cache(hf, prompts)
    mid = not model.cfg.parallel_attn_mlp
    norm = model.blocks[2].ln2 if mid else model.blocks[2].ln1
    for method, options, weights in [
        ("decompose_resid", {}, 1),
        # The bridge expects the norm's weights to be folded into what follows.
        ("decompose_resid", {"layer": 2, "mlp_input": mid, "apply_ln": True}, norm.w),
        ("accumulated_resid", {"incl_mid": mid}, 1),
        ("accumulated_resid", {"apply_ln": True}, 1),
        ("stack_head_results", {"pos_slice": -1}, 1),
        ("stack_head_results", {"pos_slice": -1, "apply_ln": True}, model.ln_final.w),
        ("stack_activation", {"activation_name": "mlp_out"}, 1),
        ("get_full_resid_decomposition", {"layer": 2}, 1),
    ]:
        here, there = (getattr(cache, method)(**options) for cache in (ours, theirs))
        assert here.shape == there.shape, method

        def again(method: str = method, options: dict = options, weights: Any = weights) -> Tensor:
            cache = bridge_cache(rounded_otherwise(hf), prompts)[1]
            return getattr(cache, method)(**options) * weights

        assert_same(here, there * weights, again)


def hooked_transformer(hf: Any) -> Any:
    """TransformerLens 3's own model with the weights of a Llama, not folded."""
    if MAJOR != 3:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = hf.config
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=64,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        eps=config.rms_norm_eps,
        gated_mlp=True,
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
    )
    model = HookedTransformer(cfg)
    folding = dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
    )
    model.load_and_process_state_dict(convert_llama_weights(hf, cfg), **folding)
    for switch in ("attn_result", "split_qkv_input", "hook_mlp_in"):
        getattr(model, f"set_use_{switch}")(True)
    return model.eval()


@pytest.mark.parametrize("name", ["grouped queries", "every head its own keys"])
@torch.no_grad()
def test_hooks_equal_hooked_transformers(name: str, seed: int, tmp_path: Path) -> None:
    """But for `hook_input_embed` and the unembedding's hooks it is the same, edited or not."""
    hf = random_language_model(SHAPES[name])
    model, other = hooked(hf, tmp_path), hooked_transformer(hf)
    assert model.cfg.n_params == other.cfg.n_params
    tokens = random_prompts(hf.config, images=[0], words=[8]).tokens
    _, ours = model.run_with_cache(tokens, names_filter=lambda name: True)
    _, theirs = other.run_with_cache(tokens)
    attn_in = {name for name in ours if name.endswith("hook_attn_in")}  # or those of q, k and v
    without = {"unembed.hook_in", "unembed.hook_out"}  # the run returns logits
    assert set(ours) - attn_in == {*theirs, "hook_input_embed"} - without
    real = torch.ones(1, tokens.shape[1], dtype=torch.bool)
    # Its hooks of the norms see each head's own input, last that of the values.
    shared = {name for name in theirs if ".ln1." not in name} - without
    assert_same(
        comparable(ours["resid_post", -1], ours, shared, real),
        comparable(theirs["resid_post", -1], theirs, shared, real),
        lambda: comparable(
            (cache := hooked_transformer(rounded_otherwise(hf)).run_with_cache(tokens)[1])[
                "resid_post", -1
            ],
            cache,
            shared,
            real,
        ),
    )

    def edit(activation: Tensor, hook: Any) -> Tensor:
        return activation * torch.linspace(0.5, 1.5, activation.shape[-1])

    for hook in sorted({name.replace("blocks.0", "blocks.1") for name in shared}):
        pairs = [(hook, edit)]
        ours, theirs = (each.run_with_hooks(tokens, fwd_hooks=pairs) for each in (model, other))
        assert_same(
            ours,
            theirs,
            lambda: hooked_transformer(rounded_otherwise(hf)).run_with_hooks(
                tokens,
                fwd_hooks=pairs,  # noqa: B023
            ),
        )
