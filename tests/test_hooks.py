"""What the generic hook functions do, against formulas; alone and inside an `Intervention`."""

from __future__ import annotations

import math
import random

import pytest
import torch
from small_models import plain_run, small_inputs, small_model

from mmlens import Intervention, hook_name
from mmlens.interventions.functions import (
    add,
    clamp,
    knockout,
    noise,
    replace,
    restore,
    scale,
    zero,
)
from mmlens.model.hook_points import HookPoint

NAME = hook_name("mlp_out", 1)


@pytest.fixture
def model(seed):
    return small_model(seed)


@pytest.fixture
def inputs(model, seed):
    return small_inputs(model, seed, images=(1, 0))


def edited(model, inputs, hook, name=NAME, positions=None):
    """The activation `name` before and after `hook`."""
    _, before = model.run_with_cache(inputs, names_filter=name)

    def act(activation, hook):
        edit = Intervention("mlp_out", 0, positions, act.hook)
        return edit.edit(activation, hook)

    act.hook = hook
    with model.hooks(fwd_hooks=[(name, hook if positions is None else act)]):
        _, after = model.run_with_cache(inputs, names_filter=name)
    return before[name], after[name]


def test_replace_add_scale_zero(model, inputs):
    vector = torch.randn(model.cfg.d_model)
    for hook, expected in [
        (replace(2.5), lambda x: torch.full_like(x, 2.5)),
        (replace(vector), lambda x: vector.expand_as(x)),
        (add(1.5), lambda x: x + 1.5),
        (add(vector), lambda x: x + vector),
        (scale(-3.0), lambda x: -3.0 * x),
        (zero(), torch.zeros_like),
    ]:
        before, after = edited(model, inputs, hook)
        assert torch.equal(after, expected(before))
        before, after = edited(model, inputs, hook, positions=[4, 1])
        assert torch.equal(after[:, [4, 1]], expected(before[:, [4, 1]]))
        others = [p for p in range(inputs.n_pos) if p not in (1, 4)]
        assert torch.equal(after[:, others], before[:, others])


def test_clamp_is_the_formula(model, inputs):
    for low, high in [(-0.3, 0.2), (0.0, math.inf), (-math.inf, 0.1), (0.5, 0.5)]:
        before, after = edited(model, inputs, clamp(low, high))
        assert torch.equal(
            after, torch.where(before < low, low, before.where(before <= high, high))
        )
        assert int((after != before).sum()) > 0
        before, after = edited(model, inputs, clamp(low, high), positions=[4, 1])
        assert torch.equal(after[:, [1, 4]], before[:, [1, 4]].clip(low, high))
        others = [p for p in range(inputs.n_pos) if p not in (1, 4)]
        assert torch.equal(after[:, others], before[:, others])


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.1), (math.nan, 1.0), (0.0, math.nan)])
def test_clamp_refuses_a_range_without_numbers(low, high):
    with pytest.raises(ValueError, match="low must be at most high"):
        clamp(low, high)


def test_values_of_other_types_are_converted(model, inputs):
    before, after = edited(model, inputs, add(torch.ones(model.cfg.d_model, dtype=torch.float64)))
    assert after.dtype == before.dtype
    assert torch.equal(after, before + 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_have_the_digits_of_the_activation(dtype, seed):
    """0.3 in float32 is another number than in float64, and torch's own sums know that."""
    x, point = torch.randn(3, 5, dtype=dtype), HookPoint()
    for value in (0.3, 1 / 3, random.uniform(-5, 5)):
        assert torch.equal(add(value)(x, hook=point), x + value)
        assert torch.equal(replace(value)(x, hook=point), torch.full_like(x, value))


def test_restore(model, inputs, seed):
    donor = small_inputs(model, seed + 1, images=(0,), words=(inputs.n_pos - 1,))
    _, cache = model.run_with_cache(donor)
    for store in (cache, dict(cache.items())):
        before, after = edited(model, inputs, restore(store))
        assert torch.equal(after, cache[NAME].expand_as(before))  # one row serves all
        before, after = edited(model, inputs, restore(store), positions=[5, 2])
        assert torch.equal(after[:, [5, 2]], cache[NAME][:, [5, 2]].expand(2, -1, -1))
        assert torch.equal(after[:, :2], before[:, :2])


def test_restoring_a_runs_own_activations_changes_nothing(model, inputs):
    plain, cache = model.run_with_cache(inputs)
    for site in ("resid_post", "z", "pattern", "attn_scores", "v"):
        name = hook_name(site, 1)
        for positions in (None, [3, 1]):
            branch = [Intervention(site, 1, positions, restore(cache))]
            assert torch.allclose(plain_run(model, inputs, branch), plain, atol=2e-5), name


def test_restore_refuses_what_does_not_fit(model, inputs):
    _, other = model.run_with_cache(inputs, names_filter=hook_name("mlp_out", 0))
    with pytest.raises(KeyError, match="hook_mlp_out"):
        edited(model, inputs, restore(other))
    alone = small_inputs(model, 3, images=(0,), words=(inputs.n_pos - 2,))
    _, shorter = model.run_with_cache(alone)
    with pytest.raises(ValueError, match="same positions"):
        edited(model, inputs, restore(shorter))
    one = small_inputs(model, 3, images=(0,), words=(inputs.n_pos - 1,))
    _, bare = model.run_with_cache(one, remove_batch_dim=True)
    for positions in (None, [1]):
        with pytest.raises(ValueError, match="batch dimension"):
            edited(model, inputs, restore(bare), positions=positions)


def test_noise_has_its_size_and_repeats(model, inputs):
    before, after = edited(model, inputs, noise(0.5, seed=3))
    _, again = edited(model, inputs, noise(0.5, seed=3))
    _, other = edited(model, inputs, noise(0.5, seed=4))
    assert torch.equal(after, again)
    assert not torch.equal(after, other)
    drawn = (after - before) / 0.5
    n = drawn.numel()
    assert abs(drawn.mean()) < 6 / n**0.5
    assert abs(drawn.std() - 1) < 6 / (2 * n) ** 0.5
    # no two positions or layers share it
    assert len({tuple(row) for row in drawn[0].round(decimals=4).tolist()}) == inputs.n_pos
    first, second = edited(model, inputs, noise(0.5, seed=3), name=hook_name("mlp_out", 0))
    assert not torch.allclose((second - first) / 0.5, drawn, atol=1e-3)


@pytest.mark.parametrize("site", ["mlp_out", "z", "pattern"])
def test_noise_of_a_position_does_not_depend_on_the_others(model, inputs, site):
    name = hook_name(site, 1)
    _, whole = edited(model, inputs, noise(0.7, seed=1), name=name)
    chosen = [4, 0, 2]
    for positions in (chosen, chosen[:1], []):
        before, part = edited(model, inputs, noise(0.7, seed=1), name=name, positions=positions)
        axis = 2 if site == "pattern" else 1
        expected = before.clone().movedim(axis, 0)
        expected[positions] = whole.movedim(axis, 0)[positions]
        assert torch.equal(part, expected.movedim(0, axis))


def by_formula(model, cache, layer, blocked, *, before_softmax):
    """z [batch, pos, head, d_head] where queries (of all positions) may not look at `blocked`."""
    q, k, v = (cache[hook_name(site, layer)] for site in ("rot_q", "rot_k", "v"))
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd, bkhd -> bhqk", q, k) / model.cfg.d_head**0.5
    n_pos = scores.shape[-1]
    future = torch.ones(n_pos, n_pos).triu(1).bool()
    blocked = torch.zeros(n_pos, n_pos).index_fill(1, blocked, 1).bool()
    if before_softmax:
        pattern = scores.masked_fill(future | blocked, -torch.inf).softmax(-1).nan_to_num()
    else:
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1).masked_fill(blocked, 0.0)
    return torch.einsum("bhqk, bkhd -> bqhd", pattern, v)


@pytest.mark.parametrize("site", ["attn_scores", "pattern"])
def test_knockout_is_the_formula(model, seed, site):
    inputs = small_inputs(model, seed)
    sources = torch.tensor(random.sample(range(inputs.n_pos), random.randint(1, inputs.n_pos - 1)))
    layer = random.randrange(model.cfg.n_layers)
    queries = sorted(random.sample(range(inputs.n_pos), 3))
    z = hook_name("z", layer)
    names = [hook_name(each, layer) for each in ("rot_q", "rot_k", "v", "z")]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    cut = Intervention(site, layer, queries, knockout(sources))
    with model.hooks(fwd_hooks=cut.fwd_hooks()):
        _, after = model.run_with_cache(inputs, names_filter=[z])
    expected = by_formula(model, cache, layer, sources, before_softmax=site == "attn_scores")
    assert torch.allclose(after[z][:, queries], expected[:, queries], atol=1e-5)
    others = [p for p in range(inputs.n_pos) if p not in queries]
    assert torch.allclose(after[z][:, others], cache[z][:, others], atol=1e-5)


@pytest.mark.parametrize("site", ["attn_scores", "pattern"])
def test_knocking_out_everything_leaves_no_attention(model, inputs, site):
    at = [3, inputs.n_pos - 1]
    cut = Intervention(site, range(model.cfg.n_layers), at, knockout(range(inputs.n_pos)))
    names = [hook_name(each, 1) for each in ("pattern", "z", "attn_out")]
    with model.hooks(fwd_hooks=cut.fwd_hooks()):
        logits, cache = model.run_with_cache(inputs, names_filter=names)
    assert logits.isfinite().all()
    assert cache["pattern", 1][:, :, at].eq(0).all()
    assert cache["z", 1][:, at].eq(0).all()
    bias = model.blocks[1].attn.b_O
    assert torch.equal(cache["attn_out", 1][:, at], bias.expand(2, 2, -1))


def test_knockout_refuses_what_it_cannot_do(model, inputs):
    with pytest.raises(ValueError, match="attn_scores and pattern"):
        edited(model, inputs, knockout([1]))
    for keys in (-1, [2, inputs.n_pos]):
        with pytest.raises(ValueError, match="not among 0"):
            edited(model, inputs, knockout(keys), name=hook_name("pattern", 0))


@pytest.mark.parametrize(
    "hook", [zero(), scale(-2.0), scale(0.0), add(3.0), noise(1.0), clamp(-0.5, 1.0)]
)
def test_masked_scores_stay_masked(model, inputs, hook):
    for positions in (None, [2, 5]):
        name = hook_name("attn_scores", 1)
        before, after = edited(model, inputs, hook, name=name, positions=positions)
        assert torch.equal(before.isneginf(), after.isneginf())
        assert not after.isnan().any()
        branch = [Intervention("attn_scores", 1, positions, hook)]
        logits = plain_run(model, inputs, branch)
        assert logits.isfinite().all()
    zeroed = [Intervention("attn_scores", 1, None, zero())]
    with model.hooks(fwd_hooks=[pair for edit in zeroed for pair in edit.fwd_hooks()]):
        _, cache = model.run_with_cache(inputs, names_filter=hook_name("pattern", 1))
    row = cache["pattern", 1][0, 0, -1]  # evenly over the real positions
    real = inputs.attention_mask[0]
    assert torch.allclose(row[real], torch.full_like(row[real], 1 / int(real.sum())))
    assert row[~real].eq(0).all()


def test_no_hook_is_left_behind(model, inputs):
    plain = model(inputs)

    def fail(activation, hook):
        raise RuntimeError("in the hook")

    broken = Intervention("z", range(model.cfg.n_layers), 1, fail)
    for run in (
        lambda: plain_run(model, inputs, [broken]),
        lambda: model.record(inputs).run([[broken]], readout=lambda logits: logits),
    ):
        with pytest.raises(RuntimeError, match="in the hook"):
            run()
        assert not any(module._forward_hooks for module in model.modules())
        assert torch.equal(model(inputs), plain)


def test_gradients_that_are_off_are_told(seed: int) -> None:
    """As notebooks switch them off at their top; torch would speak of element 0 of tensors."""
    model = small_model(seed).requires_grad_()
    inputs = small_inputs(model, seed)
    with torch.no_grad(), pytest.raises(ValueError, match="gradients, and they are off"):
        model.run_with_cache(inputs, return_type="loss", incl_bwd=True)
    assert torch.is_grad_enabled() and model.context_level == 0
    _, cache = model.run_with_cache(inputs, return_type="loss", incl_bwd=True)
    assert "blocks.0.hook_resid_post_grad" in cache
