"""Metrics of traces, knockout and attribution patching, from logits of transformers in float64.

Logits equal transformers' to `LOGITS`. The log probability of a token changes by at most twice what
logits change by, and from this follows how far each metric may be off (`bounds`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_interventions import hf_knockout, hf_logits, hf_trace
from random_models import (
    N_SPECIAL,
    VOCABULARY,
    Prompts,
    Shape,
    hooked,
    random_llava,
    random_prompts,
)
from small_models import small_inputs, small_model
from test_trace_effects import words_swapped
from torch import Tensor

from mmlens import (
    AttentionKnockout,
    CausalTrace,
    aggregate_traces,
    attention_knockout,
    attribution_patching,
    causal_trace,
    role_positions,
)

LOGITS = 1e-4
SITES = ("resid_post", "attn_out", "mlp_out")
METRICS = ("probability", "logit_diff", "kl", "loss")


def entropy(logits: Tensor) -> Tensor:
    """A metric of a user."""
    log_probs = logits[:, 0].log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def formula(
    metric: Any, logits: Tensor, reference: Tensor, answer: int, contrast: int
) -> tuple[Tensor, Tensor]:
    """A metric of logits [..., d_vocab], in float64, and how far ours may be off."""
    logits, reference = logits.double(), reference.double()
    log_probs, clean = logits.log_softmax(-1), reference.log_softmax(-1)
    if metric == "logit_diff":
        found = logits[..., answer] - logits[..., contrast]
        return found, torch.full_like(found, 2 * LOGITS)
    if metric == "kl":
        # p changes by a factor within 1 +- 2 LOGITS, and each logarithm by 2 LOGITS.
        difference = clean - log_probs
        far = (clean.exp() * difference.abs()).sum(-1)
        return (clean.exp() * difference).sum(-1), 2 * LOGITS * (2 + far)
    if metric is entropy:
        surprise = -(log_probs.exp() * log_probs).sum(-1)
        return surprise, 2 * LOGITS * (1 + surprise)
    found = log_probs[..., answer]
    off = torch.full_like(found, 2 * LOGITS)
    return (-found, off) if metric == "loss" else (found.exp(), off * found.exp())


def two_prompts(hf: Any) -> tuple[Prompts, Prompts, list[int]]:
    """A prompt with an image, the same with other words, and where these are."""
    clean = random_prompts(hf.config, [1], words=[7], text_last=True)
    words = (clean.tokens[0] >= N_SPECIAL).nonzero().flatten().tolist()
    swapped = sorted([random.choice(words[:-1]), words[-1]])
    tokens = clean.tokens.clone()
    tokens[0, swapped] = (tokens[0, swapped] - N_SPECIAL + 5) % (VOCABULARY - N_SPECIAL) + N_SPECIAL
    return clean, Prompts(tokens, clean.attention_mask, clean.pixel_values), swapped


def named(metric: Any) -> str:
    return metric if isinstance(metric, str) else metric.__name__


def test_traces_of_every_metric(seed: int, tmp_path: Path) -> None:
    hf = random_llava(Shape(n_layers=3, grid=2))
    model = hooked(hf, tmp_path)
    clean, corrupted, swapped = two_prompts(hf)
    groups = [swapped, [swapped[-1]]]
    answer, contrast = random.sample(range(N_SPECIAL, VOCABULARY), 2)
    both = torch.stack([hf_logits(hf, clean), hf_logits(hf, corrupted)])
    cells = hf_trace(hf, clean, corrupted, SITES, groups, 1)
    ours = clean.for_mmlens(model), corrupted.for_mmlens(model)
    for metric in (*METRICS, entropy):
        expected, bound = formula(metric, cells, both[0], answer, contrast)
        plain, off = formula(metric, both, both[0], answer, contrast)
        options: dict[str, Any] = {"positions": groups, "answer": answer, "metric": metric}
        options |= {"contrast": contrast} if metric == "logit_diff" else {}
        trace = causal_trace(model, *ours, **options)
        assert ((trace.restored - expected).abs() <= bound).all()
        assert abs(trace.clean - plain[0]) <= off[0]
        assert abs(trace.corrupted - plain[1]) <= off[1]
        naive = causal_trace(model, *ours, method="naive", sites=SITES[1:2], layers=[1], **options)
        assert ((naive.restored[0, :, 0] - expected[1, :, 1]).abs() <= bound[1, :, 1]).all()
        assert trace.metric == named(metric)
        effect = trace.restored - trace.corrupted
        assert torch.equal(trace.indirect_effect, effect)
        assert torch.equal(trace.recovery, effect / (trace.clean - trace.corrupted))
    assert CausalTrace.load(trace.save(tmp_path / "trace.safetensors")).metric == "entropy"


def test_knockout_of_every_metric(seed: int, tmp_path: Path) -> None:
    hf = random_llava(Shape(n_layers=3, grid=2))
    model = hooked(hf, tmp_path)
    prompts = random_prompts(hf.config, [1], words=[7])
    inputs = prompts.for_mmlens(model)
    answer, contrast = random.sample(range(N_SPECIAL, VOCABULARY), 2)
    source = random.sample(range(1, inputs.n_pos - 1), 3)
    cut = [[i for i in (layer - 1, layer) if i >= 0] for layer in range(3)]
    logits = torch.stack(
        [hf_knockout(hf, prompts, each, source, [inputs.n_pos - 1]) for each in [[], *cut]]
    )
    for metric in (*METRICS, entropy):
        options = {"contrast": contrast} if metric == "logit_diff" else {}
        found = attention_knockout(
            model, inputs, source, "last", window=2, answer=answer, metric=metric, **options
        )
        expected, bound = formula(metric, logits, logits[0], answer, contrast)
        values = torch.cat([torch.tensor([found.clean]), found.values])
        assert ((values - expected).abs() <= bound).all()
        assert torch.equal(found.effect, found.values - found.clean)
        assert found.metric == named(metric)
        assert found.contrast == (str(contrast) if options else "")
        column = "probability" if metric == "probability" else "value"
        assert found.to_dataframe()[column].tolist() == found.values.tolist()
    with pytest.raises(ValueError, match=r"the values are 'entropy', not probabilities"):
        _ = found.probability
    again = AttentionKnockout.load(found.save(tmp_path / "cut.safetensors"))
    assert (again.metric, again.values.tolist()) == ("entropy", found.values.tolist())


@pytest.mark.parametrize("metric", [*METRICS, entropy])
def test_estimates_of_every_metric(metric: Any, seed: int) -> None:
    """That the estimate is the derivative of a function is tested elsewhere; names are formulas.

    Both are the same gradient in float64, of the same steps up to how logarithms are taken.
    """
    model = small_model(seed, n_layers=3).double()
    clean = small_inputs(model, seed)
    clean = clean.with_pixels(clean.pixel_values.double())
    other = words_swapped(clean, seed)
    answer, contrast = random.sample(range(2, 50), 2)
    options: dict[str, Any] = {"answer": answer, "sites": ("mlp_out", "resid_post")}
    contrasted = {"contrast": contrast} if metric == "logit_diff" else {}
    found = attribution_patching(model, clean, other, metric=metric, **contrasted, **options)
    reference = model(clean)[0, -1]

    def by_formula(logits: Tensor) -> Tensor:
        return formula(metric, logits[:, 0], reference, answer, contrast)[0]

    expected = attribution_patching(model, clean, other, metric=by_formula, **options)
    largest = expected.indirect_effect.abs().max()
    assert largest > 0
    off = (found.indirect_effect - expected.indirect_effect).abs().max()
    assert off <= 1e-9 * (1 + largest)
    [corrupted] = by_formula(model(other)[:, -1:])
    assert found.corrupted == pytest.approx(float(corrupted), abs=1e-9)
    exact = causal_trace(model, clean, other, metric=metric, **contrasted, **options)
    assert (found.clean, found.corrupted) == pytest.approx((exact.clean, exact.corrupted), abs=1e-9)
    assert found.error(exact).largest < float("inf")  # the same cells of the same metric


def two_numbers(logits: Tensor) -> Tensor:
    return logits[:, 0, :2]


@pytest.mark.parametrize(
    "analysis",
    [
        lambda model, clean, other, **options: causal_trace(model, clean, other, **options),
        lambda model, clean, other, **options: attribution_patching(model, clean, other, **options),
        lambda model, clean, other, **options: attention_knockout(
            model, clean, "image", "last", **options
        ),
    ],
    ids=["causal_trace", "attribution_patching", "attention_knockout"],
)
def test_metrics_that_cannot_be_followed(analysis: Callable[..., Any], seed: int) -> None:
    model = small_model(seed)
    clean = small_inputs(model, seed)
    other = words_swapped(clean, seed)
    with pytest.raises(ValueError, match="needs contrast"):
        analysis(model, clean, other, metric="logit_diff")
    with pytest.raises(ValueError, match=r"'two_numbers' gives \(1, 2\) for 1 row of logits; one"):
        analysis(model, clean, other, metric=two_numbers)
    with pytest.raises(ValueError, match=r"gives \(\) for 1 row"):
        analysis(model, clean, other, metric=lambda logits: logits.sum())


def test_metrics_are_not_mixed(seed: int) -> None:
    model = small_model(seed)
    clean = small_inputs(model, seed)
    pair = clean, words_swapped(clean, seed)
    options: dict[str, Any] = {"sites": ("mlp_out",), "layers": [0]}
    losses, probabilities = (
        causal_trace(model, *pair, metric=metric, **options) for metric in ("loss", "probability")
    )
    with pytest.raises(ValueError, match="the trace has other metric: loss instead of probability"):
        attribution_patching(model, *pair, **options).error(losses)
    roles = [role_positions(clean, "text")] * 2
    with pytest.raises(ValueError, match="traces of other metric: loss and probability"):
        aggregate_traces([probabilities, losses], roles)
    title = losses.plot().layout.title.text
    assert title.startswith("loss of “")
    assert "kl, restored" not in title
