"""`run_with_cache` and the decompositions: the parts add up to the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from random_models import (
    SHAPES,
    Prompts,
    Shape,
    hooked,
    random_language_model,
    random_llava,
    random_prompts,
)
from torch import Tensor

TOLERANCE = 1e-4


class Run(NamedTuple):
    model: Any
    prompts: Prompts
    logits: Tensor
    cache: Any


@pytest.fixture
def run(seed: int, tmp_path: Path) -> Run:
    """A batch with pictures and padding, cached whole but for `hook_result`."""
    hf = random_llava(Shape(attention_bias=True, mlp_bias=True))
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[1, 0], words=[6, 3])
    with torch.no_grad():
        return Run(model, prompts, *model.run_with_cache(prompts.for_mmlens(model)))


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=TOLERANCE, rtol=0))


# What is kept


def test_everything_is_kept_but_what_is_on_demand(run: Run) -> None:
    on_demand = {name for name in run.model.hook_dict if name.endswith("hook_result")}
    assert set(run.cache.keys()) == set(run.model.hook_dict) - on_demand
    assert len(on_demand) == run.model.cfg.n_layers + run.model.cfg.vision.n_layers


def test_short_names(run: Run) -> None:
    last = run.model.cfg.n_layers - 1
    cache = run.cache
    assert cache["mlp_out", -1] is cache[f"blocks.{last}.hook_mlp_out"]
    assert cache["resid_pre", 0] is cache["blocks.0.hook_resid_pre"]
    assert cache["pattern", 1] is cache["blocks.1.attn.hook_pattern"]
    assert cache["scale", 1, "ln2"] is cache["blocks.1.ln2.hook_scale"]
    assert cache["vision.mlp_out", 0] is cache["vision.blocks.0.hook_mlp_out"]
    last = run.model.cfg.vision.n_layers - 1
    assert cache["vision.q", -1] is cache[f"vision.blocks.{last}.attn.hook_q"]
    assert cache["vision.hook_out"].shape[0] == 1


def test_heads_results_are_kept_where_they_are_named(run: Run) -> None:
    model, inputs = run.model, run.prompts.for_mmlens(run.model)
    name = "blocks.1.attn.hook_result"
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=[name, "blocks.1.hook_attn_out"])
    assert list(cache.keys()) == [name, "blocks.1.hook_attn_out"]
    heads = cache["result", 1]
    assert heads.shape == (*inputs.tokens.shape, model.cfg.n_heads, model.cfg.d_model)
    assert close(heads.sum(dim=2) + model.b_O[1], cache["attn_out", 1])
    by_hand = torch.einsum("bphd, hdm -> bphm", run.cache["z", 1], model.W_O[1])
    assert close(heads, by_hand)


@pytest.mark.parametrize(
    "names_filter",
    [
        "blocks.0.hook_mlp_out",
        ["blocks.0.hook_mlp_out"],
        lambda name: name == "blocks.0.hook_mlp_out",
    ],
    ids=["name", "list", "predicate"],
)
def test_names_filter(names_filter: Any, run: Run) -> None:
    inputs = run.prompts.for_mmlens(run.model)
    _, cache = run.model.run_with_cache(inputs, names_filter=names_filter)
    assert list(cache.keys()) == ["blocks.0.hook_mlp_out"]
    _, plain = run.model.run_with_cache(
        inputs, names_filter=names_filter, return_cache_object=False
    )
    assert type(plain) is dict and torch.equal(plain["blocks.0.hook_mlp_out"], cache["mlp_out", 0])


def test_pos_slice_keeps_positions_of_the_decoder_only(run: Run) -> None:
    inputs = run.prompts.for_mmlens(run.model)
    with torch.no_grad():
        _, sliced = run.model.run_with_cache(inputs, pos_slice=slice(-2, None))
        _, one = run.model.run_with_cache(inputs, pos_slice=-1)
    for name, whole in run.cache.items():
        if name.startswith(("vision.", "projector.")):
            assert sliced[name].shape == whole.shape
            continue
        per_head = name.endswith(("hook_q", "hook_k", "hook_v", "hook_z", "rot_q", "rot_k"))
        axis = whole.ndim - (3 if per_head else 2)
        assert close(sliced[name], whole.narrow(axis, whole.shape[axis] - 2, 2)), name
        assert close(one[name], whole.narrow(axis, whole.shape[axis] - 1, 1)), name


def test_gradients_are_kept_on_demand(run: Run) -> None:
    inputs = run.prompts.for_mmlens(run.model)
    names = ["blocks.1.hook_resid_post", "projector.hook_out"]
    loss, cache = run.model.run_with_cache(
        inputs, return_type="loss", names_filter=names, incl_bwd=True
    )
    assert loss.ndim == 0
    assert set(cache.keys()) == {*names, *(f"{name}_grad" for name in names)}
    assert all(cache[f"{name}_grad"].shape == cache[name].shape for name in names)
    # Nothing is said of the projector: a picture at the very end has no text behind it.
    assert cache[f"{names[0]}_grad"].abs().max() > 0


def test_without_batch_dimension(run: Run) -> None:
    model = run.model
    prompts = random_prompts_like(run)
    inputs = prompts.for_mmlens(model)
    with torch.no_grad():
        logits, whole = model.run_with_cache(inputs)
        _, bare = model.run_with_cache(inputs, remove_batch_dim=True)
    assert close(bare["resid_post", 1], whole["resid_post", 1][0])
    assert close(bare["q", 1], whole["q", 1][0])
    stack, labels = bare.get_full_resid_decomposition(return_labels=True)
    assert stack.shape == (len(labels), inputs.n_pos, model.cfg.d_model)
    assert close(stack.sum(0), whole["resid_post", -1][0])
    token = int(logits[0, -1].argmax())
    parts = bare.logit_attrs(stack, token, has_batch_dim=False)
    assert close(parts.sum(0)[-1], logits[0, -1, token])
    removed = whole.remove_batch_dim()
    assert close(removed["resid_post", 1], bare["resid_post", 1])


def random_prompts_like(run: Run) -> Prompts:
    """One row with a picture."""
    first = run.prompts
    assert first.attention_mask[0].all()
    return Prompts(first.tokens[:1], first.attention_mask[:1], first.pixel_values)


# What adds up


def test_parts_add_up_to_the_residual_stream(run: Run) -> None:
    cache, n_layers = run.cache, run.model.cfg.n_layers
    for layer in range(n_layers + 1):
        whole = cache["resid_pre", layer] if layer < n_layers else cache["resid_post", -1]
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        assert labels[0] == "embed" and len(labels) == len(parts) == 1 + 2 * layer
        assert close(parts.sum(0), whole)
        assert torch.equal(parts[0], cache["hook_input_embed"])
        assert close(cache.get_full_resid_decomposition(layer).sum(0), whole)
        coarse = cache.get_full_resid_decomposition(layer, expand_neurons=False)
        assert close(coarse.sum(0), whole)
    middle = cache.decompose_resid(1, mlp_input=True).sum(0)
    assert close(middle, cache["resid_mid", 1])
    middle = cache.get_full_resid_decomposition(1, mlp_input=True).sum(0)
    assert close(middle, cache["resid_mid", 1])


def test_heads_and_neurons_add_up(run: Run) -> None:
    model, cache = run.model, run.cache
    heads, labels = cache.stack_head_results(return_labels=True)
    assert labels[0] == "L0H0" and len(labels) == model.cfg.n_layers * model.cfg.n_heads
    attended = torch.stack([cache["attn_out", layer] for layer in range(model.cfg.n_layers)])
    assert close(heads.sum(0) + model.b_O.sum(0), attended.sum(0))
    neurons = cache.stack_neuron_results(model.cfg.n_layers)
    computed = torch.stack([cache["mlp_out", layer] for layer in range(model.cfg.n_layers)])
    assert close(neurons.sum(0) + model.b_out.sum(0), computed.sum(0))
    remainder = cache.stack_head_results(incl_remainder=True)
    assert close(remainder.sum(0), cache["resid_post", -1])


def test_accumulated_residual_streams(run: Run) -> None:
    model, cache = run.model, run.cache
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == [*(f"{i}_{at}" for i in range(model.cfg.n_layers) for at in ("pre", "mid")),
                      "final_post"]  # fmt: skip
    assert torch.equal(stack[0], cache["resid_pre", 0])
    assert torch.equal(stack[3], cache["resid_mid", 1])
    lens = model.unembed(cache.accumulated_resid(apply_ln=True))
    assert close(lens[-1], run.logits)


def test_apply_ln_keeps_the_sum(run: Run) -> None:
    cache = run.cache
    normalised = cache.decompose_resid(1, apply_ln=True).sum(0)
    assert close(normalised, cache["blocks.1.ln1.hook_normalized"])
    normalised = cache.decompose_resid(1, mlp_input=True, apply_ln=True).sum(0)
    assert close(normalised, cache["blocks.1.ln2.hook_normalized"])
    final = cache.apply_ln_to_stack(cache["resid_post", -1][None])[0]
    assert close(final, cache["ln_final.hook_normalized"])


def test_attributions_add_up_to_the_logits(run: Run) -> None:
    """The final norm's weights belong to the direction that a token reads."""
    model, cache = run.model, run.cache
    parts = cache.decompose_resid()
    token = int(run.logits[0, -1].argmax())
    assert close(cache.logit_attrs(parts, token).sum(0), run.logits[..., token])
    everything = cache.get_full_resid_decomposition()
    assert close(cache.logit_attrs(everything, token).sum(0), run.logits[..., token])
    tokens, others = torch.tensor([token, 9]), torch.tensor([7, 8])
    rows = torch.arange(2)
    last = cache.decompose_resid(pos_slice=-1)
    gaps = cache.logit_attrs(last, tokens, incorrect_tokens=others, pos_slice=-1).sum(0)
    expected = run.logits[rows, -1, tokens] - run.logits[rows, -1, others]
    assert close(gaps, expected)
    directions = model.tokens_to_residual_directions(tokens)
    assert torch.equal(directions, model.W_U.T[tokens])


def test_attributions_of_a_parallel_model_with_biases(seed: int, tmp_path: Path) -> None:
    """Behind a LayerNorm a constant is left over: its bias as the token reads it, and b_U."""
    hf = random_language_model(SHAPES["phi"])
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[0])
    with torch.no_grad():
        logits, cache = model.run_with_cache(prompts.for_mmlens(model))
    token = int(logits[0, -1].argmax())
    constant = model.ln_final.b @ model.W_U[:, token] + model.b_U[token]
    attributed = cache.logit_attrs(cache.decompose_resid(), token).sum(0)
    assert close(attributed + constant, logits[..., token])
