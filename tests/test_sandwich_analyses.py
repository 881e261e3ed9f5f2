"""What analyses and edits say of models that normalise what attention and MLP give.

The reference is a formula in float64 on transformers' own modules, or plain runs.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import recorded
from random_models import SHAPES, hooked, random_language_model, random_prompts
from small_models import KINDS, plain_run, small_inputs, small_model
from torch import Tensor

from mmlens import EditRequest, Intervention, direct_logit_attribution, logit_lens, multedit
from mmlens.editing import key_covariance, memit, rome
from mmlens.editing.multedit_settings import MultEditSettings
from mmlens.interventions.functions import add

TOLERANCE = 1e-4
NAMES = ["gemma2", "gemma3", "qwen2", "granite", "granite, biases"]


def scales_of(norm: Any, x: Tensor) -> Tensor:
    """What a norm of Gemma's divides by."""
    return (x.pow(2).mean(dim=-1, keepdim=True) + norm.eps).sqrt()


@torch.no_grad()
def written_parts(hf: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """By formula: what heads [layer, pos, head, d] and neurons [layer, pos, neuron, d] add.

    With the post-norms' scales of the run; then the final norm's scale, and all that was seen.
    """
    hf = hf.double()
    hf.set_attn_implementation("eager")
    seen: dict[str, Tensor] = {}
    with recorded(dict(hf.named_modules()), seen):
        hf(tokens)
    heads, neurons = [], []
    times = getattr(hf.config, "residual_multiplier", 1.0)
    for layer, block in enumerate(hf.model.layers):
        there = f"model.layers.{layer}"
        z = seen[f"{there}.self_attn.o_proj:in"][0].double()
        post = seen[f"{there}.mlp.down_proj:in"][0].double()
        W_O, W_out = block.self_attn.o_proj.weight, block.mlp.down_proj.weight
        n_heads = z.shape[-1] // block.self_attn.head_dim
        by_head = W_O.unflatten(1, (n_heads, -1))
        result = torch.einsum("phd, mhd -> phm", z.unflatten(-1, (n_heads, -1)), by_head)
        result_mlp = post[..., None] * W_out.T
        if hasattr(block, "pre_feedforward_layernorm"):
            for norm, out, name in (
                (block.post_attention_layernorm, "self_attn", "heads"),
                (block.post_feedforward_layernorm, "mlp", "neurons"),
            ):
                x = seen[f"{there}.{out}:out"][0].double()
                factor = (1 + norm.weight) / scales_of(norm, x)
                if name == "heads":
                    result = result * factor[:, None]
                else:
                    result_mlp = result_mlp * factor[:, None]
        heads.append(result * times)
        neurons.append(result_mlp * times)
    last = hf.model.norm
    eps = last.eps if hasattr(last, "eps") else last.variance_epsilon
    x = seen["model.norm:in"][0].double()
    final = (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    return torch.stack(heads), torch.stack(neurons), final, seen


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decompositions_equal_the_formula(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name])
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, images=[0])
    tokens = prompts.tokens
    heads, neurons, final, seen = written_parts(hf, tokens)
    _, cache = model.run_with_cache(tokens)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    stack = cache.stack_head_results(n_layers, return_labels=False)[:, 0]
    assert (stack.unflatten(0, (n_layers, n_heads)).transpose(1, 2) - heads).abs().max() < TOLERANCE
    found = cache.stack_neuron_results(n_layers)[:, 0]
    expected = neurons.transpose(1, 2).flatten(0, 1)
    assert (found - expected).abs().max() < TOLERANCE
    at = random.randrange(tokens.shape[1])
    alone = cache.get_neuron_results(1, pos_slice=at, neuron_slice=[0, 3])[0]
    assert (alone - neurons[1, at, [0, 3]]).abs().max() < TOLERANCE
    direction = torch.randn(model.cfg.d_model)
    projected = cache.stack_neuron_results(n_layers, apply_ln=True, project_output_onto=direction)
    read = direction * model.ln_final.w
    assert (projected[:, 0] - expected @ read.double() / final[:, 0]).abs().max() < TOLERANCE
    # All of them are the stream, and the parts of a component sum to what it adds.
    for layer in range(n_layers):
        bias = 0 if model.cfg.post_norms else model.cfg.residual_scale * model.b_O[layer]
        attn = cache["attn_out", layer][0] - bias
        assert (heads[layer].sum(dim=1) - attn).abs().max() < TOLERANCE * model.cfg.n_heads
    whole = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=False)
    assert (whole.sum(dim=0) - cache["resid_post", n_layers - 1]).abs().max() < 10 * TOLERANCE
    if model.cfg.changes_outputs:
        result = cache["blocks.0.attn.hook_result"][0].sum(dim=1) + model.b_O[0]
        out = seen["model.layers.0.self_attn:out"][0]
        assert (result - out).abs().max() < TOLERANCE
        assert (cache["blocks.0.attn.hook_out"][0] - out).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_attributions_equal_the_formula(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name])
    model = hooked(hf, tmp_path)
    inputs = model.inputs_from_tokens(random_prompts(hf.config, images=[0]).tokens)
    heads, _, final, seen = written_parts(hf, inputs.tokens)
    token = random.randrange(model.cfg.d_vocab)
    found = direct_logit_attribution(model, inputs, token, per_head=True)
    offset = 1.0 if name.startswith("gemma") else 0.0
    read = hf.lm_head.weight[token] * (offset + hf.model.norm.weight) / final
    read = read / getattr(hf.config, "logits_scaling", 1.0)
    rows = {component: i for i, component in enumerate(found.components)}
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            part = (heads[layer, :, head] * read).sum(dim=-1)
            ours = found.values[rows[f"{layer}.head_{head}"]]
            assert (ours - part).abs().max() < TOLERANCE
    uncapped = seen["lm_head:out"][0, :, token] / getattr(hf.config, "logits_scaling", 1.0)
    lens_of = model.tokens_to_residual_directions(torch.tensor(token))
    at_end = model.run_with_cache(inputs)[1]["resid_post", -1][0]
    assert (model.ln_final(at_end) @ lens_of - uncapped).abs().max() < 10 * TOLERANCE
    assert (found.logits - uncapped).abs().max() < TOLERANCE
    assert (found.values.sum(dim=0) - uncapped).abs().max() < 10 * TOLERANCE
    # The lens reads a stream as the model does: with the cap.
    lens = logit_lens(model, inputs, tokens=[token])
    assert (
        lens.log_probs[-1, :, 0] - model(inputs)[0].log_softmax(-1)[:, token]
    ).abs().max() < 1e-4


def test_memit_spreads_a_goal_over_layers_with_a_factor(seed: int) -> None:
    """As in a model without the factor whose output weights have it instead."""
    chance = random.Random(seed)
    model = small_model(seed, n_layers=3, residual_scale=0.4).double()
    plain = small_model(seed, n_layers=3).double()
    plain.load_state_dict(model.state_dict())
    for block in plain.blocks:
        for part in (block.attn.o, block.mlp.down):
            for parameter in part.parameters():
                parameter.data.mul_(0.4)
    inputs = small_inputs(model, seed, images=(1,), words=(6,))
    inputs.spans[0]["constraint"] = torch.tensor([int(inputs.span("text")[2])])
    others = [small_inputs(model, seed + i, images=(1,), words=(9,)) for i in range(1, 9)]
    target = chance.randrange(4, 40)
    for layers in ([1], [1, 2]):
        found = []
        for each in (model, plain):
            covariance = key_covariance(each, others, layers)
            request = EditRequest(inputs, target)
            options = {"layer": layers, "covariance": covariance, "steps": 3, "weight": 1e-3}
            edit = memit(each, request, **options)
            with edit.applied(each), torch.no_grad():
                found.append(each(inputs)[0, -1])
        if len(layers) > 1:  # alone, the value is searched before the factor, by other steps
            assert (found[0] - found[1]).abs().max() < 1e-6
        assert all(logits.isfinite().all() for logits in found)


def behind_a_norm(seed: int) -> tuple[Any, EditRequest, int, int]:
    """A model with post-norms, a request, its position, and the edited layer."""
    model = small_model(seed, n_layers=3, **KINDS["sandwich"])
    inputs = small_inputs(model, seed, images=(1,), words=(6,))
    at = int(inputs.span("text")[2])
    inputs.spans[0]["constraint"] = torch.tensor([at])
    return model, EditRequest(inputs, 7), at, 1


def test_a_value_is_searched_and_written_before_the_norm(seed: int) -> None:
    """What the search adds at `mlp.hook_out` is what the closed form writes there, by lam."""
    model, request, at, layer = behind_a_norm(seed)
    settings = MultEditSettings.paper(steps=12, lam=0.3)
    edit = multedit(model, request, layer=layer, settings=settings)
    inputs = request.prompts[0]
    names = [f"blocks.{layer}.mlp.hook_out", f"blocks.{layer}.mlp.hook_post"]
    with torch.no_grad():
        _, before = model.run_with_cache(inputs, names_filter=names)
        with edit.applied(model):
            after, written = model.run_with_cache(inputs, names_filter=names)
    key = before[names[1]][0, at]
    assert torch.equal(key, written[names[1]][0, at])
    moved = written[names[0]][0, at] - before[names[0]][0, at]
    [delta] = edit.deltas.values()
    share = float(key @ key / (0.3 + key @ key))
    assert (moved - delta.dense() @ key).abs().max() < TOLERANCE
    # The value of the search, added there, gives the probability that the search reports.
    value = moved / share
    hook = [Intervention("mlp.out", [layer], [at], add(value))]
    logits = plain_run(model, inputs, hook)[0, -1]
    assert abs(float(logits.softmax(-1)[7]) - edit.metadata["probability"][0]) < 1e-3
    assert moved.abs().max() > 1e-3 and after.isfinite().all()


def test_memit_writes_one_layer_before_the_norm(seed: int) -> None:
    model, request, _, layer = behind_a_norm(seed)
    others = [small_inputs(model, seed + i, images=(1,), words=(9,)) for i in range(1, 9)]
    covariance = key_covariance(model, others, [layer, 2])
    with pytest.raises(ValueError, match="norm after each MLP"):
        memit(model, request, layer=[layer, 2], covariance=covariance, steps=2)
    edit = memit(model, request, layer=layer, covariance=covariance, steps=8, weight=1e-6)
    exact = rome(model, request, layer=layer, covariance=covariance, steps=8, ridge=1e-9)
    inputs, name = request.prompts[0], f"blocks.{layer}.mlp.hook_out"
    found = []
    with torch.no_grad():
        for each in (edit, exact):
            with each.applied(model):
                found.append(model.run_with_cache(inputs, names_filter=name)[1][name])
    # With a corpus that weighs nothing, MEMIT gives the key its value, as ROME does.
    assert (found[0] - found[1])[0].abs().max() < 1e-2 * found[1].abs().max()
