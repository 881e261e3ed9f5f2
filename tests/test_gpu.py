"""On GPUs that are not there: everything is where it must be, and the values are the CPU's."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pretend_gpu
import pytest
import torch
from pretend_gpu import EFFICIENT, FLASH, pretend_gpus
from small_models import any_family, picture, small_inputs, worded_model
from test_branching import decoder_edit, probabilities, sites_of
from torch import Tensor

from mmlens import (
    HookedMultimodalTransformer,
    MultimodalInputs,
    attention_contribution,
    attention_knockout,
    blur_image,
    causal_trace,
    causal_trace_many,
    collate,
    direct_logit_attribution,
    logit_lens,
    mean_image,
    noise_image,
    noise_span,
    swap_image,
    swap_span,
)
from mmlens.checkpoints.devices import allocate
from mmlens.model.components import partial_attention
from mmlens.model.components.attention_rule import AttentionRule

TOLERANCE = 1e-9  # in float64: other kernels round otherwise, and a model can make much of that
QUESTION = "What is the capital of this country?"


@pytest.fixture
def gpus() -> Iterator[None]:
    with pretend_gpus(2):
        yield


def on_gpu(model: HookedMultimodalTransformer) -> HookedMultimodalTransformer:
    return copy.deepcopy(model).to("cuda")


def prompt(model: HookedMultimodalTransformer) -> MultimodalInputs:
    return model.prepare(QUESTION, picture(0), spans={"constraint": "this country"})


def values_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, in main memory."""
    if isinstance(result, Tensor):
        return {"": result.cpu()}
    found = {field.name: getattr(result, field.name) for field in fields(result)}
    return {name: value.cpu() for name, value in found.items() if isinstance(value, Tensor)}


def assert_same(found: Any, expected: Any) -> None:
    values = values_of(expected)
    assert values
    for name, value in values_of(found).items():
        assert torch.allclose(
            value.double(), values[name].double(), rtol=TOLERANCE, atol=TOLERANCE
        ), name


def test_what_was_not_moved_is_noticed(gpus: None) -> None:
    there, here = torch.ones(3).to("cuda"), torch.ones(3)
    assert there.device == torch.device("cuda:0") and (there + 1).device == there.device
    assert (there.cpu() + here).tolist() == [2.0, 2.0, 2.0]
    for wrong in (here, here.to("cuda:1")):
        with pytest.raises(RuntimeError, match="to be on the same device, not c"):
            there + wrong
    with pytest.raises(TypeError, match="convert cuda:0"):
        there.numpy()


@torch.no_grad()
def test_branches(gpus: None, seed: int) -> None:
    chance, model = random.Random(seed), any_family(seed).double()
    inputs = small_inputs(model, seed, images=(1, 0))
    branches = [
        [decoder_edit(model, inputs, chance, site)] for site in sites_of(model) for _ in range(2)
    ]
    there = on_gpu(model).record(inputs).run(branches, probabilities)
    assert there.device.type == "cuda"
    assert_same(there, model.record(inputs).run(branches, probabilities))


CORRUPTIONS = {
    "words": lambda model, inputs: swap_span(model, inputs, "constraint", "Paris"),
    "noise": lambda model, inputs: noise_span(model, inputs, ["constraint", "image"], samples=2),
    "another image": lambda model, inputs: swap_image(model, inputs, picture(1)),
    "blur": lambda model, inputs: blur_image(model, inputs, sigma=1.0),
    "mean": lambda model, inputs: mean_image(model, inputs, level="embeddings"),
    "pixels": lambda model, inputs: noise_image(model, inputs, samples=2),
}


def words(of: MultimodalInputs) -> list[Tensor]:
    return [of.span(name) for name in ("image", "constraint", "last")]


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
@torch.no_grad()
def test_traces(gpus: None, seed: int, corrupt: Any) -> None:
    """Of prompts that were prepared there, or by a model on the CPU."""
    model = worded_model(seed, n_layers=2).double()
    there = on_gpu(model)
    inputs = prompt(random.Random(seed).choice([there, model]))
    corrupted = corrupt(there, inputs)
    options: dict[str, Any] = {"positions": words(inputs), "answer": "Rome"}
    expected = causal_trace(model, prompt(model), corrupted.to("cpu"), **options)
    assert_same(causal_trace(there, inputs, corrupted, **options), expected)


@torch.no_grad()
def test_other_ways_to_trace(gpus: None, seed: int) -> None:
    model = worded_model(seed, n_layers=2).double()
    there, inputs = on_gpu(model), prompt(model)
    corrupted = swap_span(model, inputs, "constraint", "Paris")
    expected = causal_trace(model, inputs, corrupted, positions=words(inputs))
    naive = causal_trace(there, inputs, corrupted, positions=words(inputs), method="naive")
    assert_same(naive, expected)
    pairs = [(inputs, corrupted)]
    [of_many] = causal_trace_many(there, pairs, positions=words)
    assert_same(of_many, expected)


@torch.no_grad()
def test_cells_do_not_wait_for_the_gpu(
    gpus: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A trace of many cells moves no more to or from it, and waits, than one of a few."""
    model = worded_model(seed, n_layers=3).double()
    there, inputs = on_gpu(model), prompt(model)
    corrupted = swap_span(model, inputs, "constraint", "Paris")
    waits, run = [], pretend_gpu.on_devices

    def counted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_there = isinstance(args[0], pretend_gpu.GpuTensor) if args else False
        packet, moves = func.overloadpacket, "cuda" in str(kwargs.get("device"))
        read = packet is torch.ops.aten._local_scalar_dense and is_there
        sent = packet is torch.ops.aten._to_copy and not is_there and moves
        if read or (sent and not kwargs.get("non_blocking")):
            waits.append(packet)
        return run(func, args, kwargs)

    monkeypatch.setattr(pretend_gpu, "on_devices", counted)
    behind = range(int(inputs.span("constraint")[0]), inputs.n_pos)
    counts = []
    for groups in (behind[:1], behind):
        waits.clear()
        trace = causal_trace(there, inputs, corrupted, positions=list(groups))
        counts.append((trace.restored.numel(), len(waits)))
    (few, for_few), (many, for_many) = counts
    assert many >= few + 18 and for_few > 0
    assert for_many <= for_few + 6, counts  # where other branches begin, they have masks of theirs


USES = {
    "forward": lambda model, inputs: model(inputs),
    "cache": lambda model, inputs: model.run_with_cache(inputs)[1]["blocks.1.hook_resid_post"],
    "batch": lambda model, inputs: model(collate([inputs.to(model.device), small(model)], 0)),
    "contributions": lambda model, inputs: attention_contribution(model, inputs, "image", "last"),
    "knockout": lambda model, inputs: attention_knockout(model, inputs, "image", "last"),
    "lens": lambda model, inputs: logit_lens(model, inputs),
    "decomposition": lambda model, inputs: model.run_with_cache(inputs)[1].decompose_resid(),
    "whole decomposition": lambda model, inputs: decomposed(model, inputs),
    "circuits": lambda model, inputs: model.all_composition_scores("K"),
    "logit attribution": lambda model, inputs: direct_logit_attribution(model, inputs),
}


def decomposed(model: HookedMultimodalTransformer, inputs: MultimodalInputs) -> Any:
    """Heads and neurons, and what each adds to a logit."""
    _, cache = model.run_with_cache(inputs)
    parts = cache.get_full_resid_decomposition(pos_slice=-1)
    normalized = cache.apply_ln_to_stack(parts, pos_slice=-1)
    logits = normalized @ model.tokens_to_residual_directions(5)
    attributed = cache.logit_attrs(parts, 5, pos_slice=-1)
    heads = cache.stack_head_results(pos_slice=-1, apply_ln=True)
    return torch.cat([each.flatten() for each in (parts, logits, attributed, heads)])


def small(model: HookedMultimodalTransformer) -> MultimodalInputs:
    return model.prepare("What?", picture(2))


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@torch.no_grad()
def test_uses(gpus: None, seed: int, use: Any) -> None:
    model = worded_model(seed, n_layers=3).double()
    assert_same(use(on_gpu(model), prompt(model)), use(model, prompt(model)))


def test_text(gpus: None, seed: int) -> None:
    model = worded_model(seed, n_layers=3).double()
    inputs = prompt(model)
    assert on_gpu(model).generate(inputs, max_new_tokens=5) == model.generate(
        inputs, max_new_tokens=5
    )


def over_two_gpus(model: HookedMultimodalTransformer) -> HookedMultimodalTransformer:
    """The same model of four layers, spread by accelerate."""
    with torch.device("meta"):
        split = HookedMultimodalTransformer(copy.deepcopy(model.cfg)).double()
    end = 0 if model.cfg.tie_word_embeddings else 1
    places = {"vision": 0, "projector": 1, "embed": 0, "ln_final": 1, "unembed": end}
    allocate(split, torch.device("cuda"), places | {f"blocks.{i}": int(i > 1) for i in range(4)})
    for name, parameter in split.named_parameters():
        parameter.copy_(model.get_parameter(name))
    assert {parameter.device.index for parameter in split.parameters()} == {0, 1}
    split.tokenizer, split.image_processor = model.tokenizer, model.image_processor
    return split


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@torch.no_grad()
def test_uses_over_two_gpus(gpus: None, seed: int, use: Any) -> None:
    model = worded_model(seed, n_layers=4).double()
    assert_same(use(over_two_gpus(model), prompt(model)), use(model, prompt(model)))


@torch.no_grad()
def test_branches_over_two_gpus(gpus: None, seed: int) -> None:
    """Branches, images and reads cross from one to the other."""
    chance, model = random.Random(seed), any_family(seed, n_layers=4).double()
    split = over_two_gpus(model)
    inputs = small_inputs(model, seed)
    assert_same(split(inputs), model(inputs))
    branches = [[decoder_edit(model, inputs, chance)] for _ in range(12)]
    found = split.record(inputs).run(branches, probabilities)
    assert_same(found, model.record(inputs).run(branches, probabilities))
    corrupted = replace(inputs, tokens=inputs.tokens.index_fill(1, inputs.span("last"), 7))
    expected = causal_trace(model, inputs, corrupted, answer=5)
    for method in ("branch", "naive"):
        assert_same(causal_trace(split, inputs, corrupted, answer=5, method=method), expected)


@pytest.mark.parametrize(
    ("dtype", "d_head", "allowed", "kernel"),
    [
        (torch.bfloat16, 16, ("flash", "efficient"), FLASH),
        (torch.bfloat16, 12, ("flash", "efficient"), EFFICIENT),
        (torch.float32, 12, ("efficient",), EFFICIENT),
        (torch.float32, 7, (), None),
    ],
)
@pytest.mark.parametrize("n_kv_heads", [1, 3])
def test_kernels(
    gpus: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    d_head: int,
    allowed: tuple[str, ...],
    kernel: Any,
    n_kv_heads: int,
) -> None:
    """Which kernel is called for which heads, and that its normaliser is read as it is meant."""
    for name in ("flash", "efficient"):
        known = f"can_use_{name}_attention"
        monkeypatch.setattr(partial_attention, known, lambda choice, name=name: name in allowed)
    called, run = [], pretend_gpu.fused
    count = lambda packet, *parts: called.append(packet) or run(packet, *parts)  # noqa: E731
    monkeypatch.setattr(pretend_gpu, "fused", count)
    q = torch.randn(2, 5, 3, d_head, dtype=dtype)
    k, v = (torch.randn(1, 11, n_kv_heads, d_head, dtype=dtype) for _ in range(2))
    rule = AttentionRule(q.shape[-1] ** -0.5)
    z, lse = partial_attention.attend_part(*(x.to("cuda") for x in (q, k, v)), None, rule)
    assert called == ([] if kernel is None else [kernel])
    wide = [x.double().repeat_interleave(3 // x.shape[2], dim=2) for x in (q, k, v)]
    scores = torch.einsum("bqhd,xkhd->bqhk", *wide[:2]) / d_head**0.5
    expected = torch.einsum("bqhk,xkhd->bqhd", scores.softmax(-1), wide[2])
    error = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert (z.cpu() - expected).abs().max() <= error * wide[2].abs().max()
    assert (lse.cpu() - scores.logsumexp(-1)).abs().max() <= 1e-5


def test_prompts_on_several_devices_are_refused(gpus: None, seed: int) -> None:
    inputs = small_inputs(on_gpu(any_family(seed).double()), seed)
    assert inputs.device.type == "cuda"
    with pytest.raises(ValueError, match=r"noise is on cpu, the tokens on cuda:0.*inputs\.to"):
        replace(inputs, noise=torch.zeros(1, inputs.n_pos, 4))


@pytest.mark.slow
def test_gradients(seed: int) -> None:
    """Edits and attribution patching; PyTorch has no gradients on GPUs that are not there."""
    script = Path(__file__).parent / "support" / "gradients_on_a_device.py"
    done = subprocess.run(
        [sys.executable, str(script), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
