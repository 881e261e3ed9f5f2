"""Listening changes nothing: runs whose hooks only read give what runs without hooks give.

In exact arithmetic they are the same. In floating point the fused kernels, which run where nothing
listens, and the steps that hooks see differ in three places:

- `z`. Both sum products of queries and keys in float32 (unit roundoff u32 = 2^-24) and scale them.
  So each score is off by at most e = (d_head + 1) u32 sum_i |q_i k_i| / sqrt(d_head) (a sum of
  d_head products in any order, and the scale; Higham 2002, 3.1), and by 2 u32 |score| more where
  softmax subtracts the largest. Weights are then off by a factor of exp(2 e), and z, which both
  round once to the model's dtype (unit roundoff u), by (exp(2 e) - 1) sum_k A_k |v_k| + u |z|. The
  kernels also round the weights to the model's dtype: u sum_k A_k |v_k| more.
- What a norm gives: float32 throughout, rounded once. Where float32 falls on the other side of a
  rounding's middle, it differs by one unit in the last place.
- What attention gives while something listens to `hook_result`: the same.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_models import (
    DECODERS,
    SHAPES,
    Prompts,
    hooked,
    random_language_model,
    random_llava,
    random_prompts,
)
from rounding import TOLERANCE
from small_models import KINDS, plain_run, small_inputs, small_model
from torch import Tensor

from mmlens import Intervention, attention_contribution, attention_knockout
from mmlens.config import TransformerConfig
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import scale
from mmlens.model.components.norm import LayerNorm, RMSNorm
from mmlens.model.transformer import HookedMultimodalTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = [*SHAPES, *(f"{name}, text alone" for name in DECODERS)]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""A smaller seed makes no simpler case."""
BIAS = 150.0
"""Of every query and key of a loud model: where signs agree, 10 dimensions of them multiply to
225,000, and float16 ends at 65,504."""


@torch.no_grad()
def loud(model: Any, gain: float = 2.0) -> None:
    """Make products of queries and keys leave float16's range (a model of transformers)."""
    for name, weight in model.named_parameters():
        if "q_proj" not in name and "k_proj" not in name:
            continue
        if name.endswith("weight"):
            weight.mul_(gain)
        else:
            weight.add_(BIAS * torch.randint(0, 2, weight.shape).mul(2).sub(1))


def random_case(
    family: str, dtype: torch.dtype, is_loud: bool, images: list[int]
) -> tuple[HookedMultimodalTransformer, MultimodalInputs]:
    """A model of a family, and a batch with `images` images a row, padded on the left."""
    name, comma, alone = family.rpartition(", text alone")
    shape = SHAPES[name if comma else alone]
    hf = random_language_model(shape) if comma else random_llava(shape)
    if is_loud:
        loud(hf)
    with tempfile.TemporaryDirectory() as folder:
        model = hooked(hf.to(dtype), Path(folder), dtype=dtype)
    prompts = random_prompts(hf.config, images=[0] * len(images) if comma else images)
    return model, prompts.for_mmlens(model)


# What attention gives, by its formula


@dataclass
class Attended:
    """Attention in float64, from queries, keys and values that a run had."""

    scores: Tensor
    """[batch, head, query, key], -inf where masked."""
    off: Tensor
    """How far a score may be off in float32: e, and what softmax's subtraction adds."""
    values: Tensor
    """[batch, key, head, d_head]."""

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, cfg: TransformerConfig
    ) -> Attended:
        """`visible` [batch or 1, 1, query, key] is True where a query attends to a key."""
        group = q.shape[2] // k.shape[2]
        q, k, v = q.double(), k.double(), v.double()
        k, v = (part.repeat_interleave(group, dim=2) for part in (k, v))
        d_head = q.shape[-1]
        scores = torch.einsum("bqhd, bkhd -> bhqk", q, k) / cfg.attn_scale
        sizes = torch.einsum("bqhd, bkhd -> bhqk", q.abs(), k.abs()) / cfg.attn_scale
        off = 2**-24 * ((d_head + 1) * sizes + 2 * scores.abs())
        if cfg.scores_softcap is not None:  # a slope of at most 1, a quotient, tanh, a product
            scores = cfg.scores_softcap * (scores / cfg.scores_softcap).tanh()
            off = off + 2**-24 * 4 * scores.abs()
        return cls(scores.masked_fill(~visible, -torch.inf), off * visible, v)

    def z(self, off: Tensor | float = 0.0) -> Tensor:
        pattern = (self.scores + off).softmax(dim=-1)
        return torch.einsum("bhqk, bkhd -> bqhd", pattern, self.values)

    def bound(self, dtype: torch.dtype, rounded_weights: int = 0) -> Tensor:
        """How far z may be off; `rounded_weights` counts further roundings of its summands."""
        u, u32 = torch.finfo(dtype).eps / 2, 2**-24
        pattern = self.scores.softmax(dim=-1)
        weighted = torch.einsum("bhqk, bkhd -> bqhd", pattern, self.values.abs())
        worst = self.off.amax(dim=-1).transpose(1, 2)[..., None]
        # exp, its sum, the division and the sum over keys, in float32.
        sums = (2 * self.scores.shape[-1] + 8) * u32
        return (torch.expm1(2 * worst) + sums + rounded_weights * u) * weighted + u * (
            self.z().abs() + torch.finfo(dtype).smallest_normal
        )


def visible_to(model: HookedMultimodalTransformer, name: str, inputs: MultimodalInputs) -> Tensor:
    """Where attention of the block `name` may look; all, in the tower."""
    if name.startswith("vision."):
        assert model.vision is not None
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    position = torch.arange(inputs.n_pos)
    ago = position[:, None] - position
    visible = ago >= 0
    window = model.cfg.window(int(name.split(".")[1]))
    if window is not None:
        visible &= ago < window
    real = inputs.attention_mask[:, None, None, :]
    return (visible & real) | ((ago == 0) & ~real)  # padding attends to itself


def stack_of(model: HookedMultimodalTransformer, name: str) -> TransformerConfig:
    """The configuration of the stack in which an attention is."""
    if name.startswith("vision."):
        assert model.vision is not None
        return model.vision.cfg
    return model.cfg


def attention_names(model: HookedMultimodalTransformer) -> list[str]:
    """Of every block, decoder and tower, the path of its attention."""
    return [name.removesuffix(".hook_z") for name in model.hook_dict if name.endswith(".hook_z")]


def queries_and_keys(name: str) -> tuple[str, str]:
    """The last hook points of queries and keys before their product."""
    return ("hook_q", "hook_k") if name.startswith("vision.") else ("hook_rot_q", "hook_rot_k")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@settings(max_examples=5, phases=PHASES)
@given(st.integers(0, 2**31), st.sampled_from(FAMILIES), st.booleans())
@torch.no_grad()
def test_what_hooks_see_and_what_becomes_of_it(
    dtype: torch.dtype, seed: int, family: str, is_loud: bool
) -> None:
    """Scores and pattern are the formula's; z is so too, and rounded once, if a hook may edit."""
    random.seed(seed)
    torch.manual_seed(seed)
    model, inputs = random_case(family, dtype, is_loud, images=[1, 0, 2])
    in_use = [n for n in attention_names(model) if inputs.pixel_values is not None or n[0] == "b"]
    name = random.choice(in_use)
    first = [f"{name}.{site}" for site in (*queries_and_keys(name), "hook_v", "hook_z")]
    inner = [f"{name}.{site}" for site in ("hook_attn_scores", "hook_pattern")]
    listened = random.choice([inner, inner[:1], inner[1:]])
    _, fused = model.run_with_cache(inputs, names_filter=first)
    _, read = model.run_with_cache(inputs, names_filter=[*first, *listened])
    with model.hooks(fwd_hooks=[(each, lambda x, hook: None) for each in listened]):
        _, edited = model.run_with_cache(inputs, names_filter=[*first, *listened])
    assert all(torch.equal(fused[each], read[each]) for each in first)
    assert all(torch.equal(fused[each], edited[each]) for each in first[:3])
    visible, cfg = visible_to(model, name, inputs), stack_of(model, name)
    exact = Attended.of(*(fused[each] for each in first[:3]), visible, cfg)
    for cache, roundings in ((edited, 0), (fused, 1)):
        off = (cache[first[3]].double() - exact.z()).abs()
        assert (off <= exact.bound(dtype, roundings)).all()
    for each in listened:
        assert torch.equal(read[each], edited[each]) and read[each].dtype == torch.float32
        assert not read[each].isnan().any()
        expected, limit = exact.scores, exact.off
        if each.endswith("pattern"):
            expected, limit = expected.softmax(-1), limit.amax(-1, keepdim=True)
            limit = expected * (torch.expm1(2 * limit) + expected.shape[-1] * 2**-22) + 2**-126
        assert torch.equal(read[each].isneginf(), expected.isneginf())
        assert ((read[each] - expected).nan_to_num(0.0).abs() <= limit).all()


# What each head reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@settings(max_examples=6, phases=PHASES)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["attn_in", "q_input", "k_input", "v_input"]),
    st.sampled_from(["nothing", "heads", "norm"]),
)
@torch.no_grad()
def test_what_heads_make_of_inputs_of_their_own_is_rounded_once(
    dtype: torch.dtype, seed: int, site: str, edited: str
) -> None:
    """Queries, keys and values are W n + b in float32, rounded once, as torch's linear layer is.

    `n` is what the norm of the block gave, also where a hook edited that, or, of heads whose copy
    of the stream was edited, torch's norm of this copy.
    """
    random.seed(seed)
    kind = random.choice(["biased", "parallel", "local"])
    model = small_model(seed, **{**KINDS[kind], "qkv_bias": True}).to(dtype)
    for bias in (model.b_Q, model.b_K, model.b_V):
        assert bias.any()
    layer = random.randrange(model.cfg.n_layers)
    block = model.blocks[layer]

    def edit(copy: Tensor, hook: Any) -> None:
        if edited == "heads":
            copy[:, :, ::2] *= -1.5

    hooks = [(f"blocks.{layer}.hook_{site}", edit)]
    if edited == "norm":
        hooks.append((f"blocks.{layer}.ln1.hook_normalized", lambda x, hook: x + torch.randn(1)))
    given_by: list[Tensor] = []
    handle = block.ln1.register_forward_hook(lambda *call: given_by.append(call[-1]))
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(small_inputs(model, seed))
    handle.remove()
    u, u32, d_model = torch.finfo(dtype).eps / 2, 2**-24, model.cfg.d_model
    for which, n_heads in zip("QKV", (model.cfg.n_heads, *[model.cfg.n_kv_heads] * 2), strict=True):
        n = given_by[0][:, :, None].expand(-1, -1, n_heads, -1)
        if edited == "heads" and site in ("attn_in", f"{which.lower()}_input"):
            copy = cache["resid_pre", layer][:, :, None].repeat(1, 1, model.cfg.n_heads, 1)
            if site == "attn_in":
                edit(copy, None)
                copy = copy.unflatten(2, (n_heads, -1)).double().mean(dim=3).to(dtype)
            else:
                copy = copy[:, :, :n_heads]
                edit(copy, None)
            n = block.ln1.without_hooks(copy)
        W, b = (getattr(block.attn, f"{of}_{which}").double() for of in "Wb")
        exact = torch.einsum("bphm, hmd -> bphd", n.double(), W) + b
        sizes = torch.einsum("bphm, hmd -> bphd", n.double().abs(), W.abs()) + b.abs()
        sums = (d_model + 1) * u32 * sizes  # a sum of d_model + 1 terms, in any order
        off = (cache[which.lower(), layer].double() - exact).abs()
        assert (off <= sums + u * (exact.abs() + sums + torch.finfo(dtype).smallest_normal)).all()


# Whole runs


def moved_once_more(model: HookedMultimodalTransformer, inputs: MultimodalInputs) -> ExitStack:
    """Hooks by which a run without listeners rounds otherwise, in the three places.

    They are no listeners: every kernel stays as it is.
    """
    stack = ExitStack()

    def moved(x: Tensor) -> Tensor:
        return (x * (1 + torch.finfo(x.dtype).eps * torch.randint(-1, 2, x.shape))).to(x.dtype)

    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm):
            stack.enter_context(module.register_forward_hook(lambda *given: moved(given[-1])))
    for name in attention_names(model):
        store: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any, store: dict[str, Tensor] = store) -> None:
            store[str(hook.name).rpartition(".")[2]] = activation

        def attend(z: Tensor, hook: Any, name: str = name, store: dict = store) -> Tensor:
            q, k = (store[site] for site in queries_and_keys(name))
            exact = Attended.of(
                q, k, store["hook_v"], visible_to(model, name, inputs), stack_of(model, name)
            )
            off = exact.off * (2 * torch.rand_like(exact.off) - 1)
            return moved((z + exact.z(off) - exact.z()).to(z.dtype))

        sites = [*queries_and_keys(name), "hook_v"]
        hooks: list[tuple[str, Any]] = [(f"{name}.{site}", keep) for site in sites]
        stack.enter_context(model.hooks(fwd_hooks=[*hooks, (f"{name}.hook_z", attend)]))
        out = name.replace("attn", "hook_attn_out")
        stack.enter_context(model.hooks(fwd_hooks=[(out, lambda x, hook: moved(x))]))
    return stack


def rounding_limit(model: HookedMultimodalTransformer, inputs: MultimodalInputs) -> float:
    """How far logits may be from those of a run without listeners.

    Twice the largest effect of four runs in which every place rounds once more, at random: there
    are hundreds of roundings, and their joint effects differ by less than that.
    """
    plain, found = model(inputs).double(), []
    for _ in range(4):
        with moved_once_more(model, inputs):
            found.append(float((model(inputs).double() - plain).abs().max()))
    return 2 * max(found)


def some_hook_points(model: HookedMultimodalTransformer) -> list[Any]:
    """What may listen: all, one, all of the kinds that are computed only for hooks, any."""
    names = list(model.hook_dict)
    kinds = ["scores", "pattern", "result", "scale", "normalized"]
    chosen = random.sample(kinds, random.randint(1, len(kinds)))
    return [
        None,
        random.choice(names),
        [name for name in names if name.endswith(tuple(chosen))],
        random.sample(names, random.randint(1, len(names))),
    ]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@settings(max_examples=3, phases=PHASES)
@given(st.integers(0, 2**31), st.sampled_from(FAMILIES), st.booleans())
@torch.no_grad()
def test_outputs_are_those_of_a_run_without_hooks(
    dtype: torch.dtype, seed: int, family: str, is_loud: bool
) -> None:
    """Also with products out of float16's range.

    Of a loud model's queries bfloat16 rounds 150 to a multiple of 1: then any rounding before them
    chooses other keys, so the limit would be as large as the logits.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    is_loud = is_loud and dtype != torch.bfloat16
    model, inputs = random_case(family, dtype, is_loud, random.choice([[1], [0, 1], [2, 0, 1]]))
    plain, limit = model(inputs), rounding_limit(model, inputs)
    for names in some_hook_points(model):
        logits, cache = model.run_with_cache(inputs, names_filter=names)
        assert torch.equal(logits, plain), names
        hooks = [(name, lambda x, hook: None) for name in cache]
        logits = model.run_with_hooks(inputs, fwd_hooks=hooks)
        assert float((logits - plain).abs().max()) <= limit, names


# Branches


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", ["fused", "edited", "with gradients"])
@settings(max_examples=3, phases=PHASES)
@given(st.integers(0, 2**31), st.sampled_from(FAMILIES), st.booleans())
def test_attention_of_branches(
    dtype: torch.dtype, kind: str, seed: int, family: str, is_loud: bool
) -> None:
    """A branch's z is the formula's, of its own queries and all keys, shared ones first.

    It is joined from two parts, shared keys and own ones. Where hooks may edit, both are in
    float32. The kernels give either in the model's dtype, with weights that were rounded to it, and
    so does the way that has gradients.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    model, inputs = random_case(family, dtype, is_loud, random.choice([[0], [1, 0]]))
    recording = model.record(inputs)
    layer, first = random.randrange(model.cfg.n_layers), random.randrange(1, inputs.n_pos - 1)
    own = range(first, inputs.n_pos)
    change = torch.zeros((), requires_grad=kind == "with gradients")
    seen: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        seen[str(hook.name).rpartition(".")[2]] = activation.detach().clone()

    sites = ["rot_q", "rot_k", "v", "z", *(["attn_scores"] if kind == "edited" else [])]
    branch = [Intervention(site, layer, own, keep) for site in sites]
    # The last layer computes only what is read, so that is everything from the first position on.
    with torch.set_grad_enabled(kind == "with gradients"):
        edit = Intervention("resid_pre", 0, own, lambda x, hook: x * 1.25 + change)
        recording.run([[edit, *branch]], lambda logits: logits, positions=own)
    past = recording.past.entries[layer]
    assert past is not None
    k, v = (
        torch.cat([held[:, :first], seen[f"hook_{site}"]], dim=1)
        for held, site in zip(past, ("rot_k", "v"), strict=True)
    )
    visible = visible_to(model, f"blocks.{layer}.attn", inputs)[:, :, first:]
    exact = Attended.of(seen["hook_rot_q"], k, v, visible, model.cfg)
    off = (seen["hook_z"].double() - exact.z()).abs()
    assert (off <= exact.bound(dtype, 0 if kind == "edited" else 2)).all()
    if kind == "edited":
        off = (seen["hook_attn_scores"] - exact.scores).nan_to_num(0.0).abs()
        assert (off <= exact.off).all()


@torch.no_grad()
def test_branches_while_something_listens(seed: int) -> None:
    """They are plain runs then: those of any listeners agree bit by bit."""
    model, inputs = random_case(random.choice(FAMILIES), torch.float32, False, images=[1])
    last = inputs.n_pos - 1
    branches = [[Intervention("mlp_out", 0, [last], scale(0.5))], []]
    recording = model.record(inputs)
    alone, found = recording.run(branches, lambda logits: logits[:, 0]), []
    for names in some_hook_points(model):
        _, caching, _ = model.get_caching_hooks(names)
        with model.hooks(fwd_hooks=caching):
            found.append(recording.run(branches, lambda logits: logits[:, 0]))
    assert all(torch.equal(each, found[0]) for each in found)
    # The engine rounds at places of its own, too.
    off = float((found[0] - alone).abs().max())
    assert off <= TOLERANCE or off <= rounding_limit(model, inputs)


# Against transformers, out of float16's range


def loud_phi() -> tuple[Any, HookedMultimodalTransformer, Prompts]:
    """A Phi checkpoint in float16, its model and a prompt with scores beyond float16's range.

    Queries and keys differ so much that the most similar key takes nearly all: what float16 makes
    of 150, a multiple of 1/8, then rarely decides which.
    """
    for _ in range(20):  # one draw in some tens stays within the range
        hf = random_language_model(SHAPES[random.choice(["phi", "phi, grouped queries"])])
        loud(hf, gain=8.0)
        with tempfile.TemporaryDirectory() as folder:
            model = hooked(hf.half(), Path(folder), dtype=torch.float16)
        hf = hf.float()
        hf.set_attn_implementation("eager")
        prompts = random_prompts(hf.config, images=[0])
        _, cache = model.run_with_cache(prompts.for_mmlens(model))
        q, k = (cache[f"rot_{site}", 0].float() for site in "qk")
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        if torch.einsum("bqhd, bkhd -> bhqk", q, k).abs().max() > 65504:
            return hf, model, prompts
    raise AssertionError("20 models had no score beyond 65,504, so there is nothing to test")


N_LOUD = 7
"""Models of which the median counts: in some a tie of two keys is decided by rounding."""


@torch.no_grad()
def test_logits_out_of_float16s_range_are_those_of_transformers(seed: int) -> None:
    """To some units of float16 (2^-8 for logits between 4 and 8), as after every of 3 layers."""
    errors = []
    for _ in range(N_LOUD):
        hf, model, prompts = loud_phi()
        expected = hf(**prompts.for_hf()).logits
        with model.hooks(fwd_hooks=[(lambda name: True, lambda x, hook: None)]):
            errors.append(float((model(prompts.for_mmlens(model)) - expected).abs().max()))
    assert sorted(errors)[N_LOUD // 2] <= 5 * 2**-8


@torch.no_grad()
def test_contributions_and_knockout_out_of_float16s_range(seed: int) -> None:
    """Those of transformers: norms of A v W_O, and P(answer) without some keys in any layer."""
    errors = []
    for _ in range(N_LOUD):
        hf, model, prompts = loud_phi()
        inputs = prompts.for_mmlens(model)
        out = hf(**prompts.for_hf(), output_attentions=True, output_hidden_states=True)
        found = attention_contribution(model, inputs, range(inputs.n_pos), range(inputs.n_pos))
        for layer, block in enumerate(hf.model.layers):
            attention, pattern = block.self_attn, out.attentions[layer]
            v = attention.v_proj(block.input_layernorm(out.hidden_states[layer]))
            v = v.unflatten(-1, (-1, attention.head_dim))[0]
            v = v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
            W_O = attention.dense.weight.unflatten(1, (-1, attention.head_dim))
            expected = torch.einsum("hji, ihd, mhd -> jim", pattern[0], v, W_O).norm(dim=-1)
            errors.append(float((found.values[layer] - expected).abs().max()))
        # Cut from all later positions in all layers, a position is as good as masked.
        cut, answer = random.randrange(1, inputs.n_pos - 1), int(out.logits[0, -1].argmax())
        mask = prompts.attention_mask.index_fill(1, torch.tensor([cut]), 0)
        without = hf(**{**prompts.for_hf(), "attention_mask": mask}).logits[0, -1]
        after = range(cut + 1, inputs.n_pos)
        knocked = attention_knockout(
            model, inputs, [cut], after, layers=[0], window=2 * model.cfg.n_layers, answer=answer
        )
        errors.append(abs(float(knocked.probability) - float(without.softmax(-1)[answer])))
    assert sorted(errors)[len(errors) // 2] <= 2**-8


# What is no number


def test_what_is_no_number_is_not_hidden(seed: int) -> None:
    """Scores that are NaN or infinite reach the output, in plain runs and in branches.

    A query that a hook left no key attends to none, and has gradients all the same.
    """
    model, inputs = random_case("grouped queries", torch.float32, False, images=[1])
    layer, last = random.randrange(model.cfg.n_layers), inputs.n_pos - 1

    def filled(value: float) -> list[Intervention]:
        hook = lambda scores, hook: torch.full_like(scores, value)  # noqa: E731
        return [Intervention("attn_scores", layer, [last], hook)]

    for value in (torch.nan, torch.inf):
        assert plain_run(model, inputs, filled(value))[0, -1].isnan().all()
        branch = model.record(inputs).run([filled(value)], lambda logits: logits)
        assert branch.isnan().all()
    logits = plain_run(model, inputs, filled(-torch.inf))
    branch = model.record(inputs).run([filled(-torch.inf)], lambda logits: logits[:, 0])
    assert torch.allclose(branch[0], logits[:, -1], atol=TOLERANCE)
    logits[0, -1].logsumexp(-1).backward()
    gradient = model.W_E.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0
