"""`patch`: metrics of cells, against a plain run of each and the metric's formula in float64."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from small_models import small_inputs, small_model, worded_model
from torch import Tensor

from mmlens import Intervention, Patched, noise_span, patch
from mmlens.analyses.metrics import check_metric
from mmlens.analyses.targets import given_answer
from mmlens.interventions.functions import restore, scale, zero
from mmlens.utils.divergence import divergence


def plain_logits(model: Any, inputs: Any, branch: Any) -> Tensor:
    """[row, pos, d_vocab]"""
    return model.run_with_hooks(inputs, interventions=branch)


def case(seed: int, samples: int = 0) -> tuple[Any, Any]:
    """A model in float64 and a prompt, perhaps with noise."""
    model = small_model(seed, n_layers=3).double()
    inputs = small_inputs(model, seed)
    pixels = inputs.pixel_values.double()
    inputs = model.inputs_from_tokens(inputs.tokens, pixels)
    if samples:
        inputs = noise_span(model, inputs, "text", samples=samples, seed=seed)
    return model, inputs


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("metric", ["probability", "logit_diff", "kl", "loss"])
def test_named_metrics(metric: Any, samples: int, seed: int) -> None:
    model, inputs = case(seed, samples)
    recording, n = model.record(inputs), inputs.n_pos
    answer, contrast = random.sample(range(2, 50), 2)
    cells = {
        (site, layer): [Intervention(site, layer, n - 1, scale(-0.5))]
        for site in ("mlp_out", "z[0]")
        for layer in range(3)
    }
    del cells["z[0]", 1]
    options = {"contrast": contrast} if metric == "logit_diff" else {}
    found = patch(recording, cells, metric, axes=("site", "layer"), answer=answer, **options)

    def measured(logits: Tensor) -> Tensor:
        log_probs, plain = logits[:, -1].log_softmax(-1), model(inputs)[:, -1].log_softmax(-1)
        return {
            "probability": log_probs[:, answer].exp(),
            "logit_diff": logits[:, -1, answer] - logits[:, -1, contrast],
            "kl": (plain.exp() * (plain - log_probs)).sum(-1),
            "loss": -log_probs[:, answer],
        }[metric].mean()

    base = float(measured(model(inputs)))
    assert found.baseline == pytest.approx(base, abs=1e-7)
    assert (found.axes, found.coordinates) == (("site", "layer"), (("mlp_out", "z[0]"), (0, 1, 2)))
    assert found.values.shape == (2, 3)
    assert bool(found.values[1, 1].isnan())
    for (site, layer), branch in cells.items():
        expected = float(measured(plain_logits(model, inputs, branch)))
        value = found.values[("mlp_out", "z[0]").index(site), layer]
        assert float(value) == pytest.approx(expected, abs=1e-7, rel=1e-7)
    assert float(found.effect[0, 0]) == pytest.approx(float(found.values[0, 0]) - found.baseline)
    table = found.to_dataframe()
    assert list(table.columns) == ["site", "layer", "value", "effect"]
    assert len(table) == len(cells)
    assert found.metric == metric


def test_an_answer_of_several_tokens(seed: int) -> None:
    """The metric reads where each of its tokens is predicted, after those before."""
    model = worded_model(seed, n_layers=3).double()
    inputs = model.prepare("a question")
    tokens = given_answer(model, inputs, "three tokens").tokens.tolist()
    assert len(tokens) > 1
    last = inputs.n_pos - 1
    cells = {layer: [Intervention("mlp_out", layer, last, zero())] for layer in range(3)}
    recording = model.record(inputs)
    found = patch(recording, cells, "probability", answer="three tokens")
    losses = patch(recording, cells, "loss", answer="three tokens")
    longer = inputs.append(torch.tensor(tokens[:-1]))
    for layer, branch in cells.items():
        log_probs = plain_logits(model, longer, branch)[0].log_softmax(-1)
        loss = -log_probs[range(last, last + len(tokens)), tokens]
        assert float(losses.values[layer]) == pytest.approx(float(loss.mean()), abs=1e-7)
        assert float(found.values[layer]) == pytest.approx(float((-loss.sum()).exp()), abs=1e-9)
    assert losses.answer == "three tokens"


def test_a_function_of_several_numbers(seed: int, tmp_path: Any) -> None:
    model, inputs = case(seed)

    def two(logits: Tensor) -> Tensor:
        return torch.stack([logits[:, 0, 3], logits[:, 1, 4]], dim=-1)

    at = [inputs.n_pos - 1, inputs.n_pos - 2]
    cells = {(layer,): [Intervention("mlp_out", layer, at, zero())] for layer in (2, 0)}
    recording = model.record(inputs)
    found = patch(recording, cells, two, positions=at, axes=["layer"])
    assert found.coordinates == ((2, 0),)
    for index, branch in enumerate(cells.values()):
        logits = plain_logits(model, inputs, branch)[0]
        assert torch.allclose(
            found.values[index], torch.stack([logits[at[0], 3], logits[at[1], 4]])
        )
    assert found.metric == "two"
    assert isinstance(found.baseline, tuple)
    assert len(found.to_dataframe()) == 4
    saved = Patched.load(found.save(tmp_path / "patched.safetensors"))
    assert torch.equal(saved.values, found.values)
    assert (saved.baseline, saved.coordinates) == (found.baseline, found.coordinates)
    assert torch.equal(saved.effect, found.effect)


def test_the_reference_of_kl(seed: int) -> None:
    """Restoring everything of another run leaves nothing of the divergence from it."""
    model, inputs = case(seed)
    tokens = inputs.tokens.clone()
    tokens[:, -2] = 2 + (tokens[:, -2] + 11) % 50
    tokens = torch.where(inputs.is_image, inputs.tokens, tokens)
    other = model.inputs_from_tokens(tokens, inputs.pixel_values)
    clean = model.record(inputs, sites=[("resid_post", range(3))])
    back = [Intervention("resid_post", 1, range(inputs.n_pos), restore(clean.cache))]
    none = [Intervention("resid_post", 1, 0, scale(1.0))]
    found = patch(model.record(other), {"back": back, "none": none}, "kl", reference=clean)
    assert float(found.values[0]) == pytest.approx(0.0, abs=1e-9)
    assert float(found.values[1]) == pytest.approx(found.baseline, abs=1e-9)
    if not torch.equal(tokens, inputs.tokens):
        assert found.baseline > 1e-9


@pytest.mark.parametrize("samples", [0, 2])
def test_a_reference_of_another_length(samples: int, seed: int) -> None:
    """Its own last position is read; its only row serves every row of the recording."""
    model, inputs = case(seed, samples)
    longer = case(seed)[1].append(torch.randint(2, 60, (1, 3)))
    recording, n = model.record(inputs), inputs.n_pos
    cells = {layer: [Intervention("mlp_out", layer, n - 1, scale(-0.5))] for layer in range(3)}
    expected = model(longer)[:, -1].log_softmax(-1)
    for answer in (None, 7):
        found = patch(recording, cells, "kl", reference=model.record(longer), answer=answer)
        values = [found.baseline, *found.values.tolist()]
        for value, branch in zip(values, [[], *cells.values()], strict=True):
            log_probs = plain_logits(model, inputs, branch)[:, -1].log_softmax(-1)
            kl = (expected.exp() * (expected - log_probs)).sum(-1).mean()
            assert value == pytest.approx(float(kl), rel=1e-9, abs=1e-9)


def test_an_answer_that_is_other_tokens_after_another_prompt(seed: int) -> None:
    """Those after the batch's first prompt were followed in every row."""
    model = worded_model(seed, "bytes")
    cells = {0: [Intervention("mlp_out", 0, None, zero())]}
    alike = model.record(model.prepare(["This country is", "x ="]))
    assert patch(alike, cells, answer="Rome").answer == "Rome"
    unlike = model.record(model.prepare(["This country is", "The answer: "]))
    with pytest.raises(ValueError, match="'Rome' is the tokens .* after 'This country is', and"):
        patch(unlike, cells, answer="Rome")
    assert patch(unlike, cells, answer=7).answer


def test_a_branch_that_breaks_has_no_divergence(seed: int) -> None:
    """NaN was taken for a divergence of 0, and an impossible token for none that was expected."""
    model, inputs = case(seed)
    recording, last = model.record(inputs), inputs.n_pos - 1
    cells = {"broken": [Intervention("mlp_out", 1, last, scale(float("nan")))]}
    with pytest.warns(RuntimeWarning, match="'kl' is NaN in 1 of 1 runs"):
        assert bool(patch(recording, cells, "kl").values.isnan().all())
    logits = torch.randn(3, 7, dtype=torch.double)
    logits[:, 2] = -torch.inf  # impossible in both
    expected, found = logits[:1].log_softmax(-1), logits.log_softmax(-1)
    there = [i for i in range(7) if i != 2]
    kl = torch.nn.functional.kl_div(
        found[1:, there], expected[:, there].expand(2, -1), log_target=True, reduction="none"
    )
    assert torch.allclose(divergence(expected, found)[1:], kl.sum(-1))
    logits[1, 3] = -torch.inf  # impossible in one
    assert divergence(expected, logits[1:2].log_softmax(-1)).tolist() == [torch.inf]
    assert bool(divergence(expected, torch.full_like(expected, torch.nan)).isnan().all())


def test_a_reference_of_other_rows_is_refused(seed: int) -> None:
    model, inputs = case(seed)
    rows = model.record(noise_span(model, inputs, "text", samples=2, seed=seed))
    with pytest.raises(ValueError, match="reference of 2 rows for a recording of 1: 'kl' compares"):
        patch(model.record(inputs), {0: [Intervention("z", 1, 1, zero())]}, "kl", reference=rows)


def test_what_cannot_be_patched(seed: int) -> None:
    model, inputs = case(seed)
    recording = model.record(inputs)
    cell = [Intervention("mlp_out", 0, 1, zero())]
    unchecked = inspect.unwrap(check_metric)
    for make, says in [
        (lambda: patch(recording, {}), "no cells"),
        (lambda: patch(recording, {(0, 1): cell, (0,): cell}), "every cell has one for each axis"),
        (lambda: patch(recording, {(0, 1): cell}, axes=("layer",)), "axes=.*coordinates"),
        (lambda: patch(recording, {0: cell}, "logit_diff"), "needs contrast"),
        (lambda: patch(recording, {0: cell}, "kl", contrast=5), "contrast=5 is for"),
        (lambda: patch(recording, {0: cell}, "kl", positions=[1]), "positions are for a function"),
        (lambda: patch(recording, {0: cell}, "loss", reference=recording), "'loss' has no use for"),
        (lambda: patch(recording, {0: cell}, torch.sum), r"'sum' gives \(\) for 1 row"),
        (lambda: patch(recording, {0: cell}, lambda logits: 1.0), "gives float for 1 row"),
        (lambda: unchecked("accuracy", None), "metric='accuracy'; it is 'probability'"),
    ]:
        with pytest.raises(ValueError, match=says):
            make()
