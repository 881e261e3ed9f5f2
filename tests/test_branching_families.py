"""Branches equal plain runs on every family, in bf16 and in their gradients."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from half_precision import check_half_precision, rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import SHAPES, Shape, hooked, llava_config, random_llava, random_prompts
from small_models import SITES_WITHOUT_LAYERS, any_attention, plain_run, small_inputs
from test_branching import assert_equal_to_plain_runs, decoder_edit, probabilities

from mmlens import Intervention, window
from mmlens.interventions.functions import add, noise, scale, zero
from mmlens.interventions.intervention import LAYERED_SITES, hook_name

SEEDS = st.integers(0, 2**31)


def has(model, site):
    """Whether the model has a site: parallel blocks and towers lack some."""
    name = hook_name(site) if site in SITES_WITHOUT_LAYERS else hook_name(site, 0)
    return name in model.hook_dict


def any_edit(model, inputs, chance):
    """A random intervention anywhere: decoder, embeddings, projector or tower."""
    below = [site for site in SITES_WITHOUT_LAYERS if has(model, site)]
    below += [f"vision.{site}" for site in LAYERED_SITES if has(model, f"vision.{site}")]
    site = chance.choice(below)
    if chance.random() < 0.6:
        return decoder_edit(model, inputs, chance)
    if site in SITES_WITHOUT_LAYERS:
        layers = None
    else:
        n_layers = model.cfg.vision.n_layers
        layers = window(site, chance.randrange(n_layers), chance.choice([1, 3]), model)
    in_tower = site.startswith(("vision.", "projector."))
    positions = chance.choice([[0], [1, 0], None] if in_tower else [[inputs.n_pos - 1], [2], None])
    if site.startswith("projector.") and any(len(image.positions) == 1 for image in inputs.images):
        positions = [0]  # the connector has one position of such an image
    hooks = [scale(1.4), noise(0.5, seed=chance.randrange(99))]
    return Intervention(site, layers, positions, chance.choice(hooks))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_every_family(seed: int, tmp_path: Path, shape: Shape) -> None:
    chance = random.Random(seed)
    model = hooked(random_llava(shape), tmp_path)
    images = chance.choice([[1], [2], [1, 0, 2]])
    inputs = random_prompts(llava_config(shape), images).for_mmlens(model)
    branches = [
        [any_edit(model, inputs, chance) for _ in range(chance.choice([1, 1, 2]))]
        for _ in range(12)
    ]
    rows = chance.choice([None, 1, 7])
    assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=rows)


@settings(max_examples=15)
@given(SEEDS, st.sampled_from([None, 2, 9]))
def test_branches_that_begin_anywhere_share_passes(seed, batch_rows):
    chance = random.Random(seed)
    model = any_attention(seed)
    inputs = small_inputs(model, seed, images=chance.choice([(1,), (2,), (1, 2), (1, 0, 2)]))
    branches = [
        [any_edit(model, inputs, chance) for _ in range(chance.choice([1, 1, 2, 3]))]
        for _ in range(chance.randint(2, 9))
    ]
    assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=batch_rows)


@pytest.mark.slow
@torch.no_grad()
def test_bf16_is_as_exact_as_plain_runs(seed: int) -> None:
    """The error against float64 runs of the same weights is at most 1.1 x that of plain runs.

    In the geometric mean over several models, since the error of one model is noise.
    """
    ratios = []
    for index in range(32):
        chance = random.Random(seed + index)
        model = any_attention(seed + index, d_model=25, n_layers=5).to(torch.bfloat16)
        inputs = small_inputs(model, seed + index, images=(1,))
        last = inputs.n_pos - 1
        branches = [
            [Intervention(site, window(site, layer, 3, model), [at], edit)]
            for site in ("resid_post", "attn_out", "mlp_out")
            for layer in chance.sample(range(5), 2)
            for at, edit in [
                chance.choice([(chance.randrange(last), scale(0.5)), (last - 2, zero())])
            ]
        ]
        read = [last - 2, last - 1, last]  # more positions, less noise
        branched = model.record(inputs).run(branches, lambda x: x, positions=read)[:, 0]
        plain = torch.stack([plain_run(model, inputs, branch)[0, read] for branch in branches])
        exact = [plain_run(model.double(), inputs, branch)[0, read] for branch in branches]
        errors = [rms_error(x, torch.stack(exact)) for x in (branched, plain)]
        ratios.append(errors[0] / errors[1])
    check_half_precision(ratios)


@settings(max_examples=12)
@given(SEEDS)
def test_gradients_equal_those_of_the_full_run(seed):
    """At any site, to far less than 1e-5: in float64 nothing hides a wrong term."""
    chance = random.Random(seed)
    model = any_attention(seed).double()
    inputs = small_inputs(model, seed, images=chance.choice([(1,), (1, 0)]))
    last = inputs.n_pos - 1
    sites = [site for site in LAYERED_SITES if has(model, site) and "scale" not in site]
    branches, deltas = [], []
    for _ in range(3):
        site, layer = chance.choice(sites), chance.randrange(model.cfg.n_layers)
        at = chance.choice([[last], [chance.randrange(1, last + 1)], [1, last]])
        delta = torch.zeros((), dtype=torch.double, requires_grad=True)
        deltas.append(delta)
        other = decoder_edit(model, inputs, chance, "mlp_out")
        branches.append([Intervention(site, layer, at, add(delta)), other])

    def answer(logits):
        return logits.log_softmax(-1)[:, -1, 5]

    branched = model.record(inputs).run(branches, answer)
    found = torch.autograd.grad(branched.sum(), deltas, allow_unused=True)
    plain = torch.stack([answer(plain_run(model, inputs, branch)) for branch in branches])
    full = torch.autograd.grad(plain.sum(), deltas, allow_unused=True)
    size = max(float(g.abs()) for g in full if g is not None)
    for ours, theirs in zip(found, full, strict=True):
        ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))
        assert float((ours - theirs).abs()) <= 1e-9 * max(1.0, size)


@settings(max_examples=8)
@given(SEEDS)
def test_gradients_for_attribution_patching(seed):
    """One branch that adds zero at every layer gives the gradient at every activation at once."""
    model = any_attention(seed, n_layers=3).double()
    inputs = small_inputs(model, seed, images=(1,))
    shape = (3, 1, inputs.n_pos, model.cfg.d_model)
    for site in ("resid_post", "mlp_out", "attn_out"):
        delta = torch.zeros(shape, dtype=torch.double, requires_grad=True)
        branch = [Intervention(site, layer, None, add(delta[layer])) for layer in range(3)]
        found = model.record(inputs).run([branch], lambda x: probabilities(x)[:, 0, 5])
        [branched] = torch.autograd.grad(found.sum(), delta)
        plain = probabilities(plain_run(model, inputs, branch)[0, -1])[5]
        [full] = torch.autograd.grad(plain, delta)
        assert float(full.abs().max()) > 0
        assert float((branched - full).abs().max()) <= 1e-9 * max(1.0, float(full.abs().max()))
