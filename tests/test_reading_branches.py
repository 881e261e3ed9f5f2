"""Activations that recordings keep and branches return; functions for all branches at once.

The reference is `run_with_cache` with the same interventions, a plain run for every branch.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import CEILING
from small_models import any_family, small_inputs, small_model
from test_branching import count_work, decoder_edit, probabilities, sites_of
from torch import Tensor

from mmlens import Intervention, hook_name
from mmlens.interventions.functions import add, batched, scale, zero
from mmlens.model.sites import split_site

TOLERANCE = CEILING * 2**-29
"""Of float64. Both sides do the same operations, grouped in another way, so they differ by rounding
alone. To first order this is proportional to the unit of rounding, which is 2^-53 here and 2^-24 in
float32; `CEILING` is what rounding may amount to there."""

SEEDS = st.integers(0, 2**31)


def in_float64(seed: int, images: tuple[int, ...] = (1, 0, 2), **choices: Any) -> tuple[Any, Any]:
    """A model of any kind and a batch with left padding."""
    model = any_family(seed, **choices).double()
    inputs = small_inputs(model, seed, images=images)
    pixels = None if inputs.pixel_values is None else inputs.pixel_values.double()
    return model, model.inputs_from_tokens(
        inputs.tokens, pixels, attention_mask=inputs.attention_mask
    )


def by_cache(model: Any, inputs: Any, branch: list[Any], read: tuple[str, Any, Any]) -> Tensor:
    """What a plain run has there: [row, pos, ...]."""
    site, layer, positions = read
    short, units = split_site(site)
    name = hook_name(short, layer)
    _, cache = model.run_with_cache(inputs, names_filter=name, interventions=branch)
    axis, at = model.hook_dict[name].site.position_axis, list(range(inputs.n_pos))
    found = cache[name].index_select(axis, torch.tensor(at if positions is None else positions))
    if units is None:
        return found
    return found.index_select(model.hook_dict[name].site.unit_axis, torch.tensor(units))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Masked scores are infinite in both."""
    assert ours.shape == expected.shape
    same = torch.where(ours == expected, 0.0, ours - expected).abs()
    assert float(same.max()) <= TOLERANCE * max(
        1.0, float(expected[expected.isfinite()].abs().max())
    )


def random_reads(chance: random.Random, model: Any, n_pos: int) -> list[tuple[str, Any, Any]]:
    reads: dict[Any, Any] = {}
    for _ in range(chance.randint(1, 4)):
        site, layer = chance.choice(sites_of(model)), chance.randrange(model.cfg.n_layers)
        if site in ("z", "q", "post") and chance.random() < 0.5:
            site += "[0]"
        if chance.random() < 0.15:
            site, layer = "ln_final.normalized", None
        some = chance.sample(range(n_pos), chance.randint(1, 3))
        reads[site, layer] = chance.choice([some, some, [n_pos - 1], None])
    return [(*key, positions) for key, positions in reads.items()]


@settings(max_examples=15)
@given(SEEDS)
def test_what_is_read_of_branches(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model, inputs = in_float64(seed, images=chance.choice([(1,), (1, 0, 2)]))
    branches = [
        [decoder_edit(model, inputs, chance) for _ in range(chance.choice([0, 1, 2]))]
        for _ in range(4)
    ]
    at_image = [0] if model.cfg.vision is not None else []
    branches += [[Intervention("vision.mlp_out", 0, at, zero())] for at in at_image]
    reads = random_reads(chance, model, inputs.n_pos)
    recording = model.record(inputs)
    readouts, found = recording.run(branches, probabilities, read=reads)
    alone, same = recording.run(branches, None, read=reads, batch_rows=chance.choice([1, None]))
    assert alone is None
    assert (readouts - recording.run(branches, probabilities)).abs().max() <= TOLERANCE
    plain, expected_too = recording.run(branches, probabilities, read=reads, plain=True)
    assert (readouts - plain).abs().max() <= TOLERANCE
    for read in reads:
        expected = torch.stack([by_cache(model, inputs, branch, read) for branch in branches])
        for values in (found, same, expected_too):
            assert_close(values[read[0], read[1]], expected)


def test_nothing_is_computed_that_is_not_read(seed: int, monkeypatch: Any) -> None:
    """Only the layers up to the last that is read, from the first position on that is."""
    model = small_model(seed, n_layers=5)
    inputs = small_inputs(model, seed)
    recording, n = model.record(inputs), inputs.n_pos
    edit = [Intervention("mlp_out", 1, [n - 2], zero())]
    work = count_work(monkeypatch)
    recording.run([edit, []], None, read=[("q", 3, [n - 1])])
    assert work == {1: 2, 2: 2, 3: 3}  # the second branch differs nowhere, and is read in layer 3


def test_what_cannot_be_read(seed: int) -> None:
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    recording, n = model.record(inputs), inputs.n_pos
    for read, says in [
        ([("vision.z", 0, [0])], "read in the decoder's layers and in ln_final"),
        ([("input_embed", None, [0])], "read in the decoder's layers and in ln_final"),
        ([("z", 0, [n])], rf"positions are 0 ... {n - 1}"),
        ([("z", 0, [])], "at least one"),
        ([("z", 0, [0]), ("z", 0, [1])], "one twice"),
        ([], "nothing to read"),
    ]:
        with pytest.raises(ValueError, match=says):
            recording.run([[]], None, read=read)
    with pytest.raises(IndexError, match=r"heads 0 ... \d+; there is no 77"):
        recording.run([[]], None, read=[("z[77]", 0, [0])])
    with pytest.raises(KeyError):
        recording.run([[]], None, read=[("z", 77, [0])])


@settings(max_examples=10)
@given(SEEDS)
def test_recordings_keep_sites(seed: int) -> None:
    chance = random.Random(seed)
    model, inputs = in_float64(seed)
    layer = chance.randrange(model.cfg.n_layers)
    sites = [("resid_post", layer), ("z", range(2)), "input_embed", ("vision.z", 0), ("pattern", 1)]
    recording = model.record(inputs, sites=sites)
    _, cache = model.run_with_cache(inputs)
    assert torch.equal(recording["resid_post", layer], cache["resid_post", layer])
    assert torch.equal(recording["z", 1], cache["z", 1])
    assert torch.equal(recording["z[0]", 0], cache["z", 0][:, :, [0]])
    assert torch.equal(recording["input_embed"], cache["hook_input_embed"])
    assert torch.equal(recording["vision.z", 0], cache["vision.blocks.0.attn.hook_z"])
    for missing in (("mlp_out", 0), "embed"):
        with pytest.raises(KeyError, match=r"does not hold .*; ask for it with record\(inputs"):
            recording[missing]

    kept = [("resid_post", layer), ("v", [0, 1])]
    other = inputs.append(torch.full((len(inputs), 2), 5))
    third = inputs.append(torch.full((len(inputs), 1), 9))
    several = model.record_many([inputs, other, third], sites=kept)
    assert several[1].shared is not None  # only what follows was run
    several.append(several[1].record(third, sites=kept))
    for each in several:
        _, cache = model.run_with_cache(each.inputs)
        for site, at in (("resid_post", layer), ("v", 0), ("v", 1)):
            assert_close(each[site, at], cache[site, at])


@settings(max_examples=15)
@given(SEEDS)
def test_a_batched_function_is_called_once_for_all_branches(seed: int) -> None:
    """It does what functions for each branch do, among others, at the same and other positions."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model, inputs = in_float64(seed)
    n, layer = inputs.n_pos, chance.randrange(model.cfg.n_layers)
    site = chance.choice(["resid_post", "mlp_out", "z", "post", "resid_pre", "q"])
    width = model.record(inputs, sites=[(site, layer)])[site, layer].shape[-1]
    directions = torch.randn(7, width, dtype=torch.double)
    calls: list[list[int]] = []
    told: list[Any] = []

    @batched
    def push(slices: Tensor, hook: Any, branches: Tensor, positions: Tensor | None) -> Tensor:
        assert len(slices) == len(branches)
        calls.append(branches.tolist())
        told.append(positions)
        own = directions[branches]
        return slices * 0.5 + own.view(len(own), *[1] * (slices.ndim - 2), -1)

    at = [chance.randrange(n)]
    units = "[0]" if site in ("z", "post", "q") and chance.random() < 0.5 else ""
    before = [Intervention(site, layer, [n - 1], scale(0.7))]
    after = [Intervention(site, layer, [n - 1], add(0.4))]

    def branches(functions: list[Any]) -> list[Any]:
        edits = [[Intervention(site + units, layer, at, each)] for each in functions]
        edits[1] = before + edits[1]
        edits[2] = edits[2] + after + edits[2]
        edits[3] = []
        edits[4] = [
            Intervention(site, layer, at if units else [*at, (at[0] + 1) % n], functions[4])
        ]
        return edits

    by_hand = [lambda activation, hook, own=own: activation * 0.5 + own for own in directions]
    recording = model.record(inputs)
    expected = recording.run(branches(by_hand), probabilities, plain=True)
    together = branches([push] * 7)
    found = recording.run(together, probabilities)
    assert (found - expected).abs().max() <= TOLERANCE
    n_shapes = 1 if units else 2
    # Branch 2 has it twice; branch 1 in its second turn, as something else comes first.
    assert sorted(index for call in calls for index in call) == [0, 1, 2, 2, 4, 5, 6]
    assert len(calls) <= 2 + n_shapes
    assert [0, 2, 5, 6] in calls or [0, 2, 4, 5, 6] in calls
    assert all(
        each is not None and each.shape[0] == len(call)
        for each, call in zip(told, calls, strict=True)
    )
    assert (recording.run(together, probabilities, plain=True) - expected).abs().max() <= TOLERANCE
    alone = model.run_with_hooks(inputs, interventions=together[0])[:, [-1]]
    assert (probabilities(alone) - expected[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("site", ["vision.mlp_out", "projector.out", "input_embed"])
def test_batched_functions_below_the_decoder(site: str, seed: int) -> None:
    model, inputs = in_float64(seed, images=(1,))
    layer = 0 if site == "vision.mlp_out" else None
    numbers = torch.tensor([0.3, -1.0, 2.0], dtype=torch.double)

    @batched
    def push(slices: Tensor, hook: Any, branches: Tensor) -> Tensor:
        return slices + numbers[branches].view(-1, *[1] * (slices.ndim - 1))

    recording = model.record(inputs)
    edits = [[Intervention(site, layer, [1], push)]] * 3
    expected = [[Intervention(site, layer, [1], add(float(each)))] for each in numbers]
    for plain in (False, True):
        found = recording.run(edits, probabilities, plain=plain)
        assert (found - recording.run(expected, probabilities)).abs().max() <= TOLERANCE


def test_gradients_through_reads_and_batched_functions(seed: int) -> None:
    model, inputs = in_float64(seed, images=(1,))
    pushes = torch.zeros(3, 1, 1, model.cfg.d_model, dtype=torch.double, requires_grad=True)

    @batched
    def push(slices: Tensor, hook: Any, branches: Tensor) -> Tensor:
        return slices + pushes[branches]

    edit, last = Intervention("resid_post", 0, inputs.span("last"), push), model.cfg.n_layers - 1
    read = [("mlp_out", last, inputs.span("last"))]
    _, found = model.record(inputs).run([[edit]] * 3, None, read=read)
    [ours] = torch.autograd.grad(found["mlp_out", last][1].sum(), pushes)
    alone = torch.zeros(model.cfg.d_model, dtype=torch.double, requires_grad=True)
    by_hand = [Intervention("resid_post", 0, inputs.span("last"), add(alone))]
    kept: list[Tensor] = []
    with model.hooks(
        interventions=by_hand,
        fwd_hooks=[(hook_name("mlp_out", last), lambda x, hook: kept.append(x))],
    ):
        model(inputs)
    [expected] = torch.autograd.grad(kept[0][:, -1].sum(), alone)
    assert_close(ours[1, 0, 0], expected)
    assert float(expected.abs().max()) > 0
    assert not ours[[0, 2]].any()
