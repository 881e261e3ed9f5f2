"""Hook functions that put other runs in, or act along directions, against their formulas."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import small_inputs, small_model
from torch import Tensor

from mmlens import Intervention, hook_name
from mmlens.interventions.functions import (
    clamp_along,
    freeze,
    mean,
    project_out,
    resample,
    scale,
    transplant,
)

SITES = ["z", "mlp_out", "post", "resid_post", "q", "k"]


def models_and_prompts(seed: int) -> tuple[Any, Any, list[Any]]:
    """A model, a prompt, and others: a batch with left padding, and another prompt."""
    model = small_model(seed, n_layers=3).double()

    def inputs_of(images: tuple[int, ...], other: int) -> Any:
        made = small_inputs(model, seed + other, images=images, words=(5,) * len(images))
        pixels = None if made.pixel_values is None else made.pixel_values.double()
        return model.inputs_from_tokens(made.tokens, pixels, attention_mask=made.attention_mask)

    return model, inputs_of((1,), 0), [inputs_of((1, 0, 2), 1), inputs_of((1,), 2)]


def edited(model: Any, inputs: Any, edit: Intervention, name: str) -> tuple[Tensor, Tensor]:
    """The activation before and after the intervention."""
    _, before = model.run_with_cache(inputs, names_filter=name)
    _, after = model.run_with_cache(inputs, names_filter=name, interventions=[edit])
    return before[name], after[name]


@pytest.mark.parametrize("site", SITES)
def test_mean(site: str, seed: int) -> None:
    model, inputs, others = models_and_prompts(seed)
    layer, name = 1, hook_name(site, 1)
    recordings = model.record_many(others, sites=[(site, layer)])
    rows = [
        recording[site, layer][row, others[i].attention_mask[row]]
        for i, recording in enumerate(recordings)
        for row in range(len(others[i]))
    ]
    expected = torch.cat(rows).mean(dim=0)  # padding left out
    at = [inputs.n_pos - 1, 1]
    before, after = edited(model, inputs, Intervention(site, layer, at, mean(recordings)), name)
    assert torch.allclose(after[0, at], expected.expand_as(after[0, at]), atol=1e-12)
    rest = [each for each in range(inputs.n_pos) if each not in at]
    assert torch.equal(after[:, rest], before[:, rest])
    # Of a cache, and of some of its positions.
    _, cache = model.run_with_cache(others[1])
    _, after = edited(model, inputs, Intervention(site, layer, at, mean(cache, among=[2, 3])), name)
    assert torch.allclose(after[0, at[0]], cache[name][0, [2, 3]].mean(dim=0), atol=1e-12)


@pytest.mark.parametrize("site", SITES)
def test_resample(site: str, seed: int) -> None:
    model, inputs, others = models_and_prompts(seed)
    name = hook_name(site, 1)
    recordings = [model.record(inputs.repeat(2), [(site, 1)])]
    recordings[0].cache[name].normal_()  # rows that differ
    held = recordings[0][site, 1]
    drawn = set()
    for draw in range(12):
        edit = Intervention(site, 1, [1, 3], resample(recordings, seed=draw))
        _, after = edited(model, inputs, edit, name)
        same = [row for row in range(2) if torch.equal(after[0, [1, 3]], held[row, [1, 3]])]
        assert len(same) == 1
        drawn.add(same[0])
        whole = Intervention(site, 1, None, resample(recordings, seed=draw))
        assert torch.equal(edited(model, inputs, whole, name)[1][0], held[same[0]])
    assert drawn == {0, 1}
    other = model.record(others[1], [(site, 1)])
    among = [2, 4]
    seen = set()
    for draw in range(12):
        edit = Intervention(site, 1, [1, 3], resample(other, seed=draw, among=among))
        _, after = edited(model, inputs, edit, name)
        for position in (1, 3):
            seen |= {at for at in among if torch.equal(after[0, position], other[site, 1][0, at])}
            assert any(torch.equal(after[0, position], other[site, 1][0, at]) for at in among)
    assert seen == set(among)


def test_a_position_that_one_run_lacks(seed: int) -> None:
    """Whether that is an error does not hang on which run is drawn."""
    model, inputs, _ = models_and_prompts(seed)
    whole = model.record(inputs, [("mlp_out", 1)])
    last, held = inputs.n_pos - 1, whole["mlp_out", 1]
    shorter = {hook_name("mlp_out", 1): held[:, :last]}
    for draw in range(8):
        edit = Intervention("mlp_out", 1, last, resample([whole.cache, shorter], seed=draw))
        with pytest.raises(ValueError, match=f"0 ... {last - 1}; there is no {last}"):
            edited(model, inputs, edit, hook_name("mlp_out", 1))


def test_freeze(seed: int) -> None:
    """In a branch whose earlier layer changed, a frozen component is what it was."""
    model, inputs, _ = models_and_prompts(seed)
    recording = model.record(inputs, sites=[("mlp_out", range(3)), ("attn_out", range(3))])
    last = inputs.n_pos - 1
    change = Intervention("resid_post", 0, last, scale(-1.5))
    frozen = [
        Intervention(site, [1, 2], last, freeze(recording)) for site in ("mlp_out", "attn_out")
    ]
    read = [("mlp_out", 2, last), ("resid_post", 2, last)]
    _, found = recording.run([[change, *frozen], [change]], None, read=read)
    assert torch.equal(found["mlp_out", 2][0], recording["mlp_out", 2][:, [last]])
    assert not torch.allclose(found["mlp_out", 2][1], found["mlp_out", 2][0])
    # What the change adds to the stream is all that reaches its end.
    stream = model.record(inputs, sites=[("resid_post", [0, 2])])
    expected = stream["resid_post", 2][:, [last]] - 2.5 * stream["resid_post", 0][:, [last]]
    assert torch.allclose(found["resid_post", 2][0], expected, atol=1e-9)


def test_transplant(seed: int) -> None:
    """From another layer, position and prompt; the rest of the run is that of the value."""
    model, inputs, others = models_and_prompts(seed)
    source = model.record(others[1], sites=[("resid_post", 2), ("q", 1)])
    at, taken = [inputs.n_pos - 2, 1], [3, 4]
    edit = Intervention("resid_post", 0, at, transplant(source, "resid_post", 2, taken))
    _, after = edited(model, inputs, edit, hook_name("resid_post", 0))
    assert torch.equal(after[0, at], source["resid_post", 2][0, taken])
    one = Intervention("resid_pre", 1, at, transplant(source, "resid_post", 2, 3))
    _, after = edited(model, inputs, one, hook_name("resid_pre", 1))
    assert torch.equal(after[0, at], source["resid_post", 2][0, [3, 3]])
    heads = Intervention("z", 0, 1, transplant(source, "q", 1, 4))
    _, after = edited(model, inputs, heads, hook_name("z", 0))
    assert torch.equal(after[0, 1], source["q", 1][0, 4])

    ours = model.record(inputs).run([[edit]], lambda logits: logits[:, 0])[0]
    by_hand = source["resid_post", 2][:, taken]

    def put(resid: Tensor, hook: Any) -> Tensor:
        return resid.index_copy(1, torch.tensor(at), by_hand)

    expected = model.run_with_hooks(inputs, fwd_hooks=[(hook_name("resid_post", 0), put)])
    assert torch.allclose(ours, expected[:, -1], atol=1e-7)
    text = model.generate(inputs, 3, do_sample=False, return_type="tokens", interventions=[edit])
    with model.hooks(fwd_hooks=[(hook_name("resid_post", 0), put)]):
        plain = model.generate(
            inputs, 3, do_sample=False, return_type="tokens", use_past_kv_cache=False
        )
    assert torch.equal(text, plain)


@pytest.mark.parametrize("half", [False, True])
def test_directions(half: bool, seed: int) -> None:
    model, inputs, _ = models_and_prompts(seed)
    d, name = model.cfg.d_model, hook_name("resid_post", 1)
    one, several = torch.randn(d), torch.randn(3, d).double()
    if half:  # the direction in another precision than the activation
        model, one = model.float(), one.bfloat16()
        inputs = model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.float())
    bound = 1e-5 if half else 1e-10
    before, after = edited(
        model, inputs, Intervention("resid_post", 1, None, project_out(one)), name
    )
    unit = one.to(before) / one.to(before).norm()
    size = float(before.abs().max()) * d
    assert float((after @ unit).abs().max()) <= bound * size
    assert torch.allclose(after, before - (before @ unit)[..., None] * unit, atol=bound * size)
    _, after = edited(
        model, inputs, Intervention("resid_post", 1, None, project_out(several)), name
    )
    # The least squares fit of the directions is what is left out.
    flat = before.flatten(0, 1).double()
    fit = torch.linalg.lstsq(several.T, flat.T).solution
    assert torch.allclose(
        after.flatten(0, 1).double(), flat - (several.T @ fit).T, atol=bound * size
    )
    value = random.uniform(-5, 5)
    edit = Intervention("resid_post", 1, [1, 2], clamp_along(one, value))
    _, after = edited(model, inputs, edit, name)
    assert torch.allclose(after[:, [1, 2]] @ unit, torch.tensor(value).to(unit), atol=bound * size)
    other = after - (after @ unit)[..., None] * unit
    expected = before - (before @ unit)[..., None] * unit
    assert torch.allclose(other, expected, atol=bound * size)


def test_what_does_not_fit(seed: int) -> None:
    model, inputs, others = models_and_prompts(seed)
    held = model.record(others[1], sites=[("z", 1), ("pattern", 1), ("resid_post", 1)])
    n = others[1].n_pos

    def run(*where: Any) -> Callable[[], Any]:
        return lambda: model.run_with_hooks(inputs, interventions=[Intervention(*where)])

    for broken, error, says in [
        (run("mlp_out", 1, 1, mean(held)), KeyError, "the run holds no blocks.1.hook_mlp_out"),
        (run("z", 0, 1, resample(held)), KeyError, "the run holds no blocks.0.attn.hook_z"),
        (run("pattern", 1, 1, mean(held)), ValueError, "mean is not for .*knockout cuts"),
        (run("pattern", 1, 1, resample(held)), ValueError, "resample is not for"),
        (run("z", 1, 1, mean(held, among=[n])), ValueError, "are not among 0"),
        (run("z", 1, 1, resample(held, among=[n])), ValueError, "there is no"),
        (
            run("mlp_out", 1, [1, 2, 3], transplant(held, "resid_post", 1, [0, 1])),
            ValueError,
            "3 positions are edited, and 1 rows and 2 positions",
        ),
        (run("mlp_out", 1, 1, transplant(held, "z", 1, 0)), ValueError, "a position has"),
        (run("mlp_out", 1, 1, project_out(torch.ones(3))), ValueError, "along its last axis"),
        (lambda: transplant(held, "mlp_out", 1, 0), KeyError, "does not hold"),
        (lambda: project_out(torch.zeros(5)), ValueError, "none is zero"),
        (lambda: clamp_along(torch.full((5,), torch.nan), 1.0), ValueError, "infinite"),
        (lambda: project_out(torch.ones(2, 5)), ValueError, "a sum of the others"),
    ]:
        with pytest.raises(error, match=says):
            broken()
