"""Recordings share what their prompts have in common, and passes share memory.

In float64, so that rounding is no excuse.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import IMAGE, any_family, plain_run, small_inputs, small_model
from test_branching import TOLERANCE, count_work, decoder_edit, probabilities
from torch import nn

from mmlens import Intervention, causal_trace, causal_trace_many, noise_span
from mmlens.branching.packing import Packing
from mmlens.branching.passes import passes
from mmlens.branching.recording import Recording
from mmlens.branching.schedule import Start
from mmlens.inputs.common_prefix import common_prefix
from mmlens.interventions.functions import add, scale, zero
from mmlens.model.components import MLP
from mmlens.utils.memory import is_out_of_memory

SEEDS = st.integers(0, 2**31)


def with_words(inputs, positions, seed=0):
    """Other words at these positions; visual tokens stay."""
    tokens = inputs.tokens.clone()
    tokens[:, positions] = 2 + (tokens[:, positions] + 7 + seed) % 57
    tokens = torch.where(inputs.is_image, inputs.tokens, tokens)
    return replace(inputs, tokens=tokens)


def behind_images(inputs):
    """The first position after the images of every row, and after the first word."""
    return int((inputs.tokens == IMAGE).nonzero()[:, 1].max()) + 2 if inputs.n_images[0] else 2


def test_a_recording_holds_no_memory_of_others(seed):
    """Keys and values are slices of what is computed together with the queries."""
    model = small_model(seed, n_heads=6, d_model=48, n_key_value_heads=2)
    inputs = small_inputs(model, seed)
    own = model.record(inputs).own
    for tensor in (*own.resid, *(each for pair in own.keys_values for each in pair)):
        assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes


def assert_same_recording(found, expected, branches):
    for ours, theirs in zip(found.resid, expected.resid, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(found.past.entries, expected.past.entries, strict=True):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(ours, theirs, strict=True))
    n_pos = found.inputs.n_pos
    assert torch.allclose(found.logits(range(n_pos)), expected.logits(range(n_pos)), atol=1e-4)
    plain = torch.stack([plain_run(found.model, found.inputs, b)[:, -1:] for b in branches])
    assert (found.run(branches, probabilities) - probabilities(plain)).abs().max() <= TOLERANCE


@settings(max_examples=10)
@given(SEEDS)
def test_a_recording_that_begins_like_another(seed):
    chance = random.Random(seed)
    model = any_family(seed).double()
    images = chance.choice([(1,), (2,), (0,), (1, 2)])
    inputs = small_inputs(model, seed, images=images)
    first = model.record(inputs)
    for _ in range(3):  # each begins like the one before
        at = chance.randrange(inputs.n_pos - 3, inputs.n_pos)
        kind = chance.choice(["words", "longer", "picture", "same"])
        if kind == "words":
            inputs = with_words(inputs, [at])
        elif kind == "longer":
            inputs = inputs.append(torch.tensor([5, 9]))
        elif kind == "picture" and inputs.pixel_values is not None:
            pixels = inputs.pixel_values.clone()
            pixels[-1] *= -1
            inputs = inputs.with_pixels(pixels)
        first = first.record(inputs)
        assert first.inputs is inputs
        branches = [[decoder_edit(model, inputs, chance)] for _ in range(4)]
        assert_same_recording(first, model.record(inputs), branches)


def test_samples_of_noise_share_the_prefix_of_one_row(seed):
    chance = random.Random(seed)
    model = any_family(seed).double()
    clean = small_inputs(model, seed, images=(1,))
    last = clean.n_pos - 1
    drawn = torch.zeros(3, clean.n_pos, model.cfg.d_model)
    drawn[:, last - 1 :] = torch.randn(3, 2, model.cfg.d_model)
    noisy = replace(clean, noise=drawn)
    recording = model.record(clean).record(noisy)
    assert recording.n_rows == 3
    assert recording.shared is not None and len(recording.shared.resid[0]) == 1
    assert recording.own.begin == last - 1
    branches = [[decoder_edit(model, clean, chance)] for _ in range(6)]
    assert_same_recording(recording, model.record(noisy), branches)
    # Another number of samples has nothing to share with these.
    assert recording.record(replace(clean, noise=drawn[:2])).shared is None


def test_where_prompts_begin_to_differ(seed):
    model = small_model(seed).double()
    inputs = small_inputs(model, seed, images=(1, 1), words=(6, 4))
    n_pos, start = inputs.n_pos, min(image.start for image in inputs.images)
    assert common_prefix(inputs, inputs) == n_pos
    assert common_prefix(inputs, inputs.append(torch.tensor([4]))) == n_pos
    assert common_prefix(inputs, with_words(inputs, [n_pos - 1])) == n_pos - 1
    moved = inputs.with_pixels(-inputs.pixel_values)
    assert common_prefix(inputs, moved) == start
    alone = small_inputs(model, seed, images=(1,))
    assert common_prefix(inputs, alone) == 0


def count_calls(monkeypatch, module, name="forward"):
    """How many rows a module is called with, from now on."""
    rows = []
    method = getattr(module, name)

    def counted(x, *args, **options):
        rows.append(len(x))
        return method(x, *args, **options)

    monkeypatch.setattr(module, name, counted)
    return rows


def test_questions_on_one_image_share_it(seed, monkeypatch):
    model = any_family(seed).double()
    first = small_inputs(model, seed, images=(1,), words=(4,))
    at = behind_images(first)
    if at >= first.n_pos:
        first = first.append(torch.tensor([7, 8]))
    shorter = replace(first, tokens=first.tokens)  # the same question again
    longer = with_words(first, [first.n_pos - 1]).append(torch.tensor([3, 4]))
    other = first.with_pixels(first.pixel_values + 1)
    encoded, work = count_calls(monkeypatch, model.vision), count_work(monkeypatch)
    recordings = model.record_many([first, shorter, longer, other])
    assert encoded == [1, 1]  # two images
    n_pos, n_like = first.n_pos, 2 * (other.images[0].start + 1) > first.n_pos
    new = n_pos - first.images[0].start if n_like else n_pos
    for layer in range(model.cfg.n_layers):
        assert work[layer] in (n_pos + 1 + 3 + new, n_pos + 1 + 3 + n_pos)
    root = recordings[0]
    assert all(each.shared is root.own for each in recordings[1:3])
    branches = [[Intervention("mlp_out", 0, [at - 1], zero())]]
    for each in recordings:
        assert_same_recording(each, model.record(each.inputs), branches)


def test_an_image_that_is_there_twice_is_encoded_once(seed, monkeypatch):
    model = small_model(seed).double()
    inputs = small_inputs(model, seed, images=(2, 1))
    twice = inputs.with_pixels(inputs.pixel_values[[0, 1, 0]])
    expected = model(twice)
    encoded = count_calls(monkeypatch, model.vision)
    recording = model.record(twice)
    assert encoded == [2]
    assert torch.allclose(recording.logits(), expected[:, -1:], atol=1e-4)


def test_edits_of_the_tower_are_one_batch(seed, monkeypatch):
    model = small_model(seed).double()
    inputs = small_inputs(model, seed, images=(2,))
    recording = model.record(inputs)
    branches = [
        [Intervention(site, layers, [0], scale(1.5))]
        for site, layers in [
            ("vision.mlp_out", 0),
            ("projector.out", None),
            ("vision.pos_embed", None),
            ("vision.z", 0),
            ("projector.in", None),
            ("input_embed", None),
        ]
    ]
    encoded = count_calls(monkeypatch, model.vision)
    projected = count_calls(monkeypatch, model.projector)
    work = count_work(monkeypatch)
    found = recording.run(branches, probabilities)
    assert encoded == [3 * 2]  # those of the projector have the features already
    assert projected == [5 * 2]
    start = inputs.images[0].start  # what comes before the first image stays
    assert work[0] == 5 * (inputs.n_pos - start) + inputs.n_pos
    plain = torch.stack([probabilities(plain_run(model, inputs, b)[:, -1:]) for b in branches])
    assert (found - plain).abs().max() <= TOLERANCE


def test_the_prefix_is_attended_to_in_place(seed, monkeypatch):
    model = small_model(seed, n_key_value_heads=2, n_heads=6).double()
    inputs = small_inputs(model, seed, images=(1, 1), words=(5, 5))
    recording = model.record(inputs)
    attended = []
    module = sys.modules["mmlens.branching.shared_past"]
    attend = module.attend_part

    def seen(q, k, v, mask, rule):
        attended.append((k, v))
        return attend(q, k, v, mask, rule)

    monkeypatch.setattr(module, "attend_part", seen)
    last = inputs.n_pos - 1
    branches = [[Intervention("resid_pre", 0, [last], scale(s))] for s in (0.1, 0.2, 0.3, 0.4)]
    recording.run(branches, probabilities)
    for layer, (keys, values) in enumerate(recording.own.keys_values):
        k, v = attended[2 * layer + 1]  # the branches' own keys come first
        assert k.shape == (2, last, 2, model.cfg.d_head)
        assert k.data_ptr() == keys.data_ptr() and v.data_ptr() == values.data_ptr()


def test_the_last_layer_computes_what_is_read(seed, monkeypatch):
    model = small_model(seed, n_layers=3).double()
    inputs = small_inputs(model, seed, images=(1,))
    recording = model.record(inputs)
    rows = []
    forward = MLP.forward

    def counted(self, x):
        rows.append(x.shape[0] * x.shape[1])
        return forward(self, x)

    monkeypatch.setattr(MLP, "forward", counted)
    n_pos = inputs.n_pos
    branches = [
        [Intervention("resid_post", 0, [0], scale(0.5))],
        [Intervention("mlp_out", 1, [1], scale(0.5))],
        [Intervention("attn_out", 2, [n_pos - 2], scale(0.5))],
        [Intervention("k", 2, [2], scale(0.5))],
        [Intervention("resid_post", 2, [1], scale(0.5))],
    ]
    found = recording.run(branches, probabilities)
    assert rows == [2 * n_pos - 1, 1 + 1 + 2 + 1]
    plain = torch.stack([probabilities(plain_run(model, inputs, b)[:, -1:]) for b in branches])
    assert (found - plain).abs().max() <= TOLERANCE


def test_a_trace_computes_what_differs(seed, monkeypatch):
    model = any_family(seed, n_layers=4).double()
    clean = small_inputs(model, seed, images=(1,))
    if clean.is_image[0, -2:].any():
        clean = clean.append(torch.tensor([7, 8]))
    first = clean.n_pos - 2
    encoded, work = count_calls(monkeypatch, model.vision), count_work(monkeypatch)
    causal_trace(model, clean, with_words(clean, [first]), positions=[first])
    assert encoded == [1]
    for layer in range(4):
        # resid_post of a layer joins at the next.
        assert work[layer] == clean.n_pos + 2 + 2 * (2 * (layer + 1) + layer)


# Many questions


def test_many_traces_equal_single_ones(seed, monkeypatch):
    model = any_family(seed).double()
    first = small_inputs(model, seed, images=(1,), words=(6,)).append(torch.tensor([5, 6, 7]))
    second = with_words(first, [first.n_pos - 1])
    third = small_inputs(model, seed + 1, images=(0,), words=(5,))
    pairs = [(each, with_words(each, [each.n_pos - 2], 3)) for each in (first, second, third)]
    noisy = replace(third, spans=({**third.spans[0], "c": torch.tensor([3])},))
    pairs.append((noisy, noise_span(model, noisy, "c", samples=2)))
    answers = [4, 5, None, 6]

    def groups(clean):
        return [[clean.n_pos - 1], [clean.n_pos - 2, 1]]

    encoded = count_calls(monkeypatch, model.vision)
    moved = []
    found = causal_trace_many(
        model,
        iter(pairs),
        positions=groups,
        answers=answers,
        window=3,
        progress=lambda *n: moved.append(n),
    )
    assert encoded == [1]
    total = sum(trace.restored.numel() for trace in found)
    assert moved[-1] == (total, total) and moved == sorted(moved)
    for trace, (clean, corrupted), answer in zip(found, pairs, answers, strict=True):
        alone = causal_trace(
            model,
            clean,
            corrupted,
            positions=groups(clean),
            answer=answer,
            window=3,
            method="naive",
        )
        assert trace.answer_tokens == alone.answer_tokens and trace.groups == alone.groups
        assert (trace.restored - alone.restored).abs().max() <= TOLERANCE
        assert abs(trace.clean - alone.clean) <= TOLERANCE
        assert abs(trace.corrupted - alone.corrupted) <= TOLERANCE
    assert causal_trace_many(model, []) == []
    with pytest.raises(ValueError, match="1 answers for 4 pairs"):
        causal_trace_many(model, pairs, answers=[4])


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_where_memory_runs_out_passes_are_halved(seed, monkeypatch, error):
    chance = random.Random(seed)
    model = any_family(seed).double()
    inputs = small_inputs(model, seed, images=(1,))
    recording = model.record(inputs)
    branches = [[decoder_edit(model, inputs, chance)] for _ in range(11)]
    expected = recording.run(branches, probabilities)
    module, sizes, done = sys.modules["mmlens.branching.recording"], [], []
    run_joined, most = module.run_joined, chance.choice([1, 2, 3])

    def limited(recording, branches, *rest, **options):
        sizes.append(len(branches))
        if len(branches) > most:
            raise error
        return run_joined(recording, branches, *rest, **options)

    monkeypatch.setattr(module, "run_joined", limited)
    found = recording.run(branches, probabilities, progress=lambda *n: done.append(n))
    assert torch.allclose(found, expected, atol=1e-9)
    assert max(sizes) > most and done[-1] == (11, 11)
    most = 0  # not even one fits
    with pytest.raises(type(error)):
        recording.run(branches, probabilities)
    assert not any(part._forward_hooks for part in model.modules())


def test_other_errors_are_not_tried_again(seed):
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    model = small_model(seed).double()
    calls = []

    def fail(activation, hook):
        calls.append(1)
        raise RuntimeError("in the hook")

    recording = model.record(small_inputs(model, seed))
    with pytest.raises(RuntimeError, match="in the hook"):
        recording.run([[Intervention("z", 0, 1, fail)], [Intervention("z", 0, 1, fail)]], len)
    assert len(calls) == 1


@settings(max_examples=30)
@given(SEEDS)
def test_passes(seed):
    """Each branch is in one of them, in the order of joining; none is larger than allowed."""
    chance = random.Random(seed)
    n_pos, n_rows = chance.choice([7, 60, 700]), chance.choice([1, 3])
    starts = [
        None
        if chance.random() < 0.1
        else Start(chance.randrange(-1, 5), chance.randrange(n_pos), n_pos - 1)
        for _ in range(chance.randint(1, 99))
    ]
    model = any_family(seed % 7).double()
    batch_rows = chance.choice([None, 1, 8])
    found = passes(starts, n_pos, n_rows, model, batch_rows)
    assert sorted(i for each in found for i in each.indices) == list(range(len(starts)))
    for each in found:
        begun = [starts[i] for i in each.indices]
        if each.is_plain:
            assert begun == [None]
            continue
        assert [start.layer for start in begun] == sorted(start.layer for start in begun)
        assert each.wide == n_rows * (n_pos - min(start.first for start in begun))
        if batch_rows is not None:
            assert len(begun) <= max(1, batch_rows // n_rows)
        halves = each.within(each.size // 2)
        assert [i for half in halves for i in half.indices] == list(each.indices)
        assert all(half.size <= each.size / 2 or len(half.indices) == 1 for half in halves)


@settings(max_examples=30)
@given(SEEDS)
def test_packing(seed):
    torch.manual_seed(seed)
    chance = random.Random(seed)
    n_pos = chance.randint(1, 9)
    starts = [chance.randrange(n_pos) for _ in range(chance.randint(1, 5))]
    if chance.random() < 0.3:
        starts = [starts[0]] * len(starts)
    packing, device = Packing(tuple(starts), n_pos), torch.device("cpu")
    positions = [p for start in starts for p in range(start, n_pos)]
    assert packing.positions[device].tolist() == positions
    packed = torch.randn(2, len(positions), 3)
    assert torch.equal(packing.flat(packing.rectangle(packed)), packed)
    origin = chance.randint(0, packing.first)
    base = torch.randn(2, n_pos - origin, 3)
    filled = torch.cat([base, packed], dim=1)[:, packing.filling(origin, base.shape[1])]
    for i, start in enumerate(starts):
        expected = torch.cat([base[:, : start - origin], packed[:, packing.offsets[i] :]], dim=1)
        assert torch.equal(filled[:, i], expected[:, : n_pos - origin])
    later = Packing(tuple(chance.randrange(start, n_pos) for start in starts), n_pos)
    entries = packing.entries_of(later)
    assert torch.equal(packing.positions[device][entries], later.positions[device])


# What is computed at the end


def test_logits_of_some_tokens(seed):
    model = any_family(seed).double()
    inputs = small_inputs(model, seed)
    if model.unembed.bias is None:
        model.unembed.bias = nn.Parameter(
            torch.randn(model.cfg.d_vocab).double(), requires_grad=False
        )
    branches = [[Intervention("mlp_out", 0, [1], add(0.5))], []]
    recording = model.record(inputs)
    whole = recording.run(branches, lambda logits: logits)
    some = recording.run(branches, lambda logits: logits, tokens=[7, 3])
    assert torch.allclose(some, whole[..., [7, 3]], atol=1e-5)


@settings(max_examples=10)
@given(SEEDS)
def test_prompts_that_share_nothing_are_run_as_one_batch(seed):
    chance = random.Random(seed)
    model = any_family(seed).double()
    prompts = [small_inputs(model, seed + i, images=(chance.choice([0, 1, 2]),)) for i in range(3)]
    prompts[1] = prompts[1].append(torch.tensor([5, 9, 7]))  # so others are padded
    for found, inputs in zip(Recording.of_each(model, prompts), prompts, strict=True):
        assert found.inputs is inputs
        expected = model.record(inputs)
        branches = [[decoder_edit(model, inputs, chance)] for _ in range(3)]
        assert_same_recording(found, expected, branches)
        assert (found.encoded_images is None) == (expected.encoded_images is None)
        if found.encoded_images is not None:
            assert torch.allclose(
                found.encoded_images.visual, expected.encoded_images.visual, atol=1e-9
            )
