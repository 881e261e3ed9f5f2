"""Generation: greedy equals transformers' `generate`; sampling draws from the right distribution.

Greedy runs are compared in float64: there a tie between two tokens, which rounding would decide
differently here and there, does not happen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import (
    DECODERS,
    EOS,
    IMAGE,
    SHAPES,
    VOCABULARY,
    Prompts,
    hooked,
    random_language_model,
    random_llava,
    random_prompts,
)
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mmlens.generation import choose_next

NEW = 32
MULTIMODAL = ["mistral, window", "qwen2, some windows", "siglip", "phi on siglip"]


def in_double(prompts: Prompts) -> Prompts:
    pixels = prompts.pixel_values
    return Prompts(
        prompts.tokens, prompts.attention_mask, None if pixels is None else pixels.double()
    )


def hf_generate(hf: Any, prompts: Prompts, n: int, ends: int | None = None) -> Tensor:
    """Transformers' greedy continuation, alone; it never says `<image>`, and ends at `ends`.

    To a language model alone that token is one like the others.
    """
    given = prompts.for_hf()
    del given["position_ids"]
    tokens = hf.generate(
        **given,
        max_new_tokens=n,
        do_sample=False,
        suppress_tokens=[IMAGE] if hasattr(hf.config, "vision_config") else None,
        eos_token_id=-1 if ends is None else ends,
    )
    return tokens[:, prompts.tokens.shape[1] :]


@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("name", ["grouped queries", *MULTIMODAL])
def test_greedy_equals_hugging_face(
    name: str, images: list[int], seed: int, tmp_path: Path
) -> None:
    hf = random_llava(SHAPES[name]).double()
    model = hooked(hf, tmp_path)
    assert model.cfg.dtype == torch.float64
    prompts = in_double(random_prompts(hf.config, images))
    expected = hf_generate(hf, prompts, NEW)
    inputs = prompts.for_mmlens(model)
    options: dict[str, Any] = {"return_type": "tokens", "stop_at_eos": False}
    for cached in (True, False):
        tokens = model.generate(inputs, NEW, use_past_kv_cache=cached, **options)
        assert torch.equal(tokens[:, : inputs.n_pos], inputs.tokens)
        assert torch.equal(tokens[:, inputs.n_pos :], expected)


@pytest.mark.parametrize("name", ["tied", *DECODERS])
def test_greedy_of_a_language_model_alone(name: str, seed: int, tmp_path: Path) -> None:
    hf = random_language_model(SHAPES[name]).double()
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, [0, 0, 0])
    tokens = model.generate(prompts.for_mmlens(model), NEW, return_type="tokens", stop_at_eos=False)
    assert torch.equal(tokens[:, prompts.tokens.shape[1] :], hf_generate(hf, prompts, NEW))


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_that_has_ended_stays_ended(cached: bool, seed: int, tmp_path: Path) -> None:
    """The end token is what the first row says third, so rows end at different times."""
    hf = random_llava().double()
    model = hooked(hf, tmp_path)
    assert model.cfg.eos_token_ids == (EOS,)
    prompts = in_double(random_prompts(hf.config, [1, 0]))
    end = int(hf_generate(hf, prompts, 3)[0, 2])
    model.cfg.eos_token_ids = (end,)
    expected = hf_generate(hf, prompts, NEW, ends=end)
    inputs = prompts.for_mmlens(model)
    tokens = model.generate(inputs, NEW, return_type="tokens", use_past_kv_cache=cached)
    new = tokens[:, inputs.n_pos :]
    assert new.shape == expected.shape  # it stops where all have ended
    for row, reference in zip(new.tolist(), expected.tolist(), strict=True):
        n = reference.index(end) + 1 if end in reference else len(reference)
        assert row[:n] == reference[:n]
        assert set(row[n:]) <= {end}  # transformers writes its padding token there


def test_it_stops_when_all_have_ended(seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, [1])
    inputs = prompts.for_mmlens(model)
    free = model.generate(inputs, 8, return_type="tokens", stop_at_eos=False)[0, inputs.n_pos :]
    model.cfg.eos_token_ids = (VOCABULARY + 5, int(free[3]))  # several end tokens: any of them ends
    ended = model.generate(inputs, 8, return_type="tokens")[0, inputs.n_pos :]
    first = free.tolist().index(int(free[3])) + 1
    assert ended.tolist() == free[:first].tolist()
    assert model.generate(inputs, 0, return_type="tokens").shape == inputs.tokens.shape


@pytest.mark.parametrize("cached", [True, False])
def test_a_picture_is_never_said(cached: bool, seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    model = hooked(hf, tmp_path)
    with torch.no_grad():  # nothing but <image> is worth saying
        model.unembed.weight.zero_()
        model.unembed.weight[IMAGE] = 1.0
    prompts = random_prompts(hf.config, [1])
    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", lambda x, hook: x.abs() + 1.0)]):
        tokens = model.generate(
            prompts.for_mmlens(model), 5, return_type="tokens", use_past_kv_cache=cached
        )
    assert tokens.shape[1] == prompts.tokens.shape[1] + 5
    assert not (tokens[:, prompts.tokens.shape[1] :] == IMAGE).any()


def test_hooks_act_while_it_generates(seed: int, tmp_path: Path) -> None:
    hf = random_llava()
    model = hooked(hf, tmp_path)
    inputs = random_prompts(hf.config, [1]).for_mmlens(model)
    plain = model.generate(inputs, 12, return_type="tokens", stop_at_eos=False)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: -x)]):
        edited = model.generate(inputs, 12, return_type="tokens", stop_at_eos=False)
    assert not torch.equal(plain, edited)
    assert torch.equal(plain, model.generate(inputs, 12, return_type="tokens", stop_at_eos=False))


# Sampling


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.6, None, None), (1.7, 5, None), (1.0, None, 0.7), (0.9, 12, 0.8)],
)
def test_sampling_draws_from_transformers_distribution(
    temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    logits = torch.randn(1, 23) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = warped if top_k is None else TopKLogitsWarper(top_k)(None, warped)
    warped = warped if top_p is None else TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)[0]
    n = 20_000
    drawn = choose_next(logits.expand(n, -1), True, temperature, top_k, top_p)
    counts = drawn.bincount(minlength=23)
    assert not counts[expected == 0].any()
    # Pearson's statistic over tokens that are expected often enough for it: mean k, deviation
    # sqrt(2k). Eight deviations are never reached by chance.
    often = expected * n >= 10
    k = int(often.sum())
    pearson = ((counts - n * expected)[often].pow(2) / (n * expected[often])).sum()
    assert float(pearson) < k + 8 * (2 * k) ** 0.5


def test_temperature_zero_is_greedy(seed: int) -> None:
    logits = torch.randn(9, 31)
    assert torch.equal(choose_next(logits, True, 0.0, None, None), logits.argmax(-1))
    assert torch.equal(choose_next(logits, False, 1.0, 3, 0.5), logits.argmax(-1))
    assert torch.equal(choose_next(logits, True, 2.0, 1, None), logits.argmax(-1))
    assert torch.equal(choose_next(logits, True, 2.0, None, 1e-6), logits.argmax(-1))


def test_negative_temperature_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="temperature"):
        choose_next(torch.randn(2, 5), True, -1.0, None, None)
