"""Methods that are told the same references: AlphaEdit, ROME, MEMIT, fine-tuning and LoRA."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import picture, worded_model

from mmlens import Edit, EditRequest
from mmlens.editing import References, alphaedit, fine_tune, in_context, lora, memit, rome
from mmlens.editing.alphaedit import null_space, projected
from mmlens.editing.descent import replayed_to_layer
from mmlens.editing.multedit import down_weight
from mmlens.editing.reference_keys import all_reference_keys
from mmlens.editing.rome import rank_one, with_ridge
from mmlens.editing.solve import LeastSquares
from mmlens.interventions.intervention import hook_name
from mmlens.utils.divergence import divergence
from mmlens.utils.grad_mode import without_gradients

SEEDS = st.integers(0, 2**31 - 1)
BRIEF = {"steps": 2, "stop_at": 2.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLENS_CACHE", str(tmp_path / "cache"))


def a_request(model, seed: int) -> EditRequest:
    inputs = model.prepare("what is this one?", picture(seed), spans={"constraint": "this"})
    return EditRequest(inputs, "an answer")


def some_references(seed: int) -> References:
    images = tuple(picture(seed + 1 + i) for i in range(3))
    return References(images, ("how many?", "who?", "when?"), ("one and one is",))


@without_gradients
def every_key(model, request: EditRequest, references: References, layer: int):
    """Of all kept references, at all positions but BOS; the image's once for each image."""
    name, found, last = hook_name("post", layer), [], None
    for each in references.kept.around(model, request):
        _, cache = model.run_with_cache(each.inputs, names_filter=name)
        wanted = torch.ones(each.inputs.n_pos, dtype=torch.bool)
        wanted[each.inputs.spans[0].get("bos", [])] = False
        if each.kind == "unrelated" and each.image == last:
            wanted &= ~each.inputs.is_image[0]
        if each.kind == "unrelated":
            last = each.image
        found.append(cache[name][0, wanted])
    return torch.cat(found)


@settings(max_examples=30)
@given(SEEDS, st.integers(1, 7), st.integers(6, 15), st.integers(1, 4), st.integers(0, 3))
def test_alphaedit_is_the_published_formula(seed, d_model, d_mlp, n, n_earlier):
    """R K1^T P (Kp Kp^T P + K1 K1^T P + I)^-1, with the inverse itself, in float64."""
    chance = torch.Generator().manual_seed(seed)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=chance, dtype=torch.float64)

    rank = random.Random(seed).randint(1, d_mlp - 1)
    k0 = drawn(d_mlp, rank) @ drawn(rank, 40)
    basis = null_space(k0, 1e-9)
    assert basis.shape == (d_mlp, d_mlp - rank)
    p = basis @ basis.T
    torch.testing.assert_close(p @ k0, torch.zeros_like(k0), atol=1e-9 * float(k0.norm()), rtol=0)
    k1, kp, r = drawn(d_mlp, n), drawn(d_mlp, n_earlier), drawn(d_model, n)
    inside = kp @ kp.T @ p + k1 @ k1.T @ p + torch.eye(d_mlp, dtype=torch.float64)
    expected = r @ k1.T @ p @ inside.inverse()
    columns = [projected(each, basis) for each in k1.split(1, dim=1)]
    found = LeastSquares(columns, 1.0, projected(kp, basis)).update(r).dense()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_alphaedit_does_nothing_to_references(seed: int) -> None:
    """|delta K| <= |delta| |P K|, and the eigenvalues that P leaves sum to threshold * |K|^2."""
    model = worded_model(seed, n_layers=3, d_mlp=397).double()
    request, references = a_request(model, seed), some_references(seed)
    threshold = 1e-9
    edit = alphaedit(model, request, layer=1, references=references, threshold=threshold, **BRIEF)
    delta = edit.deltas[down_weight(1)].dense()
    keys = every_key(model, request, references, 1)
    # A key of the request's own image stands here up to once a question, among references once.
    bound = (len(keys) * threshold) ** 0.5 * float(keys.norm())
    assert 0 < float((delta @ keys.T).norm()) <= bound * float(delta.norm())
    [key] = edit.keys[down_weight(1)].T
    plain = torch.outer(delta @ key, key)  # of the same value, without the projection
    assert float((plain @ keys.T).norm()) > 10 * bound * float(plain.norm())
    assert edit.check().kind[0] == "the edit"
    with pytest.raises(ValueError, match="give references"):
        alphaedit(model, request, layer=1, references=None)
    with pytest.raises(ValueError, match="no direction free"):
        alphaedit(model, request, layer=1, references=references, threshold=-1.0)


def test_rome_and_memit_take_references_for_a_corpus(seed: int) -> None:
    """Their covariance is E[k k^T] over the references' keys, from plain runs in float64."""
    model = worded_model(seed, n_layers=3).double()
    request, references = a_request(model, seed), some_references(seed)
    keys = every_key(model, request, references, 1)
    found = all_reference_keys(model, [request], references, 1)
    # The request's own image is among them once, whatever is asked about it.
    second = found @ found.T / found.shape[1]
    assert found.shape[1] <= len(keys)
    edit = rome(model, request, layer=1, references=references, **BRIEF)
    delta = edit.deltas[down_weight(1)]
    name = hook_name("post", 1)
    with torch.no_grad():
        _, cache = model.run_with_cache(request.inputs, names_filter=name)
    key = cache[name][0, request.position(request.inputs)]
    residual = delta.dense() @ key
    expected = rank_one(key, residual, with_ridge(second, 1e-4)).dense()
    torch.testing.assert_close(delta.dense(), expected, rtol=1e-6, atol=1e-9)
    spread = memit(model, request, layer=[0, 1], references=references, weight=3.0, **BRIEF)
    assert {*spread.deltas} == {down_weight(0), down_weight(1)}
    for method in (rome, memit):
        with pytest.raises(ValueError, match="either a covariance"):
            method(model, request, layer=1, **BRIEF)


def test_divergence_is_torch_s(seed: int) -> None:
    before, after = torch.randn(2, 31, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(divergence(before.log_softmax(-1), after.log_softmax(-1)), expected)


@pytest.mark.parametrize("method", [fine_tune, lora])
def test_training_that_replays_references_moves_them_less(seed: int, method) -> None:
    """With a large weight on their divergence, it is a part of what it is without them."""
    model = worded_model(seed, n_layers=2)
    request, references = a_request(model, seed), some_references(seed)
    brief = {"layer": 1, "lr": 0.02, "steps": 12, "stop_at": 2.0}

    def drift(edit: Edit) -> float:
        replayed = replayed_to_layer(model, [request], references, 1)
        with torch.no_grad(), edit.applied(model):
            found = [
                divergence(each.before, model(each.inputs)[0, -1].double().log_softmax(-1))
                for each in replayed
            ]
        return float(torch.stack(found).sum())

    free = method(model, request, **brief)
    bound = method(model, request, references=references, kl_weight=100.0, replayed=12, **brief)
    assert drift(bound) <= 0.5 * drift(free)
    assert bound.metadata["settings"]["references"] > 3
    assert free.metadata["settings"]["references"] == 0


def test_demonstrations_stand_before_every_question(seed: int) -> None:
    """Prompts in the block are what `prepare` makes of both; after it, they are as before."""
    model = worded_model(seed)
    request, references = a_request(model, seed), some_references(seed)
    edit = in_context(model, request, references=references, n_stay=1)
    first, new, fact = edit.demonstrations.removesuffix("\n").rsplit("\n", 2)
    assert fact == "what is this one? an answer." and new == f"New fact: {fact}"
    assert first.startswith("how many? ")
    expected = model.prepare(edit.demonstrations + "who?", picture(seed))
    plain = model.prepare("who?", picture(seed), spans={"asked": (0, 3), "same": "who"})
    with edit.applied(model):
        found = model.prepare("who?", picture(seed), spans={"asked": (0, 3), "same": "who"})
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.span("asked"), found.span("same"))
    n = found.n_pos - plain.n_pos
    assert (found.span("asked") - plain.span("asked") == n).all()
    assert torch.equal(model.prepare("who?", picture(seed)).tokens, plain.tokens)
    with pytest.raises(ValueError, match="no weights"):
        edit.apply(model)
    with pytest.raises(ValueError, match="evaluate"):
        edit.check()
    with pytest.raises(ValueError, match="a text"):
        in_context(model, replace(request, target=5))


def test_demonstrations_within_demonstrations(seed: int) -> None:
    """An inner block's come after the outer one's; after it, those of the outer block stay."""
    model = worded_model(seed)
    request, plain = a_request(model, seed), model.prepare("who?").texts[0]
    outer, inner = (in_context(model, replace(request, target=to)) for to in ("one", "two"))
    assert outer.demonstrations != inner.demonstrations
    with outer.applied(model):
        expected = model.prepare("who?").texts[0]
        assert outer.demonstrations in expected
        with inner.applied(model):
            both = model.prepare("who?").texts[0]
            assert outer.demonstrations + inner.demonstrations + "who?" in both
        assert model.prepare("who?").texts[0] == expected
    assert model.prepare("who?").texts[0] == plain
    assert "prepare" not in vars(model)


def test_spans_of_a_list_of_questions_come_after_the_demonstrations(seed: int) -> None:
    model = worded_model(seed)
    edit = in_context(model, a_request(model, seed))
    questions, spans = ["Hello big world", "who?", "so?"], [{"asked": (6, 9)}, {"asked": "who"}]
    with edit.applied(model):
        alone = [model.prepare(*each) for each in zip(questions, [None] * 3, strict=True)]
        found = model.prepare(questions, spans=[*spans, None])
        same = model.prepare(["Hello big world"], spans={"asked": (6, 9)})
    for inputs, row, phrase in ((found, 0, "big"), (found, 1, "who"), (same, 0, "big")):
        begin, end = inputs.char_spans[row]["asked"]
        assert inputs.texts[row][begin:end] == phrase
    assert "asked" not in found.char_spans[2]
    assert [each.texts[0] for each in alone] == list(found.texts)
