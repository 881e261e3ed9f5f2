"""What a hook point promises to hook functions, and what may stand in its place."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformer_lens.hook_points
from small_models import any_family, plain_run, small_inputs, small_model
from torch import Tensor, nn

from mmlens import Intervention, hook_name
from mmlens.interventions.functions import scale
from mmlens.interventions.intervention import LAYERED_SITES
from mmlens.model.components import MLP
from mmlens.model.components import past as past_module
from mmlens.model.hook_points import listens, reading

# Edits in place


def half_and_more(x: Tensor) -> Tensor:
    """What is tried below: of -inf it makes -inf, and it changes every activation."""
    return x * 0.5 + 0.1 * torch.arange(1, x.shape[-1] + 1).to(x)


def returns(x: Tensor, hook: Any) -> Tensor:
    return half_and_more(x)


def edits_in_place(x: Tensor, hook: Any) -> None:
    x[:] = half_and_more(x)


def some_names(model: Any, n: int) -> list[str]:
    """Hook points by chance, all different; all of them where there are fewer."""
    names = list(model.hook_dict)
    return random.sample(names, min(n, len(names)))


at_some_names = pytest.mark.parametrize(
    "n_names", [8, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "all"]
)

TOLERANCE = 1e-9
"""Absolute and relative, of models in float64."""


def near(found: Tensor, expected: Tensor, **options: Any) -> bool:
    """Whether two runs in float64 gave the same.

    An edit may have a small effect (attention in a small tower is nearly uniform, and moves logits
    by 2e-6 at the least in 150 models), so it is told from none by what equal runs may differ by.
    """
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, **options)


def model_with_keys(seed: int) -> Any:
    """Two layers of any family, in float64; more than one key in each layer's window.

    Of a single key the weight is 1, whatever is done to queries, keys and scores.
    """
    window = random.Random(seed).choice([2, 3, 7])
    return any_family(seed, n_layers=2, window_size=window).double()


def everything(model: Any, inputs: Any, name: str, edit: Callable) -> dict[str, Tensor]:
    """Logits, all activations before and after the edit, and gradients where there are some."""
    stored: dict[str, Tensor] = {}

    def store(x: Tensor, hook: Any) -> None:
        stored[f"stored {hook.name}"] = x

    model.zero_grad()
    before, caching, _ = model.get_caching_hooks(lambda name: True)
    names = [(each, store) for each in model.hook_dict]
    with model.hooks(fwd_hooks=[*caching, *names, (name, edit)]):
        logits, after = model.run_with_cache(inputs, names_filter=lambda name: True)
    found = {"logits": logits, **stored}
    found |= {f"before {each}": x for each, x in before.items()}
    found |= {f"after {each}": x for each, x in after.items()}
    if logits.requires_grad:
        (logits[:, -1].logsumexp(-1) * torch.linspace(1, 2, len(logits))).sum().backward()
        found |= {
            f"gradient {each}": weight.grad
            for each, weight in model.named_parameters()
            if weight.grad is not None
        }
    return {each: x.detach() for each, x in found.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert near(found[name], value, equal_nan=True), (where, name)


@at_some_names
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "autograd"])
def test_an_edit_in_place_does_what_a_returned_one_does(
    seed: int, gradients: bool, n_names: int
) -> None:
    """At every hook point; no other activation, cache, weight or input changes with it."""
    model = model_with_keys(seed).requires_grad_(gradients)
    inputs = small_inputs(model, seed, images=(1, 2))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    pixels = inputs.pixel_values.clone()
    plain = model(inputs)
    # Parts of one product; what autograd, a weight and other hook points hold.
    names = ["blocks.0.attn.hook_v", "blocks.1.ln1.hook_scale", "vision.hook_pos_embed"]
    names += ["blocks.1.hook_resid_pre", *some_names(model, n_names)]
    with torch.set_grad_enabled(gradients):
        for name in names:
            expected = everything(model, inputs, name, returns)
            assert not near(expected["logits"], plain), name
            assert_equal(everything(model, inputs, name, edits_in_place), expected, name)
            after, before = (expected[f"{when} {name}"] for when in ("after", "before"))
            assert torch.equal(after, half_and_more(before))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(inputs.pixel_values, pixels)


def test_an_edit_in_place_leaves_the_callers_residual_stream(seed: int) -> None:
    model = small_model(seed)
    resid = model(small_inputs(model, seed), stop_at_layer=1)
    before = resid.clone()
    hooks = [("blocks.1.hook_resid_pre", edits_in_place)]
    model.run_with_hooks(resid, start_at_layer=1, fwd_hooks=hooks)
    assert torch.equal(resid, before)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "autograd"])
def test_edits_in_place_in_branches(seed: int, gradients: bool) -> None:
    """At every site, also of the tower; the recording stays as it is."""
    model = any_family(seed, n_layers=3).double()
    inputs = small_inputs(model, seed, images=(1,))
    recording = model.record(inputs)
    kept = [tensor.clone() for tensor in recording.resid]
    amount = torch.full((), 0.1, dtype=torch.double, requires_grad=gradients)

    def in_place(x: Tensor, hook: Any) -> None:
        x.mul_(0.5).add_(amount * torch.arange(x.shape[-1]))

    def returned(x: Tensor, hook: Any) -> Tensor:
        return x * 0.5 + amount * torch.arange(x.shape[-1])

    for tower in ("", "vision."):
        for site in LAYERED_SITES:
            if f"{tower}{hook_name(site, 1)}" not in model.hook_dict:
                continue
            layer, positions = random.randrange(2), random.choice([None, [0], [2, 1]])
            found = []
            for hook in (in_place, returned):
                branch = [Intervention(tower + site, layer, positions, hook)]
                with torch.set_grad_enabled(gradients):
                    changed = recording.run([branch], lambda logits: logits.log_softmax(-1))
                found.append([changed])
                if gradients:
                    found[-1] += torch.autograd.grad(changed[..., 5].sum(), amount)
            for ours, expected in zip(*found, strict=True):
                assert near(ours, expected), (tower, site)
    assert all(map(torch.equal, recording.resid, kept))


def test_edits_in_place_of_parts_of_one_product(seed: int) -> None:
    """As on GPUs, where gate and input are halves of one tensor; meta tensors have no values."""
    model = small_model(seed, gated_mlp=True)
    mlp = MLP(model.cfg).to("meta")
    x = torch.empty(2, 3, model.cfg.d_model, device="meta", requires_grad=True)
    for point in (mlp.hook_pre, mlp.hook_pre_linear, mlp.hook_post):
        point.add_hook(edits_in_place)
    mlp(x).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_edits_in_place_by_torchs_own_hooks(seed: int) -> None:
    """Also where what follows is a fused kernel's unless a hook may have edited something."""
    model = small_model(seed)
    inputs = small_inputs(model, seed)

    def after(module: nn.Module, given: Any, output: Tensor) -> None:
        output.copy_(half_and_more(output))

    def before(module: nn.Module, given: Any) -> None:
        given[0].copy_(half_and_more(given[0]))

    sites = ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result", "ln1.hook_scale"]
    for name in [f"blocks.0.{site}" for site in [*sites, "ln1.hook_normalized"]]:
        expected = model.run_with_hooks(inputs, fwd_hooks=[(name, returns)])
        point = model.hook_dict[name]
        for register in (
            lambda point=point: point.register_forward_hook(after),
            lambda point=point: point.register_forward_pre_hook(before),
        ):
            with register():
                assert torch.allclose(model(inputs), expected, atol=1e-5), name
                cached, _ = model.run_with_cache(inputs, names_filter=name)
            assert torch.allclose(cached, expected, atol=1e-5), name


@torch.no_grad()
def test_an_activation_function_that_changes_nothing(seed: int) -> None:
    """Then gate and activated gate are one tensor, which the product must not overwrite."""
    model = small_model(seed, gated_mlp=True)
    x = torch.randn(2, 3, model.cfg.d_model)
    mlp = model.blocks[0].mlp
    mlp.act = nn.Identity()
    gate: list[Tensor] = []
    mlp.hook_pre.add_hook(reading(lambda pre, hook: gate.append(pre)))
    mlp(x)
    expected = x @ mlp.W_gate
    if mlp.b_gate is not None:
        expected += mlp.b_gate
    assert torch.allclose(gate[0], expected, atol=1e-5)


# What a hook function returns


@torch.no_grad()
def test_another_shape_is_refused(seed: int) -> None:
    """At every hook point, however the function got there; the error names both shapes."""
    model = any_family(seed, n_layers=2)
    inputs = small_inputs(model, seed, images=(1, 2))
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: True)
    plain = model(inputs)
    for name in model.hook_dict:
        cut = random.choice(
            [lambda x: x[..., :1], lambda x: x[None], lambda x: x.sum(), lambda x: x[:, :1]]
        )
        given, returned = tuple(cache[name].shape), tuple(cut(cache[name]).shape)
        if given == returned:
            continue
        hook = lambda x, hook, cut=cut: cut(x)  # noqa: E731
        with pytest.raises(ValueError) as error:
            model.run_with_hooks(inputs, fwd_hooks=[(name, hook)])
        for part in (name, str(given), str(returned), "None"):
            assert part in str(error.value)
        for add in (model.add_hook, model.add_perma_hook):
            add(name, hook)
            with pytest.raises(ValueError, match="was given"):
                model(inputs)
            model.reset_hooks(including_permanent=True)
        value = random.choice([1.0, (cache[name],), cache[name].numpy()])
        hook = lambda x, hook, value=value: value  # noqa: E731
        with pytest.raises(TypeError, match=f"{name}.* returned (float|tuple|ndarray)"):
            model.run_with_hooks(inputs, fwd_hooks=[(name, hook)])
    assert torch.equal(model(inputs), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@torch.no_grad()
def test_another_dtype_is_refused(seed: int, dtype: torch.dtype) -> None:
    """At every hook point, however the function got there; the error names both dtypes."""
    model = any_family(seed, n_layers=2).to(dtype)
    inputs = small_inputs(model, seed, images=(1, 2))
    _, cache = model.run_with_cache(inputs, names_filter=lambda name: True)
    plain = model(inputs)
    for name in model.hook_dict:
        given = cache[name].dtype
        others = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.long}
        other = random.choice(sorted(others - {given}, key=str))
        hook = lambda x, hook, other=other: x.to(other)  # noqa: E731
        expected = f"{name}: the hook function was given {given} and returned {other};"
        with pytest.raises(ValueError) as error:
            model.run_with_hooks(inputs, fwd_hooks=[(name, hook)])
        assert expected in str(error.value) and "the same shape and dtype" in str(error.value)
        for add in (model.add_hook, model.add_perma_hook):
            add(name, hook)
            with pytest.raises(ValueError, match=expected):
                model(inputs)
            model.reset_hooks(including_permanent=True)
    assert torch.equal(model(inputs), plain)


@pytest.mark.parametrize(
    ("site", "layer"), [("mlp_out", 0), ("z[0]", 1), ("vision.z", 0), ("embed", None)]
)
@torch.no_grad()
def test_an_intervention_refuses_another_dtype(seed: int, site: str, layer: int | None) -> None:
    model = small_model(seed).to(torch.bfloat16)
    inputs = small_inputs(model, seed)
    edit = Intervention(site, layer, [1], lambda x, hook: x.float())
    expected = r"hook_\w+: .* given torch\.bfloat16 and returned torch\.float32"
    with pytest.raises(ValueError, match=expected):
        plain_run(model, inputs, [edit])
    with pytest.raises(ValueError, match=expected):
        model.record(inputs).run([[edit]], lambda logits: logits)


@torch.no_grad()
def test_learnt_positions_may_become_one_row_for_each_image(seed: int) -> None:
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(1, 1))
    rows = torch.randn(2, *model.vision.W_pos.shape)
    both = model.run_with_hooks(
        inputs, fwd_hooks=[("vision.hook_pos_embed", lambda x, hook: x + rows)]
    )
    for index in range(2):
        hooks = [("vision.hook_pos_embed", lambda x, hook, i=index: x + rows[i])]
        alone = model.run_with_hooks(inputs, fwd_hooks=hooks)
        assert torch.allclose(both[index], alone[index], atol=1e-4)


# Modules in a hook point's place


class Autoencoder(nn.Module):
    """As those of SAE libraries: with hook points of its own, and another width inside."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_sae_input = transformer_lens.hook_points.HookPoint()
        self.hook_sae_acts_post = transformer_lens.hook_points.HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        acts = self.hook_sae_acts_post(torch.cat([self.hook_sae_input(x), x], dim=-1))
        return half_and_more(acts[..., : x.shape[-1]])


def put(model: Any, name: str, module: nn.Module) -> None:
    """As HookedSAETransformer does."""
    model.set_submodule(name, module)
    model.setup()


@at_some_names
@torch.no_grad()
def test_a_module_in_a_hook_points_place_is_used(seed: int, n_names: int) -> None:
    """At every hook point, in every kind of run: as a hook that does the same."""
    model = model_with_keys(seed)
    inputs = small_inputs(model, seed, images=(1, 0))
    last = inputs.n_pos - 1
    edit = Intervention("resid_post", 0, [last], scale(0.5))
    plain = model(inputs)
    # Where kernels are fused, and what a recording holds, among others.
    fused = ["blocks.0.ln1.hook_normalized", "blocks.1.attn.hook_result", "blocks.1.attn.hook_v"]
    fused += ["blocks.0.attn.hook_attn_scores", "vision.blocks.0.attn.hook_pattern"]
    for name in {*fused, *some_names(model, n_names)}:
        expected = model.run_with_hooks(inputs, fwd_hooks=[(name, returns)])
        with model.hooks(fwd_hooks=[(name, returns)]):
            both = plain_run(model, inputs, [edit])[:, -1]
        assert not near(expected, plain), name
        put(model, name, Autoencoder())
        assert listens(model)
        recording = model.record(inputs)
        if name != hook_name("resid_post", 0):
            branch = recording.run([[edit]], lambda logits: logits[:, 0])[0]
            assert near(branch, both), name
        cached, cache = model.run_with_cache(inputs)
        inner = f"{name}.hook_sae_acts_post"
        assert cache[inner].shape[-1] == 2 * cache[f"{name}.hook_sae_input"].shape[-1]
        for run in (model(inputs), cached, recording.logits(range(inputs.n_pos))):
            assert near(run, expected), name
        put(model, name, transformer_lens.hook_points.HookPoint())
        assert not listens(model) and torch.equal(model(inputs), plain)


@torch.no_grad()
def test_what_follows_from_a_recording_has_what_the_module_gave(seed: int) -> None:
    """The keys and values that a recording holds are the module's."""
    model = small_model(seed, n_layers=2).double()
    inputs = small_inputs(model, seed, images=(1,))
    for site in ("v", "rot_k", "resid_pre"):
        name = hook_name(site, 1)
        put(model, name, Autoencoder())
        past, token = model.record(inputs).past, torch.tensor([[5]])
        longer = model.inputs_from_tokens(
            torch.cat([inputs.tokens, token], dim=1), inputs.pixel_values
        )
        continued = model(token, past_kv_cache=past)[:, -1]
        assert near(continued, model(longer)[:, -1]), site
        put(model, name, transformer_lens.hook_points.HookPoint())


@torch.no_grad()
def test_nobody_asks_nothing_is_written_down(seed: int, monkeypatch: Any) -> None:
    """Scores are computed in the layers where something listens to them, and in no other."""
    model = small_model(seed, n_layers=3)
    inputs = small_inputs(model, seed)
    computed = []
    scores = past_module.attention_scores
    monkeypatch.setattr(
        past_module, "attention_scores", lambda *given: computed.append(1) or scores(*given)
    )
    unasked = [n for n in model.hook_dict if not n.endswith(("hook_attn_scores", "hook_pattern"))]
    model(inputs)
    model.run_with_cache(inputs, names_filter=unasked)
    assert not computed
    model.run_with_cache(inputs, names_filter=hook_name("pattern", 1))
    assert len(computed) == 1
    put(model, hook_name("attn_scores", 2), Autoencoder())
    model(inputs)
    assert len(computed) == 2
