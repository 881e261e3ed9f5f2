"""Sinks are planted and found; what they receive and what cutting them does is by formula."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from small_models import any_attention, small_inputs, small_model
from torch import Tensor

from mmlens import AttentionSinks, attention_sinks


def with_sinks(seed: int) -> tuple[Any, Any, list[int]]:
    """A model whose heads all attend to two words and a patch, whose values are short.

    The residual stream is not touched, so which positions these are is said by hooks that stay.
    """
    model = small_model(seed, n_layers=3, n_heads=2, n_key_value_heads=2).double()
    inputs = small_inputs(model, seed, words=(7,))
    inputs = model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double())
    words = (~inputs.is_image[0]).nonzero().flatten().tolist()[:-2]
    sinks = sorted([random.choice(words[1:]), 0, random.choice(inputs.span("image").tolist())])

    def attend(scores: Tensor, hook: Any) -> Tensor:
        scores[..., sinks] += 12.0
        return scores

    def shorten(v: Tensor, hook: Any) -> Tensor:
        v[:, sinks] *= 1e-3
        return v

    for layer in range(3):
        model.add_hook(f"blocks.{layer}.attn.hook_attn_scores", attend)
        model.add_hook(f"blocks.{layer}.attn.hook_v", shorten)
    return model, inputs, sinks


def test_planted_sinks(seed: int, tmp_path: Any) -> None:
    model, inputs, sinks = with_sinks(seed)
    found = attention_sinks(model, inputs, factor=1.2, answer=5, draws=2)
    assert set(found.sinks) <= set(sinks)
    assert 0 in found.sinks  # every position attends to the first one
    assert set(found.visual) == {at for at in found.sinks if inputs.is_image[0, at]}
    _, cache = model.run_with_cache(inputs)
    n = inputs.n_pos
    for layer in range(3):
        pattern = cache["pattern", layer][0].mean(dim=0)
        for at in range(n - 1):
            expected = float(pattern[at + 1 :, at].mean())
            assert float(found.received[layer, at]) == pytest.approx(expected, abs=1e-6)
        assert bool(found.received[layer, -1].isnan())
        norms = cache["v", layer][0].norm(dim=-1).mean(dim=-1)
        assert torch.allclose(found.value_norms[layer], norms, atol=1e-9)
        stream = cache["resid_pre", layer][0]
        massive = stream.abs().amax(-1) / stream.pow(2).mean(-1).sqrt()
        assert torch.allclose(found.massive[layer], massive, atol=1e-9)
    largest = {
        int(cache["resid_pre", i][0, at].abs().argmax()) for i in range(3) for at in found.sinks
    }
    assert set(found.dimensions) == largest

    def cut(scores: Tensor, hook: Any) -> Tensor:
        for query in range(min(found.sinks) + 1, n):
            if query not in found.sinks:
                scores[:, :, query, list(found.sinks)] = -torch.inf
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in range(3)]
    with model.hooks(fwd_hooks=hooks, reset_hooks_end=True):
        expected = float(model(inputs)[0, -1].softmax(-1)[5])
    assert float(found.values[2]) == pytest.approx(expected, abs=1e-7)
    assert found.control.shape == (3, 2)
    saved = AttentionSinks.load(found.save(tmp_path / "sinks.safetensors"))
    assert saved.sinks == found.sinks
    assert len(found.plot().data) == 2
    table = found.to_dataframe()
    assert table["sink"].sum() == len(found.sinks)
    with pytest.raises(ValueError, match="share=0"):
        attention_sinks(model, inputs, share=0.0)


def test_attention_that_rounds_to_zero_is_a_mean_of_zeros(seed: int) -> None:
    """A query that may attend counts, also where a sharp softmax leaves nothing."""
    model = small_model(seed, n_layers=2)
    inputs = small_inputs(model, seed, words=(9,))
    n = inputs.n_pos

    def sharp(scores: Tensor, hook: Any) -> Tensor:
        scores[:, :, 2::2, 1] -= 300.0  # exp(-300) is 0 in float32
        return scores

    for layer in range(2):
        model.add_hook(f"blocks.{layer}.attn.hook_attn_scores", sharp)
    found = attention_sinks(model, inputs, answer=5, draws=0)
    _, cache = model.run_with_cache(inputs)
    for layer in range(2):
        given = cache["pattern", layer][0].double().mean(dim=0)[2:, 1]
        assert not given[::2].any()
        assert float(found.received[layer, 1]) == pytest.approx(float(given.sum()) / (n - 2))


def test_padding_is_no_position(seed: int) -> None:
    """A row out of a batch has the sinks, and the controls, of the same prompt alone."""
    model = any_attention(seed, n_layers=3).double()
    batch = small_inputs(model, seed, images=(1, 0), words=(5, 30))
    padded = batch.with_pixels(batch.pixel_values.double()).rows([0])
    n = int((~padded.attention_mask).sum())
    assert n > 10
    alone = model.inputs_from_tokens(padded.tokens[:, n:], padded.pixel_values)
    options: Any = {"factor": 0.8, "share": 0.3, "draws": 3, "answer": 5, "seed": seed}
    one, other = (attention_sinks(model, inputs, **options) for inputs in (alone, padded))
    assert one.sinks
    assert other.sinks == tuple(at + n for at in one.sinks)
    assert other.received[:, :n].isnan().all()
    for name in ("received", "value_norms", "massive"):
        expected, found = getattr(one, name), getattr(other, name)[:, n:]
        assert torch.allclose(found, expected, atol=1e-9, equal_nan=True)
    assert torch.allclose(other.values, one.values, atol=1e-9, equal_nan=True)
    assert torch.allclose(other.control, one.control, atol=1e-9, equal_nan=True)
