"""`interventions=` of `run_with_hooks`, `run_with_cache`, `generate`; what "generated" means.

The reference is the same run with the hooks that the interventions stand for, or a loop of plain
runs in which the test itself says which positions are new.
"""

from __future__ import annotations

import inspect
import random
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
from small_models import any_family, small_inputs, worded_model

from mmlens import Intervention, hook_name
from mmlens.interventions.functions import add, replace, scale, zero
from mmlens.interventions.intervention import as_positions
from mmlens.model.hooked_root_module import hooks_of
from mmlens.model.run_positions import WHOLE, current_pass


def test_a_run_takes_interventions(seed: int) -> None:
    """They act one after the other, before other hooks, and the cache holds what they made."""
    model, inputs = doubled(seed)
    name, at = hook_name("mlp_out", 1), [inputs.n_pos - 1, 2]
    first = Intervention("mlp_out", [0, 1], at, add(0.7))
    then = Intervention("mlp_out", 1, None, scale(-1.5))
    pairs = [*first.fwd_hooks(), *then.fwd_hooks(), (name, add(0.3))]
    expected = model.run_with_hooks(inputs, fwd_hooks=pairs)
    ours = model.run_with_hooks(inputs, interventions=[first, then], fwd_hooks=[(name, add(0.3))])
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, model(inputs))

    with model.hooks(fwd_hooks=pairs[:-1]):
        expected, kept = model.run_with_cache(inputs, names_filter=name)
    ours, cache = model.run_with_cache(inputs, names_filter=name, interventions=(first, then))
    assert torch.equal(ours, expected)
    assert torch.equal(cache[name], kept[name])
    with model.hooks(interventions=[first, then]):
        assert torch.equal(model(inputs), expected)
    assert all(not point._forward_hooks for point in model.hook_dict.values())


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_what_is_generated_is_every_position_after_the_prompt(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model = any_family(seed, n_layers=chance.randint(2, 3)).double()
    images = chance.choice([(1, 0), (0, 2, 1), (1,)])  # rows of different length: left padding
    inputs = small_inputs(model, seed, images=images)
    assert inputs.pixel_values is not None
    inputs = model.inputs_from_tokens(
        inputs.tokens, inputs.pixel_values.double(), attention_mask=inputs.attention_mask
    )
    places: list[tuple[str, Any, Any]] = []
    while len(places) < 3:
        site, layers = random_site(chance, model)
        if not site.startswith(("vision.", "projector.")):
            places.append((site, layers, random_function(chance, site)))
    parts = [Intervention(site, layers, "generated", edit) for site, layers, edit in places]

    def hooks_at(n: int) -> Hooks:
        new = list(range(inputs.n_pos, n))
        by_hand = [Intervention(site, layers, new, edit) for site, layers, edit in places]
        return [pair for part in by_hand for pair in part.fwd_hooks()]

    expected = grown_plainly(model, inputs, hooks_at)
    for cached in (True, False):
        assert_same(generated(model, inputs, [], cached, interventions=parts), expected)
        hooks = [pair for part in parts for pair in part.fwd_hooks()]
        assert_same(generated(model, inputs, hooks, cached), expected)
    assert current_pass() is WHOLE


@pytest.mark.parametrize("cached", [True, False])
def test_the_first_new_token_is_the_prompts(cached: bool, seed: int) -> None:
    """It is predicted at the prompt's last position, which is none of the generated ones."""
    model, inputs = doubled(seed)
    plain = generated(model, inputs, [], cached)
    nothing = Intervention("resid_post", model.cfg.n_layers - 1, "generated", zero())
    edited = generated(model, inputs, [], cached, interventions=[nothing])
    assert torch.equal(edited[1][:, 0], plain[1][:, 0])
    flat = model.unembed(model.ln_final(torch.zeros_like(model.W_E[:1, None])))[0, 0].float()
    assert torch.allclose(edited[1][:, 1:], flat.expand_as(edited[1][:, 1:]), atol=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_the_cache_in_the_end_and_streams(cached: bool, seed: int) -> None:
    model = worded_model(seed).double()
    inputs = model.prepare(["one word and one more", "one"])
    steer = Intervention("resid_post", 0, "generated", add(torch.randn(model.cfg.d_model)))
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "interventions": [steer]}
    options["use_past_kv_cache"] = cached
    name = hook_name("resid_post", 0)
    tokens, cache = model.generate(
        inputs, N_NEW, return_type="tokens", return_cache=True, names_filter=name, **options
    )
    new = Intervention("resid_post", 0, range(inputs.n_pos, inputs.n_pos + N_NEW), steer.hook)
    text = inputs.append(tokens[:, inputs.n_pos :])
    _, expected = model.run_with_cache(text, names_filter=name, interventions=[new])
    assert torch.equal(cache[name], expected[name])

    pieces = model.generate_stream(
        inputs, N_NEW, return_type="tokens", max_tokens_per_yield=1, **options
    )
    seen = []
    for piece in pieces:  # between the steps the model is as it was
        assert not any(point.fwd_hooks for point in model.hook_dict.values())
        seen.append(piece)
    assert torch.equal(torch.cat(seen, dim=1)[:, -N_NEW:], tokens[:, -N_NEW:])


def test_where_nothing_is_generated(seed: int) -> None:
    model, inputs = doubled(seed, images=(1,))
    steer = Intervention("mlp_out", 0, "generated", zero())
    says = "on mlp_out at positions='generated', but nothing is generated here"
    for run in (model.run_with_hooks, model.run_with_cache):
        with pytest.raises(ValueError, match=says):
            run(inputs, interventions=[steer])
    for plain in (False, True):
        with pytest.raises(ValueError, match=says):
            model.record(inputs).run([[steer]], partial(torch.sum, dim=(1, 2)), plain=plain)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(model(inputs), model.run_with_hooks(inputs, interventions=[]))


@pytest.mark.parametrize("site", ["vision.z", "projector.out", "vision.out"])
def test_no_patches_are_generated(site: str) -> None:
    with pytest.raises(ValueError, match=r"positions='generated' are tokens; the positions of"):
        Intervention(site, 0 if site == "vision.z" else None, "generated", zero())


def test_what_is_no_intervention() -> None:
    one = Intervention("mlp_out", 0, 1, replace(0.4))
    pair = (hook_name("mlp_out", 0), zero())
    unchecked = inspect.unwrap(hooks_of)  # what runs where no test checks the signature
    with pytest.raises(TypeError, match=r"a list of mmlens.Intervention, not Intervention alone"):
        unchecked(one)
    with pytest.raises(TypeError, match=r"not tuple; pairs of a hook name and a function go to"):
        unchecked([one, pair])
    with pytest.raises(ValueError, match=r"positions='image'; .* inputs.span\('image'\)"):
        as_positions("image")
