"""Branches equal plain hooked runs, at every site and position, and do no work of others."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace as with_fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    KINDS,
    SITES_WITHOUT_LAYERS,
    language_model,
    plain_run,
    sites_of,
    small_inputs,
    small_model,
)

from mmlens import Intervention, hook_name, window
from mmlens.config import MultimodalConfig
from mmlens.interventions.functions import add, knockout, noise, replace, restore, scale, zero
from mmlens.interventions.intervention import LAYERED_SITES
from mmlens.model.components import TransformerBlock

TOLERANCE = 1e-5
SEEDS = st.integers(0, 2**31)


def probabilities(logits):
    """P of every token, at every position that is read."""
    return logits.softmax(dim=-1)


def decoder_edit(model, inputs, chance, site=None):
    """A random intervention in the decoder."""
    site = site or chance.choice(sites_of(model))
    having = [i for i in range(model.cfg.n_layers) if hook_name(site, i) in model.hook_dict]
    layers = window(site, chance.choice(having), chance.choice([1, 3, 6]), model)
    n_pos = inputs.n_pos
    positions = chance.choice(
        [
            [chance.randrange(n_pos)],
            [n_pos - 1],
            chance.sample(range(n_pos), min(3, n_pos)),
            inputs.spans[0].get("image", torch.tensor([1]))[:2].tolist(),
            None,
        ]
    )
    hooks = [zero(), scale(-1.3), add(0.9), noise(0.8, seed=chance.randrange(99)), replace(0.7)]
    if site in ("attn_scores", "pattern"):
        hooks = [knockout(chance.sample(range(n_pos), 2)), scale(0.3), noise(0.5)]
    elif site.endswith("scale"):
        hooks = [scale(1.4), replace(2.0)]
    return Intervention(site, layers, positions, chance.choice(hooks))


def assert_equal_to_plain_runs(model, inputs, branches, chance=None, **options):
    """P of every token, of every branch and row, at the last position or (by chance) at others."""
    others = chance is not None and chance.random() < 0.5
    read = sorted(chance.sample(range(inputs.n_pos), 2)) if others else None
    at = [inputs.n_pos - 1] if read is None else read
    expected = torch.stack(
        [probabilities(plain_run(model, inputs, branch)[:, at]) for branch in branches]
    )
    given = None if read is None else torch.tensor(read)
    found = model.record(inputs).run(branches, probabilities, positions=given, **options)
    assert found.shape == expected.shape
    # A row of padding alone is read nowhere: every position is compared where it is real.
    real = inputs.attention_mask[:, at]
    if len(real) != found.shape[1]:
        real = real.expand(found.shape[1], -1)
    assert expected.isfinite().all()
    difference = float((found - expected).abs()[:, real].max())
    if difference > TOLERANCE:  # then plain runs themselves must be as far from float64
        exact = copy.deepcopy(model).double()
        runs = [probabilities(plain_run(exact, inputs, branch)[:, at]) for branch in branches]
        difference /= 10 * float((expected - torch.stack(runs)).abs()[:, real].max()) / TOLERANCE
    assert difference <= TOLERANCE
    return expected, model(inputs)[:, at].softmax(-1)


@settings(max_examples=40)
@given(SEEDS, st.sampled_from([1, 3, 64]))
def test_branches_equal_plain_runs(seed, batch_rows):
    chance = random.Random(seed)
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=chance.choice([(1,), (2,), (0,), (1, 0, 2)]))
    branches = [
        [decoder_edit(model, inputs, chance) for _ in range(chance.choice([1, 1, 2, 3]))]
        for _ in range(chance.randint(1, 6))
    ]
    assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=batch_rows)


# What images add in blocks, which is nothing at text, is in test_qwen_towers.py.
@pytest.mark.parametrize("site", [site for site in LAYERED_SITES if site != "deepstack"])
def test_every_site_of_the_decoder(seed, site):
    chance = random.Random(seed)
    # Where queries are normalised, the size of what comes before that says nothing.
    model = small_model(seed, gated_mlp=True, qk_norm="_norm." in site, **KINDS["sandwich"])
    inputs = small_inputs(model, seed, images=(1, 2), words=(4, 6))
    branches = [
        [Intervention(site, [layer], [inputs.n_pos - 1], scale(1.7))]
        for layer in range(model.cfg.n_layers)
    ] + [[decoder_edit(model, inputs, chance, site)] for _ in range(4)]
    expected, plain = assert_equal_to_plain_runs(model, inputs, branches)
    assert not torch.equal(expected, plain.expand_as(expected))


@pytest.mark.parametrize(
    "site",
    [
        *(site for site in SITES_WITHOUT_LAYERS if hook_name(site) in small_model(0).hook_dict),
        *("vision.mlp_out", "vision.pattern", "vision.z", "vision.resid_pre"),
    ],
)
def test_every_other_site(seed, site):
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(1, 2))
    layers = None if site in SITES_WITHOUT_LAYERS else 0
    at = [0] if "vision" in site or "projector" in site else [inputs.n_pos - 1, 2]
    edit = Intervention(site, layers, at, scale(1.7))
    above = Intervention("mlp_out", 1, [inputs.n_pos - 1], scale(0.5))
    branches = [[edit], [above], [edit, above], [Intervention(site, layers, None, noise(0.8))]]
    assert_equal_to_plain_runs(model, inputs, branches)
    exact = copy.deepcopy(model).double()  # a small effect is told from rounding there
    assert not torch.allclose(plain_run(exact, inputs, branches[3]), exact(inputs), 1e-9, 1e-9)


@settings(max_examples=8)
@given(SEEDS)
def test_samples_of_noise_are_rows(seed):
    chance = random.Random(seed)
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(chance.choice([0, 1]),))
    drawn = torch.randn(3, inputs.n_pos, model.cfg.d_model)
    drawn[:, :2] = 0
    inputs = with_fields(inputs, noise=drawn)
    branches = [[decoder_edit(model, inputs, chance)] for _ in range(4)]
    for batch_rows in (1, 6, 64):
        assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=batch_rows)


def test_left_padded_rows_of_very_different_lengths(seed):
    chance = random.Random(seed)
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(2, 0, 1), words=(7, 2, 4))
    padding = int((~inputs.attention_mask[1]).sum())
    # First positions before, inside and after the padding of the shortest row.
    branches = [
        [Intervention(site, layer, [first], scale(1.6))]
        for site in ("resid_post", "k")
        for layer in range(model.cfg.n_layers)
        for first in (0, padding - 1, padding, inputs.n_pos - 1)
    ]
    for batch_rows in (1, 7, 64):
        assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=batch_rows)


def test_a_language_model_alone(seed):
    chance = random.Random(seed)
    model = language_model(seed)
    inputs = small_inputs(model, seed, images=(0,), words=(9,))
    branches = [[decoder_edit(model, inputs, chance)] for _ in range(8)]
    assert_equal_to_plain_runs(model, inputs, branches, chance)


def test_branches_that_change_nothing(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    recording = model.record(inputs)
    logits = model(inputs)
    assert torch.allclose(recording.logits(), logits[:, -1:], atol=1e-4)
    assert torch.allclose(recording.logits(range(inputs.n_pos)), logits, atol=1e-4)
    idle = [[], [Intervention("z", [], 2, zero())], [Intervention("z", 1, [], zero())]]
    found = recording.run(idle, probabilities)
    assert torch.allclose(found, logits[:, -1:].softmax(-1).expand_as(found), atol=TOLERANCE)


def test_recorded_stream_and_readout(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(1, 1))
    _, cache = model.run_with_cache(inputs)
    recording = model.record(inputs)
    for layer in range(model.cfg.n_layers):
        assert torch.allclose(recording.resid[layer], cache["resid_pre", layer], atol=1e-4)
    last = model.cfg.n_layers - 1
    assert torch.allclose(recording.resid[-1], cache["resid_post", last], atol=1e-4)
    assert recording.past.frozen
    # Results come in the branches' order, with whatever axes the readout leaves.
    factors = [0.2, 3.0, 1.0, 2.0]
    at = inputs.n_pos - 1
    branches = [
        [Intervention("resid_post", layer, at, scale(f))]
        for f, layer in zip(factors, [last, 0, 1, 0], strict=True)
    ]
    moved = []
    found = recording.run(
        branches, lambda logits: logits[:, 0, 7], batch_rows=4, progress=lambda *n: moved.append(n)
    )
    expected = torch.stack([plain_run(model, inputs, branch)[:, -1, 7] for branch in branches])
    assert found.shape == (4, 2)
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-4)
    assert moved[-1] == (4, 4)
    steps = zip([0, *(done for done, _ in moved)], (done for done, _ in moved), strict=False)
    assert {after - before for before, after in steps} <= {1, 2}


def test_what_cannot_be_run(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    recording = model.record(inputs)
    n = inputs.n_pos
    with pytest.raises(ValueError, match="no branches"):
        recording.run([], probabilities)
    for read in ([-1], [n], []):
        with pytest.raises(ValueError, match="cannot read"):
            recording.run([[]], probabilities, positions=read)
    with pytest.raises(IndexError, match=f"there is no {n}"):
        recording.run([[Intervention("z", 0, n, zero())]], probabilities)
    with pytest.raises(KeyError, match="blocks.99"):
        recording.run([[Intervention("z", 99, 0, zero())]], probabilities)
    with pytest.raises(KeyError, match="nonsense"):
        recording.run([[("nonsense", zero())]], probabilities)


def test_undeclared_functions_are_run_plainly(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(1, 0))

    def anything(activation, hook):  # counts positions itself, so it must see them all
        assert activation.shape[1] == inputs.n_pos
        activation[:, 3] *= 2
        return activation

    name = hook_name("mlp_out", 1)
    edit = Intervention("z", 0, [inputs.n_pos - 1], zero())
    branches = [[(name, anything)], [edit], [edit, (name, anything)]]
    found = model.record(inputs).run(branches, probabilities)
    for branch, row in zip(branches, found, strict=True):
        hooks = [
            pair
            for part in branch
            for pair in (part.fwd_hooks() if isinstance(part, Intervention) else [part])
        ]
        expected = model.run_with_hooks(inputs, fwd_hooks=hooks)[:, -1:].softmax(-1)
        assert (row - expected).abs().max() <= TOLERANCE
    # So is everything while other hooks are on the model, of ours or of torch.
    with model.hooks(fwd_hooks=[(name, anything)]):
        under = model.record(inputs).run([[edit]], probabilities)
    expected = model.run_with_hooks(inputs, fwd_hooks=[*edit.fwd_hooks(), (name, anything)])
    assert (under[0] - expected[:, -1:].softmax(-1)).abs().max() <= TOLERANCE
    seen = []
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    model.record(inputs).run([[edit]], probabilities)
    handle.remove()
    assert set(seen) == {inputs.n_pos}


@settings(max_examples=10)
@given(SEEDS)
def test_gradients_equal_those_of_the_full_run(seed):
    chance = random.Random(seed)
    model = small_model(seed).double()
    inputs = small_inputs(model, seed, images=(1, 0))
    site = chance.choice(["resid_post", "mlp_out", "attn_out", "resid_pre"])
    at = chance.randrange(1, inputs.n_pos)
    delta = torch.zeros(2, model.cfg.d_model, dtype=torch.float64, requires_grad=True)
    branches = [[Intervention(site, layer, [at], add(delta[layer]))] for layer in (0, 1)]
    hooked = model.record(inputs).run(branches, lambda x: x.log_softmax(-1)[:, 0, 5])
    [branched] = torch.autograd.grad(hooked.sum(), delta)
    plain = [plain_run(model, inputs, branch)[:, -1].log_softmax(-1)[:, 5] for branch in branches]
    [full] = torch.autograd.grad(torch.stack(plain).sum(), delta)
    assert torch.allclose(branched, full, rtol=0, atol=1e-9 * float(full.abs().max()))


def count_work(monkeypatch):
    """Token positions that each decoder layer computes, from now on."""
    work: Counter[int] = Counter()
    forward = TransformerBlock.forward

    def counted(self, resid, **options):
        if isinstance(self.cfg, MultimodalConfig):  # a tower's blocks have other configurations
            work[options["layer"]] += resid.shape[0] * resid.shape[1]
        return forward(self, resid, **options)

    monkeypatch.setattr(TransformerBlock, "forward", counted)
    return work


@pytest.mark.parametrize("batch_rows", [1, 5, 64])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_no_work_below_the_first_layer_or_before_the_first_position(
    seed, monkeypatch, batch_rows, n_rows
):
    chance = random.Random(seed)
    model = small_model(seed, n_layers=5)
    inputs = small_inputs(model, seed, images=(1,) * n_rows)
    n_pos = inputs.n_pos
    starts = [(chance.randrange(5), chance.randrange(n_pos)) for _ in range(12)]
    starts += [(5, n_pos - 1)]
    branches = [
        [Intervention("ln_final.normalized", None, first, zero())]
        if layer == 5
        else [Intervention("mlp_out", range(layer, 5), range(first, n_pos), scale(0.9))]
        for layer, first in starts
    ]
    recording = model.record(inputs)
    work = count_work(monkeypatch)
    recording.run(branches, probabilities, batch_rows=batch_rows)
    for layer in range(5):
        needed = sum(n_pos - first for start, first in starts if start <= layer)
        assert work[layer] == needed * n_rows


def test_what_a_frozen_component_costs(seed, monkeypatch):
    """With positions=None the whole prompt, with the positions that can differ only these."""
    model = small_model(seed, n_layers=4).double()
    inputs = small_inputs(model, seed)
    n_pos, first = inputs.n_pos, inputs.n_pos - random.randint(2, 5)
    recording = model.record(inputs)
    _, cache = model.run_with_cache(inputs)
    changed = Intervention("resid_post", 0, [first], scale(2.0))
    work = count_work(monkeypatch)
    found = []
    for positions in (None, range(first, n_pos)):
        work.clear()
        frozen = Intervention("attn_out", 1, positions, restore(cache))
        found.append(recording.run([[changed, frozen]], probabilities))
        # Layer 0 is changed after its block, and the last layer computes what is read only.
        assert work[1] == work[2] == (n_pos if positions is None else n_pos - first)
    assert (found[0] - found[1]).abs().max() <= TOLERANCE
    plain = plain_run(model, inputs, [changed, frozen])[:, -1:]
    assert (found[0][0] - probabilities(plain)).abs().max() <= TOLERANCE


def test_the_recording_survives_its_branches(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    recording = model.record(inputs)
    before = [tensor.clone() for tensor in recording.resid]
    keys = [tensor.clone() for entry in recording.past.entries for tensor in entry]

    def in_place(slice, hook):
        slice.zero_()

    last = [inputs.n_pos - 1]
    branches = [
        [Intervention(site, layer, positions, in_place)]
        for site, positions in [("resid_pre", None), ("mlp_out", None), ("k", last), ("v", last)]
        for layer in range(model.cfg.n_layers)
    ]
    first = recording.run(branches, probabilities)
    assert torch.equal(first, recording.run(branches, probabilities))
    assert all(map(torch.equal, before, recording.resid))
    after = [tensor for entry in recording.past.entries for tensor in entry]
    assert all(map(torch.equal, keys, after))
    zeroed = [[with_hook(edit, zero()) for edit in branch] for branch in branches]
    assert torch.allclose(first, recording.run(zeroed, probabilities), atol=1e-6)


def with_hook(edit, hook):
    """The same intervention with another function."""
    return Intervention(edit.site, edit.layers, edit.positions, hook)


def test_restoring_from_another_run_in_one_call_with_others(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    donor = small_inputs(model, seed + 1, images=(0,), words=(inputs.n_pos - 1,))
    _, cache = model.run_with_cache(donor)
    chance = random.Random(seed)
    branches = [
        [Intervention(site, window(site, layer, 3, model), [at], restore(cache))]
        for site in ("z", "pattern", "resid_mid", "result")
        if site != "result" or hook_name("result", 0) in cache
        for layer in range(model.cfg.n_layers)
        for at in (1, inputs.n_pos - 1)
    ]
    assert_equal_to_plain_runs(model, inputs, branches, chance)
