"""`run_with_cache` and the decompositions: the parts add up to the whole."""

from __future__ import annotations

import dataclasses
import random
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
from small_models import small_inputs, small_model
from torch import Tensor

TOLERANCE = 1e-4


class Run(NamedTuple):
    model: Any
    prompts: Prompts
    logits: Tensor
    cache: Any


@pytest.fixture
def run(seed: int, tmp_path: Path) -> Run:
    """A batch with images and padding, cached whole but for `hook_result`."""
    hf = random_llava(Shape(attention_bias=True, mlp_bias=True))
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[1, 0], words=[6, 3])
    with torch.no_grad():
        return Run(model, prompts, *model.run_with_cache(prompts.for_mmlens(model)))


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=TOLERANCE, rtol=0))


# What is kept


def test_everything_is_kept_but_what_is_on_demand(run: Run) -> None:
    on_demand = {name for name, point in run.model.hook_dict.items() if point.site.needs}
    assert set(run.cache.keys()) == set(run.model.hook_dict) - on_demand
    blocks = run.model.cfg.n_layers + run.model.cfg.vision.n_layers
    assert (
        len(on_demand) == 6 * blocks
    )  # result, attn_in, mlp_in; queries, keys and values of each head


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
    # Nothing is said of the projector: an image at the very end has no text after it.
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
    """One row with an image."""
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
    """What the norm hands on: its weights are not folded into what follows."""
    cache, block = run.cache, run.model.blocks[1]
    normalised = cache.decompose_resid(1, apply_ln=True).sum(0)
    assert close(normalised, cache["blocks.1.ln1.hook_normalized"] * block.ln1.w)
    normalised = cache.decompose_resid(1, mlp_input=True, apply_ln=True).sum(0)
    assert close(normalised, cache["blocks.1.ln2.hook_normalized"] * block.ln2.w)
    final = cache.apply_ln_to_stack(cache["resid_post", -1][None])[0]
    assert close(final, cache["ln_final.hook_normalized"] * run.model.ln_final.w)


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
    """After a LayerNorm a constant is left over: its bias as the token reads it, and b_U."""
    hf = random_language_model(SHAPES["phi"])
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[0])
    with torch.no_grad():
        logits, cache = model.run_with_cache(prompts.for_mmlens(model))
    token = int(logits[0, -1].argmax())
    constant = model.ln_final.b @ model.W_U[:, token] + model.b_U[token]
    attributed = cache.logit_attrs(cache.decompose_resid(), token).sum(0)
    assert close(attributed + constant, logits[..., token])


def test_a_parallel_mlp_that_has_a_norm_of_its_own(seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES["gpt_neox"])
    model = hooked(hf, tmp_path)
    with torch.no_grad():
        _, cache = model.run_with_cache(random_prompts(hf.config, images=[0]).for_mmlens(model))
    layer = model.blocks[2]
    parts = cache.decompose_resid(2)
    for mlp_input, norm in [(False, layer.ln1), (True, layer.ln2)]:
        read = cache.apply_ln_to_stack(parts, 2, mlp_input=mlp_input).sum(0) + norm.b
        assert close(read, norm.without_hooks(cache["resid_pre", 2]))
    assert torch.equal(model.tl_parameters()["blocks.2.ln2.w"], layer.ln2.w)
    with pytest.raises(ValueError, match="parallel blocks have an ln2"):
        cache.decompose_resid(2, mlp_input=True, apply_ln=True)


# The usual idioms, against formulas in float64


NORMS = [("RMS", False), ("LN", False), ("LN", True)]


def wide_run(seed: int, norm: str, parallel: bool) -> tuple[Any, Tensor, Any]:
    """A model with biases and a norm of its own in each place, in float64; inputs with an image."""
    kinds = {"normalization_type": norm, "parallel_attn_mlp": parallel, "unembed_bias": True}
    model = small_model(seed, n_layers=3, qkv_bias=True, **kinds).double()
    inputs = small_inputs(model, seed, images=(1, 0))
    return model, *model.run_with_cache(inputs)


def by_formula(model: Any, name: str, resid: Tensor) -> Tensor:
    """What a norm hands on, from the stream that enters it; without its bias."""
    norm = model.get_submodule(name)
    if model.cfg.normalization_type == "LN":
        resid = resid - resid.mean(-1, keepdim=True)
    return resid / (resid.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.w


@pytest.mark.parametrize(("norm", "parallel"), NORMS)
@pytest.mark.parametrize("pos_slice", [-1, None, [1, 3]])
def test_the_usual_idiom_gives_the_logit(
    norm: str, parallel: bool, pos_slice: Any, seed: int
) -> None:
    model, logits, cache = wide_run(seed, norm, parallel)
    token = int(logits[0, -1].argmax())
    direction = model.tokens_to_residual_directions(token)
    parts = cache.decompose_resid(pos_slice=pos_slice)
    normalized = cache.apply_ln_to_stack(parts, pos_slice=pos_slice)
    constant = model.b_U[token]
    if norm == "LN":
        constant = constant + model.ln_final.b @ model.W_U[:, token]
    at = slice(None) if pos_slice is None else pos_slice
    expected = logits[:, at, token]
    assert_equal((normalized @ direction).sum(0) + constant, expected)
    assert_equal(cache.logit_attrs(parts, token, pos_slice=pos_slice).sum(0) + constant, expected)
    whole = by_formula(model, "ln_final", cache["resid_post", -1])[:, at]
    assert_equal(normalized.sum(0), whole)
    heads = cache.stack_head_results(incl_remainder=True, apply_ln=True, pos_slice=pos_slice)
    assert_equal((heads @ direction).sum(0) + constant, expected)
    lens = cache.accumulated_resid(apply_ln=True, pos_slice=pos_slice)
    assert_equal(lens[-1] @ direction + model.b_U[token], expected)


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    """In float64: 1e-16 per rounding, times activations of order 1e3, times a few thousand."""
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("norm", "parallel"), NORMS)
def test_what_an_inner_layer_reads(norm: str, parallel: bool, seed: int) -> None:
    """Parts add up to queries and to the MLP's inputs, whose weights hold no norm."""
    model, _, cache = wide_run(seed, norm, parallel)
    layer = random.randrange(1, 3)
    block = model.blocks[layer]
    parts = cache.decompose_resid(layer)
    read = cache.apply_ln_to_stack(parts, layer)
    assert_equal(read.sum(0), by_formula(model, f"blocks.{layer}.ln1", cache["resid_pre", layer]))
    bias = block.ln1.b if norm == "LN" else torch.zeros(model.cfg.d_model).double()
    queries = torch.einsum("bpm, hmd -> bphd", read.sum(0) + bias, block.attn.W_Q) + block.attn.b_Q
    assert_equal(queries, cache["q", layer])
    parts = cache.decompose_resid(layer, mlp_input=True)
    assert len(parts) == 1 + 2 * layer + (not parallel)
    read = cache.apply_ln_to_stack(parts, layer, mlp_input=True)
    norm_of_mlp = block.ln1 if parallel else block.ln2
    bias = norm_of_mlp.b if norm == "LN" else bias
    weights = block.mlp.W_gate if model.cfg.gated_mlp else block.mlp.W_in
    biases = block.mlp.b_gate if model.cfg.gated_mlp else block.mlp.b_in
    pre = (read.sum(0) + bias) @ weights + (0 if biases is None else biases)
    assert_equal(pre, cache["pre", layer])
    whole = cache.get_full_resid_decomposition(layer, mlp_input=True, apply_ln=True)
    assert_equal(whole.sum(0), read.sum(0))


@pytest.mark.parametrize(("norm", "parallel"), NORMS)
@pytest.mark.parametrize("layer", [2, -1, None])
def test_projected_parts_are_the_parts_projected(
    norm: str, parallel: bool, layer: int | None, seed: int
) -> None:
    model, _, cache = wide_run(seed, norm, parallel)
    for shape in [(model.cfg.d_model,), (model.cfg.d_model, 2)]:
        directions = torch.randn(shape).double()
        for options in ({}, {"pos_slice": -1}):
            whole = cache.get_full_resid_decomposition(layer, apply_ln=True, **options)
            projected = cache.get_full_resid_decomposition(
                layer, apply_ln=True, project_output_onto=directions, **options
            )
            assert_equal(projected, whole @ directions)
            options = {**options, "incl_remainder": True, "return_labels": True}
            neurons, labels = cache.stack_neuron_results(layer, apply_ln=True, **options)
            projected, same = cache.stack_neuron_results(
                layer, apply_ln=True, project_output_onto=directions, **options
            )
            assert labels == same and len(labels) == len(neurons)
            assert_equal(projected, neurons @ directions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_idioms_of_half_precision(dtype: torch.dtype, seed: int) -> None:
    """Parts are rounded to the model's type, attributions are wider; both are near the logit."""
    model = small_model(seed, n_layers=2, normalization_type="RMS").to(dtype)
    logits, cache = model.run_with_cache(small_inputs(model, seed))
    token = int(logits[0, -1].argmax())
    parts = cache.decompose_resid(pos_slice=-1)
    normalized = cache.apply_ln_to_stack(parts, pos_slice=-1)
    assert normalized.dtype == dtype
    direction = model.tokens_to_residual_directions(token)
    by_idiom = (normalized @ direction).float().sum()
    attributed = cache.logit_attrs(parts, token, pos_slice=-1)
    assert attributed.dtype == torch.float32
    # Each of the parts, and of what is computed of them, is rounded by eps; the products do not
    # cancel before they are added up.
    size = (normalized.float().abs() @ direction.float().abs()).sum()
    allowed = 4 * torch.finfo(dtype).eps * size
    assert (by_idiom - logits[0, -1, token].float()).abs() <= allowed
    assert (attributed.sum() - logits[0, -1, token].float()).abs() <= allowed


# Rows and images


def rows_run(seed: int) -> tuple[Any, Any, Any]:
    """Rows with 2, 0 and 1 images, whose lengths differ."""
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed, images=(2, 0, 1), words=(4, 9, 6))
    return model, inputs, model.run_with_cache(inputs)[1]


@pytest.mark.parametrize("batch_slice", [0, 1, 2, [2, 0], (1, 3), (0, 1), torch.tensor([2])])
def test_rows_of_a_cache_are_those_of_a_run_of_these_rows(batch_slice: Any, seed: int) -> None:
    model, inputs, cache = rows_run(seed)
    sliced = cache.apply_slice_to_batch_dim(batch_slice)
    as_slice = slice(*batch_slice) if isinstance(batch_slice, tuple) else batch_slice
    rows = torch.arange(3)[as_slice].flatten().tolist()
    alone = inputs.rows(rows)
    _, expected = model.run_with_cache(alone)
    assert type(sliced) is type(cache)
    assert sliced.has_batch_dim == (not isinstance(batch_slice, int))
    assert set(sliced.keys()) == set(expected.keys())
    for name, value in expected.items():
        if not sliced.has_batch_dim and not name.startswith(("vision.", "projector.")):
            value = value[0]
        torch.testing.assert_close(sliced[name], value, atol=1e-4, rtol=1e-4)
    assert torch.equal(sliced.inputs.tokens, alone.tokens)
    parts = sliced.decompose_resid(pos_slice=-1)
    attributed = sliced.logit_attrs(parts, 7, pos_slice=-1, has_batch_dim=sliced.has_batch_dim)
    constant = model.ln_final.b @ model.W_U[:, 7] if model.cfg.normalization_type == "LN" else 0.0
    logits = model(alone)[:, -1, 7]
    torch.testing.assert_close(
        (attributed.sum(0) + constant).flatten(), logits, atol=1e-3, rtol=1e-4
    )


def test_rows_of_samples_of_noise_share_their_image(seed: int) -> None:
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed)
    noise = torch.randn(3, inputs.n_pos, model.cfg.d_model)
    noisy = dataclasses.replace(inputs, noise=noise)
    _, cache = model.run_with_cache(noisy)
    assert cache.batch_size == 3
    second = cache.apply_slice_to_batch_dim([1])
    _, alone = model.run_with_cache(dataclasses.replace(inputs, noise=noise[1:2]))
    for name, value in alone.items():
        torch.testing.assert_close(
            second[name], value.expand_as(second[name]), atol=1e-4, rtol=1e-4
        )
    assert second.batch_size == 1
    assert torch.equal(second.inputs.noise, noise[1:2])
    with pytest.raises(IndexError):
        second.apply_slice_to_batch_dim([0, 1])
    assert second.remove_batch_dim()["resid_post", 1].ndim == 2
    last = cache.apply_slice_to_batch_dim([2, 0])
    assert last.batch_size == 2 and torch.equal(last.inputs.noise, noise[[2, 0]])
    assert torch.equal(last["resid_post", 1], cache["resid_post", 1][[2, 0]])


def test_rows_of_a_batch_with_noise_have_images_of_their_own(seed: int) -> None:
    """There is one vector of noise for each row, so that the rows are prompts, not samples."""
    model = small_model(seed, n_layers=2)
    batch = small_inputs(model, seed, images=(1, 2))
    batch = dataclasses.replace(batch, noise=torch.randn(2, batch.n_pos, model.cfg.d_model))
    _, cache = model.run_with_cache(batch)
    second = cache.apply_slice_to_batch_dim([1])
    _, alone = model.run_with_cache(batch.rows([1]))
    assert second.batch_size == 1 and torch.equal(second.inputs.noise, batch.noise[1:])
    for name, value in alone.items():
        torch.testing.assert_close(second[name], value, atol=1e-4, rtol=1e-4)


def test_what_was_run_is_kept(seed: int) -> None:
    """So that rows can be told apart, whatever form the inputs had."""
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed, images=(1, 1))
    _, cache = model.run_with_cache(
        inputs.tokens,
        pixel_values=inputs.pixel_values,
        attention_mask=inputs.attention_mask,
        names_filter=lambda name: name.startswith("vision."),
    )
    assert torch.equal(cache.inputs.tokens, inputs.tokens) and cache.batch_size == 2
    row = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(row["vision.hook_out"], cache["vision.hook_out"][1:])
    resid = torch.randn(2, 5, model.cfg.d_model)
    _, cache = model.run_with_cache(resid, start_at_layer=1)
    assert cache.inputs is None and cache.apply_slice_to_batch_dim(0)["resid_pre", 1].ndim == 2


def test_a_batch_dimension_of_several_rows_stays(seed: int) -> None:
    model, inputs, cache = rows_run(seed)
    says = "Cannot remove batch dimension from cache with batch size 3"
    with pytest.raises(ValueError, match=says):
        model.run_with_cache(inputs, remove_batch_dim=True)
    with pytest.raises(ValueError, match="batch size 2"):
        model.run_with_cache(torch.ones(2, 4, dtype=torch.long), remove_batch_dim=True)
    with pytest.raises(ValueError, match="batch size 2"):
        resid = torch.randn(2, 4, model.cfg.d_model)
        model.run_with_cache(resid, start_at_layer=1, remove_batch_dim=True)
    with pytest.raises(ValueError, match=says):
        cache.remove_batch_dim()
    assert cache.has_batch_dim and not any(p._forward_hooks for p in model.hook_dict.values())
    with pytest.raises(ValueError, match="was removed"):
        cache.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)
    with pytest.raises(IndexError):
        cache.apply_slice_to_batch_dim([3])


def test_images_are_no_batch(seed: int) -> None:
    """One row with two images has a batch dimension to remove; its images keep their axis."""
    model = small_model(seed, n_layers=2)
    for images in (1, 2):
        inputs = small_inputs(model, seed, images=(images,))
        _, bare = model.run_with_cache(inputs, remove_batch_dim=True)
        assert bare["resid_pre", 0].shape == (inputs.n_pos, model.cfg.d_model)
        assert bare["vision.resid_pre", 0].shape[0] == images == len(bare["projector.hook_in"])
        assert len(bare["projector.hook_out"]) == 1
        _, cache = model.run_with_cache(inputs)
        removed = cache.remove_batch_dim()
        assert removed is cache
        for name, value in bare.items():
            assert torch.equal(value, removed[name])


# What is asked for by a switch, by a name, and not at all


@pytest.mark.parametrize(
    ("switch", "names"),
    [
        ("use_attn_result", ["attn.hook_result"]),
        ("use_attn_in", ["hook_attn_in"]),
        ("use_split_qkv_input", ["hook_q_input", "hook_k_input", "hook_v_input"]),
        ("use_hook_mlp_in", ["hook_mlp_in"]),
    ],
)
def test_switches(switch: str, names: list[str], seed: int) -> None:
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed)
    plain, before = model.run_with_cache(inputs)
    getattr(model, f"set_{switch}")(True)
    assert getattr(model.cfg, switch)
    logits, after = model.run_with_cache(inputs)
    added = {f"blocks.{layer}.{name}" for layer in range(2) for name in names}
    assert set(after.keys()) - set(before.keys()) == added
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)
    getattr(model, f"set_{switch}")(False)
    assert set(model.run_with_cache(inputs)[1].keys()) == set(before.keys())


def test_caching_hooks_stay_until_they_are_reset(seed: int) -> None:
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed)
    stored = model.add_caching_hooks("blocks.1.hook_mlp_out", incl_bwd=True)
    everything = model.add_caching_hooks()
    logits = model(inputs)
    assert list(stored) == ["blocks.1.hook_mlp_out"]
    _, cache = model.run_with_cache(inputs)
    assert set(everything) == set(cache.keys())
    model.reset_hooks()
    stored.clear()
    assert not stored and not model.list_hooks()
    torch.testing.assert_close(model(inputs), logits, atol=1e-4, rtol=1e-4)
    assert not stored


def test_what_a_cache_does_not_hold(run: Run) -> None:
    inputs = run.prompts.for_mmlens(run.model)
    _, cache = run.model.run_with_cache(inputs, names_filter="blocks.0.hook_mlp_out")
    with pytest.raises(KeyError, match=r"does not hold 'blocks.1.hook_mlp_out'.*kept 1 activ"):
        cache["mlp_out", 1]
    with pytest.raises(KeyError, match="what TransformerLens 4 calls so is 'blocks.0.hook_mlp_out"):
        cache["blocks.0.mlp.hook_out"]
    with pytest.raises(KeyError, match=r"no hook point is called 'blocks.9.hook_mlp_out'"):
        cache["mlp_out", 9]
