"""Logit lens, direct logit attribution and attribution patching.

References are the model's own logits, TransformerLens, and exact patches.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from small_models import (
    D_VOCAB,
    KINDS,
    language_model,
    picture,
    small_inputs,
    small_model,
    worded_model,
)

from mmlens import causal_trace, hook_name, noise_span
from mmlens.analyses.attribution_patching import AttributionPatching, attribution_patching
from mmlens.analyses.direct_logit_attribution import (
    DirectLogitAttribution,
    direct_logit_attribution,
)
from mmlens.analyses.logit_lens import LogitLens, logit_lens
from mmlens.interventions.functions import replace as put

# As elsewhere: logits of order 1 to 10 in float32.
TOLERANCE = 1e-4
PROBABILITY = 1e-5


# Logit lens and direct logit attribution


@pytest.mark.parametrize("norm", ["RMS", "LN"])
def test_the_lens_behind_the_last_layer_is_the_model(seed, norm):
    model = small_model(seed, normalization_type=norm)
    inputs = small_inputs(model, seed)
    tokens = random.sample(range(D_VOCAB), 3)
    lens = logit_lens(model, inputs, tokens=tokens, top=4)
    logits, cache = model.run_with_cache(inputs)
    expected = logits[0].log_softmax(-1)
    assert torch.allclose(lens.log_probs[-1], expected[:, tokens], atol=1e-4, rtol=1e-5)
    assert torch.allclose(lens.top_log_probs[-1], expected.topk(4).values, atol=1e-4, rtol=1e-5)
    for layer in range(model.cfg.n_layers):
        read = model.unembed(model.ln_final(cache["resid_post", layer]))[0].log_softmax(-1)
        assert torch.allclose(lens.log_probs[layer], read[:, tokens], atol=1e-4, rtol=1e-5)
        for k, token in enumerate(tokens):
            lower = (read > lens.log_probs[layer, :, k, None] + 1e-4).sum(-1)
            upper = (read > lens.log_probs[layer, :, k, None] - 1e-4).sum(-1)
            assert (lower <= lens.ranks[layer, :, k]).all(), token
            assert (lens.ranks[layer, :, k] <= upper).all(), token


def test_the_lens_reads_visual_tokens(seed, tmp_path):
    model = worded_model(seed)
    inputs = model.prepare("What is this?", picture(seed))
    lens = logit_lens(model, inputs, layers=[1], positions="image", tokens=[" flag", 7], top=3)
    assert lens.log_probs.shape == (1, len(inputs.span("image")), 2)
    assert lens.positions == tuple(inputs.span("image").tolist())
    position = lens.positions[-1]
    logits = model.unembed(model.ln_final(model(inputs, stop_at_layer=2)))[0, position]
    best = lens.top_strings(1, position)
    assert best == model.to_str_tokens(logits.topk(3).indices.tolist())
    assert len(lens.to_dataframe()) == len(lens.positions)
    again = LogitLens.load(lens.save(tmp_path / "it.safetensors"))
    assert torch.equal(again.ranks, lens.ranks) and again.names == lens.names
    assert again.top_strings(1, position) == best
    with pytest.raises(ValueError, match="top=0"):
        logit_lens(model, inputs, top=0)
    noisy = noise_span(model, inputs, "image", samples=2)
    for analysis in (logit_lens, direct_logit_attribution):
        with pytest.raises(ValueError, match="have 2 of noise"):
            analysis(model, noisy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["RMS", "LN"])
@pytest.mark.parametrize("per_head", [False, True])
def test_direct_attributions_sum_to_the_logit(seed, norm, per_head, kind):
    norm = "RMS" if kind == "sandwich" else norm  # norms after attention and MLP are RMSNorms
    model = small_model(seed, **{**KINDS[kind], "normalization_type": norm, "o_bias": True})
    inputs = small_inputs(model, seed)
    token, contrast = random.sample(range(D_VOCAB), 2)
    found = direct_logit_attribution(model, inputs, token, contrast=contrast, per_head=per_head)
    logits = model(inputs)[0]
    assert torch.allclose(found.logits, logits[:, token] - logits[:, contrast], atol=TOLERANCE)
    total = found.values.sum(dim=0)
    # Float32: parts may be larger than their sum.
    size = found.values.abs().sum(dim=0)
    assert ((total - found.logits).abs() <= 1e-5 * (1 + size)).all()
    per_layer = model.cfg.n_heads + 1 if per_head else 2
    assert len(found.components) == 2 + per_layer * model.cfg.n_layers == len(found.values)


def test_direct_attribution_agrees_with_transformer_lens(seed):
    """`ActivationCache.logit_attrs` of its own decomposition, at the last position."""
    model = language_model(seed, normalization_type="RMS")
    inputs = small_inputs(model, seed, images=(0,))
    token = random.randrange(D_VOCAB)
    _, cache = model.run_with_cache(inputs)
    parts, labels = cache.decompose_resid(return_labels=True)
    expected = cache.logit_attrs(parts, tokens=token)[:, 0, -1]
    found = direct_logit_attribution(model, inputs, token, positions="last")
    ours = dict(zip(found.components, found.values[:, 0], strict=True))
    for label, value in zip(labels, expected, strict=True):
        name = label.replace("_attn_out", ".attn_out").replace("_mlp_out", ".mlp_out")
        assert torch.allclose(ours[name], value, atol=1e-4, rtol=1e-4), label


def test_direct_attribution_of_words(seed, tmp_path):
    model = worded_model(seed)
    inputs = model.prepare("What is this?", picture(seed))
    found = direct_logit_attribution(model, inputs, "flag", contrast="city", positions="image")
    assert found.token.strip() and found.contrast.strip() and found.token != found.contrast
    table = found.to_dataframe()
    assert len(table) == found.values.numel()
    assert table.value.tolist() == found.values.flatten().tolist()
    again = DirectLogitAttribution.load(found.save(tmp_path / "it.safetensors"))
    assert torch.equal(again.values, found.values) and again.components == found.components
    by_default = direct_logit_attribution(model, inputs)
    logits = model(inputs)[0, -1]
    assert torch.allclose(by_default.logits[-1], logits.max(), atol=TOLERANCE)
    assert by_default.contrast == ""


# Attribution patching


def pair(model, seed):
    """Clean and corrupted inputs from tokens: two words in the middle are others."""
    clean = small_inputs(model, seed, words=(6,))
    tokens = clean.tokens.clone()
    for position in clean.span("text").tolist()[1:3]:
        tokens[0, position] = 2 + (int(tokens[0, position]) + 7) % 57
    return clean, replace(clean, tokens=tokens)


SITES = ("resid_post", "attn_out", "mlp_out")


def exact_effects(model, clean, corrupted, found, metric, share=1.0):
    """The metric's change when a share of the clean - corrupted difference is put in, by cell."""
    _, clean_cache = model.run_with_cache(clean)
    _, cache = model.run_with_cache(corrupted)
    effects = torch.empty_like(found.indirect_effect)
    for s, site in enumerate(found.sites):
        for g, group in enumerate(map(list, found.groups)):
            for i, layer in enumerate(found.layers):

                def move(x, hook, group=group):
                    step = clean_cache[hook.name] - cache[hook.name]
                    x[:, group] += share * step[:, group]
                    return x

                name = f"blocks.{layer}.hook_{site}"
                effects[s, g, i] = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, move)]))
    return effects - metric(model(corrupted))


def test_attribution_patching_is_the_derivative(seed):
    """Equal to the exact patch's central difference of fourth order, in float64.

    It is off by h^4 / 30 times a fifth derivative, and by the rounding of the metric over h. At
    h = 2e-4 these are 1e-16 and 1e-11 times factors of the model; 1e-6 of the largest effect
    leaves five digits for them.
    """
    model = small_model(seed, n_layers=2).double()
    clean, corrupted = (
        inputs.with_pixels(inputs.pixel_values.double()) for inputs in pair(model, seed)
    )
    answer = random.randrange(D_VOCAB)

    def metric(logits):
        return logits[0, -1].log_softmax(-1)[answer]

    found = attribution_patching(
        model,
        clean,
        corrupted,
        positions=[clean.span("text")[1:3], clean.span("last")],
        answer=answer,
        metric=lambda x: x[:, -1].log_softmax(-1)[:, answer],
    )
    h = 2e-4
    near, far = (
        exact_effects(model, clean, corrupted, found, metric, step)
        - exact_effects(model, clean, corrupted, found, metric, -step)
        for step in (h, 2 * h)
    )
    expected = (8 * near - far) / (12 * h)
    assert (found.indirect_effect - expected).abs().max() <= 1e-6 * (1 + expected.abs().max())
    assert found.clean == pytest.approx(float(metric(model(clean))))
    assert found.corrupted == pytest.approx(float(metric(model(corrupted))))


def slope(model, clean, corrupted, place, positions, token):
    """The derivative of a logit, towards the clean activation at some positions, by autograd."""
    name = hook_name(*place)
    axis = 2 if place[0] in ("pattern", "attn_scores") else 1  # of the queries
    kept = model.run_with_cache(clean, names_filter=name)[1][name]
    with torch.enable_grad():
        share = torch.zeros((), dtype=torch.double, requires_grad=True)

        def move(activation, hook):
            at = torch.zeros(activation.shape[axis], dtype=torch.bool)
            at[positions] = True
            at = at.view(-1, *[1] * (activation.ndim - axis - 1)) & activation.isfinite()
            return activation + share * (kept - activation).masked_fill(~at, 0.0).detach()

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, move)])
        return torch.autograd.grad(logits[0, -1, token], share)[0].item()


@pytest.mark.parametrize(
    "site", ["pattern", "attn_scores", "z", "k", "ln1.scale", "embed", "input_embed"]
)
def test_attribution_patching_of_any_site(seed, site):
    """Wherever its axis of positions is, with masked scores, and without layers."""
    model = small_model(seed, n_layers=2).double()
    clean, corrupted = (
        inputs.with_pixels(inputs.pixel_values.double()) for inputs in pair(model, seed)
    )
    token, last = random.randrange(D_VOCAB), clean.n_pos - 1
    at = random.randrange(last)
    found = attribution_patching(
        model,
        clean,
        corrupted,
        sites=(site,),
        positions=[[at], [last], [at, last], [last, at, last]],
        answer=token,
        metric=lambda logits: logits[:, 0, token],
    )
    groups = [[at], [last], [at, last], [last, at]]
    assert found.groups == tuple(map(tuple, groups))
    layers = range(2) if "embed" not in site else [None]
    expected = torch.tensor(
        [
            [slope(model, clean, corrupted, (site, layer), group, token) for layer in layers]
            for group in groups
        ],
        dtype=torch.double,
    )
    # Both are the same gradient in float64.
    bound = 1e-9 * (1 + expected.abs().max())
    assert (found.indirect_effect[0] - expected).abs().max() <= bound


def test_attribution_patching_is_exact_where_the_model_is_linear(seed):
    """The last layer's sites, the final norm's scale held: the logit is linear in them."""
    model = small_model(seed, normalization_type="RMS").double()
    clean, corrupted = (
        inputs.with_pixels(inputs.pixel_values.double()) for inputs in pair(model, seed)
    )
    answer = random.randrange(D_VOCAB)
    last = model.cfg.n_layers - 1
    options = {"sites": ("resid_post", "mlp_out"), "layers": [last], "answer": answer}
    options["positions"] = [clean.span("text")[1:3], clean.span("last")]
    with model.hooks(fwd_hooks=[("ln_final.hook_scale", put(1.7))]):
        found = attribution_patching(
            model, clean, corrupted, metric=lambda x: x[:, -1, answer], **options
        )
        expected = exact_effects(model, clean, corrupted, found, lambda x: x[0, -1, answer])
    assert torch.allclose(found.indirect_effect, expected, rtol=1e-9, atol=1e-9)


def test_the_error_is_that_against_a_causal_trace(seed, tmp_path):
    model = small_model(seed)
    clean, corrupted = pair(model, seed)
    answer = random.randrange(D_VOCAB)
    groups = [clean.span("text")[1:3], clean.span("last")]
    found = attribution_patching(model, clean, corrupted, positions=groups, answer=answer)
    trace = causal_trace(model, clean, corrupted, positions=groups, answer=answer)
    assert found.clean == pytest.approx(trace.clean, abs=PROBABILITY)
    assert found.corrupted == pytest.approx(trace.corrupted, abs=PROBABILITY)
    error = found.error(trace)
    off = (found.indirect_effect.double() - trace.indirect_effect.double()).abs()
    assert error.largest == pytest.approx(off.max().item())
    assert error.mean == pytest.approx(off.mean().item())
    exact = replace(trace, restored=found.indirect_effect.double() + trace.corrupted)
    assert found.error(exact).largest <= 1e-12
    twice = replace(trace, restored=2 * found.indirect_effect.double() + trace.corrupted)
    assert found.error(twice).relative == pytest.approx(0.5, abs=1e-3)
    again = AttributionPatching.load(found.save(tmp_path / "it.safetensors"))
    assert torch.equal(again.indirect_effect, found.indirect_effect)
    assert again.groups == found.groups and again.error(trace) == error
    assert len(found.to_dataframe()) == found.indirect_effect.numel()
    with pytest.raises(ValueError, match="other answer_tokens"):
        found.error(replace(trace, answer_tokens=(answer + 1,)))
    by_logits = {"metric": "logit_diff", "positions": groups, "answer": answer}
    one, other = random.sample(range(D_VOCAB), 2)
    followed = attribution_patching(model, clean, corrupted, contrast=one, **by_logits)
    contrasted = causal_trace(model, clean, corrupted, contrast=other, **by_logits)
    with pytest.raises(ValueError, match="the trace has other contrast"):
        followed.error(contrasted)
    with pytest.raises(ValueError, match="3 layers together"):
        found.error(replace(trace, window=3))
    with pytest.raises(ValueError, match="of the decoder"):
        attribution_patching(model, clean, corrupted, sites=("vision.mlp_out",), positions=[[1]])


def test_attribution_patching_averages_over_noise(seed):
    model = small_model(seed, n_layers=2)
    clean = small_inputs(model, seed)
    noisy = noise_span(model, clean, "text", samples=3)
    answer = random.randrange(D_VOCAB)
    whole = attribution_patching(model, clean, noisy, answer=answer)
    each = [
        attribution_patching(
            model, clean, replace(clean, noise=noisy.noise[i : i + 1]), answer=answer
        ).indirect_effect
        for i in range(3)
    ]
    mean = torch.stack(each).mean(dim=0)
    bound = 1e-4 * (1 + mean.abs().max())
    assert (whole.indirect_effect - mean).abs().max() <= bound


def test_nothing_stays_on_the_model(seed):
    model = small_model(seed)
    clean, corrupted = pair(model, seed)

    def fail(logits):
        raise RuntimeError("no metric")

    with pytest.raises(RuntimeError, match="no metric"):
        attribution_patching(model, clean, corrupted, metric=fail)
    logit_lens(model, clean)
    direct_logit_attribution(model, clean)
    assert not any(point._forward_hooks for point in model.hook_dict.values())
    assert all(not parameter.requires_grad for parameter in model.parameters())
