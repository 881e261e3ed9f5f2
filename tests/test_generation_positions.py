"""Interventions while a text grows act at positions of the whole text, with and without the cache.

The reference is a loop of plain runs on everything so far, in which the test itself leaves out the
positions that do not exist yet. Runs are in float64, so that no tie is decided by rounding.
"""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import Any

import pytest
import torch
from growing_texts import (
    N_NEW,
    Hooks,
    assert_same,
    doubled,
    generated,
    grown_plainly,
    random_function,
    random_site,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import any_attention, language_model, small_inputs
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from mmlens import Intervention, KeyValueCache, hook_name, noise_span
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import add, knockout, noise, restore, zero
from mmlens.model.run_positions import WHOLE, computing, current_pass


def n_positions(model: Any, inputs: MultimodalInputs, site: str) -> int:
    """Of the tower its own; of a text those that it will have."""
    if not site.startswith(("vision.", "projector.")):
        return inputs.n_pos + N_NEW - 1
    rows, columns = model.cfg.vision.grid
    return rows * columns  # whether or not there is a class token besides


def limited(parts: list[Any], n: int) -> Hooks:
    """The hooks of the interventions at those of their positions that n positions have."""
    hooks: Hooks = []
    for part in parts:
        if isinstance(part, tuple):
            hooks.append(part)
            continue
        positions = part.positions
        if positions is not None and not part.site.startswith(("vision.", "projector.")):
            positions = positions[positions < n]
        hook = part.hook
        if getattr(hook, "func", None) is cut:
            hook = partial(cut, keys=[key for key in hook.keywords["keys"] if key < n])
        units = "" if part.units is None else f"[{','.join(map(str, part.units))}]"
        hooks += Intervention(part.site + units, part.layers, positions, hook).fwd_hooks()
    return hooks


def cut(activation: Tensor, hook: Any, keys: list[int]) -> Tensor:
    """As `knockout`, so that the reference can leave keys out."""
    return knockout(torch.tensor(keys))(activation, hook=hook)


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_any_interventions_with_and_without_the_cache(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model = any_attention(seed, n_layers=chance.randint(2, 3)).double()
    images = chance.choice([(1, 0), (0, 2, 1), (1,)])
    inputs = small_inputs(model, seed, images=images)  # rows of different length: left padding
    assert inputs.pixel_values is not None
    inputs = model.inputs_from_tokens(
        inputs.tokens, inputs.pixel_values.double(), attention_mask=inputs.attention_mask
    )
    parts: list[Any] = []
    for _ in range(chance.randint(1, 4)):
        site, layers = random_site(chance, model)
        n = n_positions(model, inputs, site)
        positions = None if chance.random() < 0.2 else chance.sample(range(n), chance.randint(1, n))
        function: Any = random_function(chance, site)
        if site in ("attn_scores", "pattern") and chance.random() < 0.6:
            function = partial(cut, keys=chance.sample(range(n), chance.randint(1, n)))
        part = Intervention(site, layers, positions, function)
        bare = positions is None and part.units is None and not isinstance(function, partial)
        parts += [(name, function) for name in part.hook_names()] if bare else [part]
    hooks: Hooks = []
    for part in parts:
        hooks += part.fwd_hooks() if isinstance(part, Intervention) else [part]
    expected = grown_plainly(model, inputs, partial(limited, parts))
    for cached in (True, False):
        assert_same(generated(model, inputs, hooks, cached), expected)
    assert current_pass() is WHOLE


def test_noise_is_the_same_in_every_step(seed: int) -> None:
    """That of `noise_span` at the prompt's positions, that of `noise` at all, also at new ones."""
    model, inputs = doubled(seed, images=(1,))
    noisy = noise_span(model, inputs, ["image", "last"], samples=2, seed=seed)
    assert noisy.noise is not None
    drawn = noisy.noise
    site = random.choice(["mlp_out", "v", "attn_scores", "resid_post"])
    hooks: Hooks = [(hook_name(site, random.randrange(model.cfg.n_layers)), noise(0.6, seed=seed))]

    def hooks_at(n: int) -> Hooks:
        here = pad(drawn, (0, 0, 0, n - inputs.n_pos))
        return [("hook_input_embed", add(here)), *hooks]

    expected = grown_plainly(model, inputs.repeat(2), hooks_at)
    for cached in (True, False):
        assert_same(generated(model, noisy, hooks, cached), expected)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("site", ["mlp_out", "v", "z", "pattern", "attn_scores"])
def test_restoring_a_prompts_activations(site: str, cached: bool, seed: int) -> None:
    """Of a run on the prompt, whose queries know nothing of the keys that come later."""
    model, inputs = doubled(seed)
    donor, _ = inputs.tokens.clone(), None
    donor[:, -1] = torch.where(donor[:, -1] == 7, 8, 7)
    swapped = model.inputs_from_tokens(
        donor, inputs.pixel_values, attention_mask=inputs.attention_mask
    )
    _, cache = model.run_with_cache(swapped, names_filter=hook_name(site, 1))
    name, at = hook_name(site, 1), [inputs.n_pos - 1, inputs.n_pos - 3]
    axis = 2 if site in ("pattern", "attn_scores") else 1
    nothing = -torch.inf if site == "attn_scores" else 0.0

    def by_hand(activation: Tensor, hook: Any) -> Tensor:
        source = cache[name]
        if axis == 2:
            source = pad(source, (0, activation.shape[-1] - source.shape[-1]), value=nothing)
        index = torch.tensor(at)
        return activation.index_copy(axis, index, source.index_select(axis, index))

    expected = grown_plainly(model, inputs, lambda n: [(name, by_hand)])
    hooks = Intervention(site, 1, at, restore(cache)).fwd_hooks()
    assert_same(generated(model, inputs, hooks, cached), expected)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("site", ["mlp_out", "pattern"])
def test_restoring_a_whole_text(site: str, cached: bool, seed: int) -> None:
    """Activations of a text and its continuation, put back as it grows, give the continuation."""
    model, inputs = doubled(seed)
    plain = generated(model, inputs, [], cached)
    names = [hook_name(site, layer) for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(inputs.append(plain[0]), names_filter=names)
    hooks = [(name, restore(cache)) for name in names]
    assert_same(generated(model, inputs, hooks, cached), plain)
    _, short = model.run_with_cache(inputs, names_filter=names)
    with pytest.raises(ValueError, match="cannot restore"):  # the new positions are not in it
        generated(model, inputs, [(name, restore(short)) for name in names], cached)


@pytest.mark.parametrize("cached", [True, False])
def test_what_a_function_is_told(cached: bool, seed: int) -> None:
    model, inputs = doubled(seed)
    n = inputs.n_pos
    whole: list[list[int]] = []
    some: list[list[int]] = []
    bound: list[str] = []

    def watch(activation: Tensor, hook: Any, positions: Tensor | None = None) -> None:
        assert positions is not None
        assert len(positions) == activation.shape[1]
        whole.append(positions.tolist())

    def watch_some(activation: Tensor, hook: Any, positions: Tensor) -> None:
        assert len(positions) == activation.shape[1]
        some.append(positions.tolist())

    def keeps_its_own(activation: Tensor, hook: Any, positions: str = "mine") -> None:
        bound.append(positions)

    name = hook_name("mlp_out", 0)
    part = Intervention("resid_post", 0, [n + 1, 0, n - 1], watch_some)
    hooks = [(name, watch), (name, keeps_its_own), *part.fwd_hooks()]
    generated(model, inputs, hooks, cached)
    if cached:  # position 0 is seen once
        assert whole == [[*range(n)], [n], [n + 1], [n + 2]]
        assert some == [[0, n - 1], [n + 1]]
    else:
        assert whole == [[*range(n)], [*range(n + 1)], [*range(n + 2)], [*range(n + 3)]]
        assert some == [[0, n - 1], [0, n - 1], [n + 1, 0, n - 1], [n + 1, 0, n - 1]]
    assert set(bound) == {"mine"}


def told_in_a_plain_run(model: Any, inputs: MultimodalInputs, hook: Any) -> None:
    model.run_with_hooks(inputs, fwd_hooks=[(hook_name("mlp_out", 0), hook)])


def test_a_plain_run_is_the_whole_text(seed: int) -> None:
    model, inputs = doubled(seed)
    told: list[Any] = []

    def watch(activation: Tensor, hook: Any, positions: Any) -> None:
        told.append(positions)

    told_in_a_plain_run(model, inputs, watch)
    told_in_a_plain_run(model, inputs, partial(watch, positions="bound"))
    assert told == [None, "bound"]


@pytest.mark.parametrize("way", ["hooks", "add_hook", "permanent", "hook point", "run_with_hooks"])
def test_steps_with_a_cache_of_ones_own(way: str, seed: int) -> None:
    """A prompt, then two tokens, then one; the edit is at one of the two and at the one."""
    model, inputs = doubled(seed)
    more = torch.randint(2, 60, (2, 3))
    n = inputs.n_pos
    name = hook_name("resid_post", 0)
    part = Intervention("resid_post", 0, [0, n + 1, n + 2], noise(1.0, seed=3))
    expected = model.run_with_hooks(inputs.append(more), fwd_hooks=part.fwd_hooks())
    cache = KeyValueCache(model.cfg.n_layers)
    options: dict[str, Any] = {"past_kv_cache": cache}
    run: Any = model
    if way == "add_hook":
        model.add_hook(name, part.edit)
    elif way == "permanent":
        model.add_perma_hook(name, part.edit)
    elif way == "hook point":
        model.hook_dict[name].add_hook(part.edit)
    elif way == "run_with_hooks":
        run = partial(model.run_with_hooks, fwd_hooks=part.fwd_hooks())
    with model.hooks(fwd_hooks=part.fwd_hooks() if way == "hooks" else []):
        steps = [run(each, **options) for each in (inputs, more[:, :2], more[:, 2:])]
    together = torch.cat(steps, dim=1)
    real = pad(inputs.attention_mask, (0, 3), value=True)
    assert float((together - expected)[real].abs().max()) < 1e-9 * float(expected.abs().max())
    assert current_pass() is WHOLE


def test_a_frozen_past_is_over(seed: int) -> None:
    """After it come the positions of this run, and no others."""
    model, inputs = doubled(seed, images=(0,))
    cache = KeyValueCache(model.cfg.n_layers)
    model(inputs, past_kv_cache=cache)
    more, n = torch.tensor([[5, 6]]), inputs.n_pos
    edits = [Intervention("mlp_out", 0, at, add(2.0)) for at in ([1], [n + 1], [n + 2])]
    past = cache.prefix(n)
    plain = model(more, past_kv_cache=past)
    before, here = (
        model.run_with_hooks(more, past_kv_cache=past, fwd_hooks=edit.fwd_hooks())
        for edit in edits[:2]
    )
    assert torch.equal(before, plain)
    assert torch.equal(here[:, 0], plain[:, 0]) and not torch.equal(here[:, 1], plain[:, 1])
    with pytest.raises(IndexError, match=f"there is no {n + 2}"):
        model.run_with_hooks(more, past_kv_cache=past, fwd_hooks=edits[2].fwd_hooks())


@pytest.mark.parametrize("cached", [True, False])
def test_positions_that_never_come(cached: bool, seed: int) -> None:
    model, inputs = doubled(seed)
    beyond = inputs.n_pos + N_NEW
    for part in (
        Intervention("mlp_out", 0, [0, beyond], zero()),
        Intervention("pattern", 0, None, knockout([beyond])),
        Intervention("vision.mlp_out", 0, [99], zero()),
    ):
        with pytest.raises((IndexError, ValueError), match=f"{beyond}|99"):
            generated(model, inputs, part.fwd_hooks(), cached)
        assert current_pass() is WHOLE
    late = Intervention("mlp_out", 0, [inputs.n_pos], zero())
    with pytest.raises(IndexError, match=f"there is no {inputs.n_pos}"):  # no more than this run
        model.run_with_hooks(inputs, fwd_hooks=late.fwd_hooks())


def test_every_thread_has_its_own_positions() -> None:
    inside, outside = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with computing(first=7):
            inside.set()
            outside.wait(10)
            seen.append(current_pass().first)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert current_pass() is WHOLE
    outside.set()
    thread.join()
    assert seen == [7]


def test_embeddings_are_continued_with_interventions(seed: int) -> None:
    model, inputs = doubled(seed)
    part = Intervention("resid_post", 0, [1, inputs.n_pos + 1], add(1.5))
    expected = generated(model, inputs, part.fwd_hooks(), True)
    embeds = model.input_embeddings(inputs)
    for cached in (True, False):
        with model.hooks(fwd_hooks=part.fwd_hooks()):
            tokens = model.generate(
                embeds,
                N_NEW,
                attention_mask=inputs.attention_mask,
                return_type="tokens",
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=cached,
            )
        assert torch.equal(tokens, expected[0])


@pytest.mark.parametrize("cached", [True, False])
def test_gradients_through_what_a_hook_kept(cached: bool, seed: int) -> None:
    model, inputs = doubled(seed)
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        kept.append(activation)

    tokens = generated(model, inputs, [(hook_name("resid_post", 0), keep)], cached)[0]
    assert not any(each.is_inference() or each.requires_grad for each in (*kept, tokens))
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64, requires_grad=True)
    (torch.cat(kept, dim=1) @ direction).sum().backward()
    assert torch.allclose(direction.grad, torch.cat(kept, dim=1).sum((0, 1)))


def test_gradients_through_what_verification_kept(seed: int) -> None:
    model, inputs = doubled(seed)
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        kept.append(activation)

    with model.hooks(fwd_hooks=[(hook_name("mlp_out", 0), keep)]):
        assert model.verify_hooks(inputs) == []
    assert kept and not any(each.is_inference() for each in kept)


# Caches of others


def test_another_librarys_cache_is_refused(seed: int) -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model = language_model(seed)
    model.cfg.n_ctx = 64
    tokens = torch.tensor([[5, 6, 7]])
    others = {
        "transformers.DynamicCache": DynamicCache(),
        "transformer_lens.TransformerLensKeyValueCache": TransformerLensKeyValueCache(
            [], torch.ones(1, 0)
        ),
        "builtins.tuple": ((torch.zeros(1), torch.zeros(1)),),
    }
    for name, cache in others.items():
        with pytest.raises(TypeError, match=rf"{name}.*KeyValueCache\(model.cfg.n_layers\)"):
            model(tokens, past_kv_cache=cache)
    n = model.cfg.n_layers
    with pytest.raises(ValueError, match=f"has {n + 1} layers, and this model {n}"):
        model(tokens, past_kv_cache=KeyValueCache(n + 1))
