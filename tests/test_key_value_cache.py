"""`KeyValueCache`: what a failed or partial pass leaves in it, and prefixes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small_inputs, small_model
from torch import Tensor

from mmlens.interventions.intervention import hook_name
from mmlens.model.components import KeyValueCache


def padded(seed: int) -> tuple[Any, Any, Tensor]:
    """A model of three layers in float64, two prompts of which one is padded, and what follows."""
    model = small_model(seed, n_layers=3).double()
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(2, 60, (2, 3), generator=generator)
    return model, small_inputs(model, seed, images=(1, 0), words=(6, 5)), more


def test_layers_of_unequal_length_are_refused(seed: int) -> None:
    model, inputs, more = padded(seed)
    cache, n = KeyValueCache(3), inputs.n_pos
    resid = model(inputs, stop_at_layer=1, past_kv_cache=cache)
    for layers in ({}, {"stop_at_layer": 2}, {"stop_at_layer": -1}):
        with pytest.raises(ValueError, match=rf"holds \[{n}, 0, 0\] positions"):
            model(more, past_kv_cache=cache, **layers)
    with pytest.raises(ValueError, match=rf"layers 1 ... 2 are to run after {n}"):
        model(resid, start_at_layer=1, past_kv_cache=cache)
    # The layer that was run goes on, as it would have without a cache.
    grown = model(more, stop_at_layer=1, past_kv_cache=cache)
    whole = model(inputs.append(more), stop_at_layer=1)
    assert float((grown - whole[:, n:]).abs().max()) < 1e-9 * float(whole.abs().max())


@pytest.mark.parametrize("where", ["resid_post", "ln_final", "input_embed"])
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_a_pass_that_fails_adds_nothing(filled: bool, where: str, seed: int) -> None:
    """The retry equals a run without a cache."""
    model, inputs, more = padded(seed)
    cache = KeyValueCache(3)
    prompt = more if filled else inputs
    if filled:
        model(inputs, past_kv_cache=cache)
    held, mask = len(cache), cache.key_mask

    def fail(activation: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    names = {"resid_post": hook_name("resid_post", 1), "ln_final": "ln_final.hook_normalized"}
    with pytest.raises(KeyboardInterrupt):
        model.run_with_hooks(
            prompt,
            past_kv_cache=cache,
            fwd_hooks=[(names.get(where, "hook_input_embed"), fail)],
        )
    assert len(cache) == held and cache.key_mask is mask
    retried = model(prompt, past_kv_cache=cache)
    whole = model(inputs.append(more) if filled else inputs)[:, held:]
    real = inputs.attention_mask if not filled else torch.ones_like(more, dtype=torch.bool)
    assert float((retried - whole)[real].abs().max()) < 1e-9 * float(whole.abs().max())


def test_a_pass_without_layers_adds_nothing(seed: int) -> None:
    model, inputs, _ = padded(seed)
    cache = KeyValueCache(3)
    model(inputs, stop_at_layer=0, past_kv_cache=cache)
    assert len(cache) == 0 and cache.key_mask is None
    again, plain = model(inputs, past_kv_cache=cache), model(inputs)
    assert torch.equal(again[inputs.attention_mask], plain[inputs.attention_mask])


def test_a_prefix_of_fewer_than_no_positions_is_refused(seed: int) -> None:
    model, inputs, _ = padded(seed)
    cache = KeyValueCache(3)
    model(inputs, past_kv_cache=cache)
    with pytest.raises(ValueError, match=f"prefix of -2 .* 0 ... {inputs.n_pos}"):
        cache.prefix(-2)


def test_an_empty_prefix_is_no_past(seed: int) -> None:
    """It serves any number of rows, although the cache has two."""
    model, inputs, _ = padded(seed)
    cache = KeyValueCache(3)
    model(inputs, past_kv_cache=cache)
    tokens = torch.tensor([[5, 6], [7, 8], [9, 10]])
    assert torch.equal(model(tokens, past_kv_cache=cache.prefix(0)), model(tokens))
