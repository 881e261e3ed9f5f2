"""ROME, MEMIT, fine-tuning and LoRA against their formulas and against torch."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import BOS, any_family, small_inputs, small_model, worded_model
from torch import Tensor

from mmlens import EditRequest, Intervention
from mmlens.editing import (
    METHODS,
    KeyCovariance,
    constrained_fine_tune,
    fine_tune,
    key_covariance,
    lora,
    memit,
    rome,
)
from mmlens.editing.fine_tuning import matrices_of
from mmlens.editing.rome import memit_update, rank_one, with_ridge
from mmlens.editing.value import record_prompts
from mmlens.interventions.functions import add
from mmlens.interventions.intervention import hook_name

SEEDS = st.integers(0, 2**31 - 1)


def request_for(model, seed: int, target: int = 5, n_prompts: int = 1) -> EditRequest:
    prompts = []
    for index in range(n_prompts):
        text = small_inputs(model, seed + index).span("text").tolist()
        at = random.Random(seed).randrange(len(text) - 1)
        prompts.append(small_inputs(model, seed + index, spans={"constraint": text[: at + 1]}))
    return EditRequest(prompts[0], target, key_prompts=prompts[1:])


def weights(model) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_untouched(model, before: dict[str, Tensor]) -> None:
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    for name, weight in now.items():
        assert torch.equal(weight, before[name]), name
        assert weight.grad is None and not weight.requires_grad


def moment(d_mlp: int, generator: torch.Generator) -> Tensor:
    """A covariance whose condition number is about ten."""
    keys = torch.randn(d_mlp, 8 * d_mlp, generator=generator, dtype=torch.float64)
    return keys @ keys.T / keys.shape[1]


# ROME and MEMIT


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 9), st.integers(1, 17))
def test_rome_is_the_published_formula(seed, d_model, d_mlp):
    """Lambda (C^-1 k)^T with Lambda = (v - W k) / (C^-1 k)^T k, here with the inverse itself."""
    chance = torch.Generator().manual_seed(seed)
    c = moment(d_mlp, chance)
    key = torch.randn(d_mlp, generator=chance, dtype=torch.float64)
    residual = torch.randn(d_model, generator=chance, dtype=torch.float64)
    direction = c.inverse() @ key
    expected = torch.outer(residual / (direction @ key), direction)
    found = rank_one(key, residual, c)
    torch.testing.assert_close(found.dense(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.dense() @ key, residual, rtol=1e-9, atol=1e-12)


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 9), st.integers(1, 17), st.integers(1, 6))
def test_memit_is_the_published_formula(seed, d_model, d_mlp, n):
    """R K^T (C + K K^T)^-1."""
    chance = torch.Generator().manual_seed(seed)
    c = moment(d_mlp, chance)
    keys = torch.randn(d_mlp, n, generator=chance, dtype=torch.float64)
    residuals = torch.randn(d_model, n, generator=chance, dtype=torch.float64)
    expected = residuals @ keys.T @ (c + keys @ keys.T).inverse()
    found = memit_update(residuals, keys, c)
    assert found.left.shape == (d_model, n)
    torch.testing.assert_close(found.dense(), expected, rtol=1e-9, atol=1e-12)


def covariance_of(model, layers: list[int], seed: int) -> KeyCovariance:
    generator = torch.Generator().manual_seed(seed)
    moments = torch.stack([moment(model.cfg.d_mlp, generator) for _ in layers])
    return KeyCovariance(moments, tuple(layers), 100, "")


@settings(max_examples=8)
@given(SEEDS)
def test_rome_edits_the_key_to_its_value(seed):
    """At the key, the edited MLP gives the optimised value exactly, whatever the covariance."""
    model = any_family(seed).double()
    layer = random.Random(seed).randrange(model.cfg.n_layers)
    request = request_for(model, seed)
    before = weights(model)
    covariance = covariance_of(model, [layer], seed)
    edit = rome(model, request, layer=layer, covariance=covariance, steps=3, stop_at=2.0)
    assert_untouched(model, before)
    site, at = hook_name("mlp_out", layer), request.position(request.inputs)
    _, plain = model.run_with_cache(request.inputs, names_filter=site)
    with edit.applied(model):
        _, edited = model.run_with_cache(request.inputs, names_filter=site)
    [part] = record_prompts(model, request, [hook_name("post", layer), site])
    [key] = part.at_positions("post", layer)
    delta = next(iter(edit.deltas.values()))
    moved = edited[site][0, at] - plain[site][0, at]
    torch.testing.assert_close(moved, delta.dense() @ key, rtol=1e-6, atol=1e-9)
    direction = with_ridge(covariance.at(layer), 1e-4).inverse() @ key
    torch.testing.assert_close(delta.right[0], direction, rtol=1e-6, atol=1e-9)
    assert edit.metadata["settings"]["covariance_tokens"] == 100


def test_memit_reaches_the_stream_that_it_aims_at(seed: int) -> None:
    """With a covariance that hardly counts, the residual stream after the last layer is z."""
    model = any_family(seed, n_layers=4).double()
    requests = [request_for(model, seed), request_for(model, seed + 50, target=7)]
    before = weights(model)
    covariance = covariance_of(model, [1, 2], seed)
    options = {"steps": 2, "stop_at": 2.0, "covariance": covariance}
    edit = memit(model, requests, layer=[2, 1], weight=1e-9, **options)
    assert_untouched(model, before)
    assert sorted(edit.deltas) == ["blocks.1.mlp.down.weight", "blocks.2.mlp.down.weight"]
    assert edit.metadata["layer"] == [1, 2] and edit.metadata["target"] == [5, 7]
    # At the last layer the residual is what is left, and all of it.
    one = memit(model, requests[:1], layer=[2], weight=1e-9, **options)
    site, at = hook_name("resid_post", 2), requests[0].position(requests[0].inputs)
    _, plain = model.run_with_cache(requests[0].inputs, names_filter=site)
    with one.applied(model):
        _, edited = model.run_with_cache(requests[0].inputs, names_filter=site)
    residual = one.deltas["blocks.2.mlp.down.weight"].left[:, 0]
    moved = edited[site][0, at] - plain[site][0, at]
    torch.testing.assert_close(moved, residual, rtol=1e-5, atol=1e-6)


def test_the_covariance_is_that_of_the_keys(seed: int, tmp_path) -> None:
    model = any_family(seed, n_layers=3)
    prompts = [small_inputs(model, seed, images=(1, 0)), small_inputs(model, seed + 1)]
    found = key_covariance(model, prompts, [2, 0], cache=tmp_path / "c.safetensors")
    assert found.layers == (2, 0)
    for layer in (0, 2):
        keys = []
        for inputs in prompts:
            _, cache = model.run_with_cache(inputs, names_filter=hook_name("post", layer))
            counted = inputs.attention_mask & (inputs.tokens != BOS)
            keys.append(cache[hook_name("post", layer)][counted])
        stacked = torch.cat(keys).double()
        assert found.n_tokens == len(stacked)
        expected = stacked.T @ stacked / len(stacked)
        torch.testing.assert_close(found.at(layer).double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"of layers \[2, 0\], not of 1"):
        found.at(1)


def test_texts_may_speak_of_images(seed: int) -> None:
    model = worded_model(seed)
    found = key_covariance(model, ["Where <image> stands, there is none."], [1])
    plain = key_covariance(model, ["Where image stands, there is none."], [1])
    assert torch.equal(found.moments, plain.moments)


def test_the_covariance_is_kept_in_a_file(seed: int, tmp_path, monkeypatch) -> None:
    model, file = worded_model(seed), tmp_path / "covariance.safetensors"
    texts = ["Some words.", "And some more of them"]
    first = key_covariance(model, texts, [1], cache=file)
    monkeypatch.setattr("mmlens.editing.covariance.add_moments", None)  # is not called again
    again = key_covariance(model, texts, [1], cache=file)
    assert torch.equal(first.moments, again.moments) and again.n_tokens == first.n_tokens
    monkeypatch.undo()
    other = key_covariance(model, [*texts, "a third"], [1], cache=file)
    assert other.n_tokens > first.n_tokens
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] += 1
    assert key_covariance(model, [*texts, "a third"], [1], cache=file).source != other.source
    with pytest.raises(ValueError, match="no texts"):
        key_covariance(model, [], [1])


def test_a_file_is_not_of_other_weights_below_nor_of_another_mask(seed: int, tmp_path) -> None:
    """Whatever changes the keys, the file's covariance is not taken for theirs."""
    model, file = small_model(seed, n_layers=3), tmp_path / "covariance.safetensors"
    inputs = small_inputs(model, seed)

    def check() -> None:
        found = key_covariance(model, [inputs], [2], cache=file)
        assert torch.equal(found.moments, key_covariance(model, [inputs], [2]).moments)

    check()
    before = key_covariance(model, [inputs], [2]).moments
    names = ["embed.W_E", "blocks.0.mlp.down.weight", "blocks.2.attn.o.weight"]
    names += ["vision.blocks.0.attn.qkv.weight"]
    for name in names:
        weight = model.get_parameter(name)
        with torch.no_grad():
            weight[int(inputs.tokens[0, -1]) if name == "embed.W_E" else 0] += 1.0
        check()
        after = key_covariance(model, [inputs], [2]).moments
        assert not torch.equal(before, after)
        before = after
    for name in ("blocks.2.mlp.down.weight", "ln_final.w"):  # which no key depends on
        with torch.no_grad():
            model.get_parameter(name).add_(1.0)
    source = key_covariance(model, [inputs], [2]).source
    assert source == KeyCovariance.load(file).source
    tokens = torch.tensor([[0, BOS, *random.choices(range(2, 60), k=6)]])
    for real in (1, 0):  # token 0 as a word, and as padding
        mask = torch.tensor([[real] + [1] * 7])
        inputs = model.inputs_from_tokens(tokens, attention_mask=mask)
        check()


def test_a_damaged_file_of_the_covariance_is_written_anew(seed: int, tmp_path) -> None:
    model, file = worded_model(seed), tmp_path / "covariance.safetensors"
    first = key_covariance(model, ["Some words."], [1], cache=file)
    content = file.read_bytes()
    place = len(content) - 1 - seed % (first.moments.nbytes - 1)  # any byte of the numbers
    flipped = content[:place] + bytes([content[place] ^ 1 << seed % 8]) + content[place + 1 :]
    for damaged in (flipped, content[:-1], b"", b"something else"):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="covariance.safetensors .* computed anew"):
            again = key_covariance(model, ["Some words."], [1], cache=file)
        assert torch.equal(again.moments, first.moments)
        assert file.read_bytes() == content


# Fine-tuning


@settings(max_examples=8)
@given(SEEDS, st.sampled_from([None, 1e-3, 0.02]))
def test_fine_tuning_is_adam_on_the_weights(seed, bound):
    """In float64, against torch on a copy of the model, with clamping where there is a bound."""
    model = any_family(seed).double()
    layer = random.Random(seed).randrange(model.cfg.n_layers)
    requests = [request_for(model, seed, n_prompts=2), request_for(model, seed + 9, target=8)]
    before = weights(model)
    options = {"layer": layer, "lr": 0.01, "steps": 4, "stop_at": 2.0}
    if bound is None:
        edit = fine_tune(model, requests, **options)
    else:
        edit = constrained_fine_tune(model, requests, bound=bound, **options)
    assert_untouched(model, before)
    n_matrices = 4 + model.cfg.gated_mlp
    assert len(edit.deltas) == n_matrices and all(
        f"blocks.{layer}." in name for name in edit.deltas
    )

    other = copy.deepcopy(model).requires_grad_(False)
    trained = [other.get_parameter(name).requires_grad_(True) for name in edit.deltas]
    optimiser = torch.optim.Adam(trained, lr=0.01)
    for _ in range(4):
        losses = [
            -other(inputs)[0, -1].log_softmax(-1)[request.target]
            for request in requests
            for inputs in request.prompts
        ]
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()
        optimiser.step()
        if bound is not None:
            with torch.no_grad():
                for name, weight in zip(edit.deltas, trained, strict=True):
                    weight.copy_(before[name] + (weight - before[name]).clamp(-bound, bound))
    for name, weight in zip(edit.deltas, trained, strict=True):
        # Adam divides by the gradient's size + 1e-8, which is far above rounding.
        moved = (weight - before[name]).detach()
        torch.testing.assert_close(edit.deltas[name], moved, rtol=0, atol=1e-6)
    largest = max(float(delta.abs().max()) for delta in edit.deltas.values())
    assert largest > 0
    assert bound is None or largest <= bound


def test_fine_tuning_stops_early_and_says_what_it_did(seed: int) -> None:
    model = small_model(seed, n_layers=3)
    request = request_for(model, seed)
    edit = fine_tune(model, request, layer=[0, 2], modules=["mlp.down"], stop_at=0.0)
    assert sorted(edit.deltas) == ["blocks.0.mlp.down.weight", "blocks.2.mlp.down.weight"]
    assert not any(delta.any() for delta in edit.deltas.values())
    assert edit.metadata["layer"] == [0, 2] and edit.metadata["settings"]["stop_at"] == 0.0
    probability = float(model(request.inputs)[0, -1].softmax(-1)[5])
    assert edit.metadata["probability"] == pytest.approx([probability], rel=1e-4)
    everything = fine_tune(model, request, steps=1, stop_at=2.0)
    assert len(everything.deltas) == 3 * (4 + model.cfg.gated_mlp)
    for wrong in ({"modules": ["W_out"]}, {"layer": 3}, {"steps": 0}):
        with pytest.raises(ValueError, match="modules|layers|steps"):
            fine_tune(model, request, **wrong)
    with pytest.raises(ValueError, match="bound=0"):
        constrained_fine_tune(model, request, bound=0)


def test_half_precision_is_trained_in_float32(seed: int) -> None:
    """A step far below bfloat16's resolution is kept in the edit."""
    model = small_model(seed, n_layers=2).to(torch.bfloat16)
    edit = fine_tune(model, request_for(model, seed), layer=0, lr=1e-7, steps=3, stop_at=2.0)
    assert all(delta.dtype == torch.float32 for delta in edit.deltas.values())
    assert 0 < max(float(delta.abs().max()) for delta in edit.deltas.values()) < 1e-6


# LoRA


def test_lora_is_what_peft_computes(seed: int) -> None:
    """The edited model gives the probability that was trained, and nothing of peft stays after."""
    pytest.importorskip("peft")
    model = any_family(seed, n_layers=3)
    request = request_for(model, seed, n_prompts=2)
    before, modules = weights(model), dict(model.named_modules())
    options = {"rank": 3, "alpha": 5.0, "lr": 0.05, "steps": 3, "stop_at": 2.0}
    options["modules"] = matrices_of(model)  # those of the MLP, too
    edit = lora(model, request, layer=[0, 2], **options)
    assert_untouched(model, before)
    assert dict(model.named_modules()) == modules and not hasattr(model, "peft_config")
    assert len(edit.deltas) == 2 * len(options["modules"]) >= 8
    assert all(delta.left.shape[1] == 3 and delta.left.any() for delta in edit.deltas.values())
    with edit.applied(model):
        found = [float(model(inputs)[0, -1].softmax(-1)[5]) for inputs in request.prompts]
    assert edit.metadata["probability"] == pytest.approx(found, rel=1e-3, abs=1e-6)
    same = lora(model, request, layer=[0, 2], **options)
    for name, delta in edit.deltas.items():
        assert torch.equal(same.deltas[name].right, delta.right)


def test_lora_without_peft_says_what_to_install(seed: int, monkeypatch) -> None:
    model = small_model(seed)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'mmlens\[edit\]'"):
        lora(model, request_for(model, seed))
    with pytest.raises(ValueError, match="a layer has attn.qkv, attn.o, "):
        lora(model, request_for(model, seed), modules=["mlp.in"])


def test_every_method_is_called_alike(seed: int) -> None:
    model = small_model(seed, n_layers=2)
    request = request_for(model, seed)
    covariance = covariance_of(model, [1], seed)
    before = weights(model)
    for name, method in METHODS.items():
        if name == "lora":
            pytest.importorskip("peft")
        extra = {"covariance": covariance} if name in ("rome", "memit") else {}
        if name in ("alphaedit", "in_context"):  # these ask other questions about the same image
            steps = {"steps": 2} if name == "alphaedit" else {}
            with pytest.raises(ValueError, match="text of this prompt is not|token id|a text"):
                method(model, request, layer=1, **steps)
            continue
        for requests in (request, [request, request_for(model, seed + 1, target=6)]):
            edit = method(model, requests, layer=1, steps=2, **extra)
            assert edit.metadata["method"] == name
            assert len(edit.metadata["requests"]) == (1 if requests is request else 2)
            with edit.applied(model):
                assert model(request.inputs).isfinite().all()
            assert_untouched(model, before)
        where = Intervention("mlp_out", 1, None, add(0.0)).fwd_hooks()
        assert model.run_with_hooks(request.inputs, fwd_hooks=where).isfinite().all()
