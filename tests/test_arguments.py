"""Arguments that would give a wrong number in silence: masks, fractions, what is read only once."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_inputs, small_model
from test_trace_effects import words_swapped

import mmlens
from mmlens import Intervention, Recording, ablation_scan
from mmlens.analyses.ablation_scan import each_of
from mmlens.analyses.arguments import layers_of, positions_of
from mmlens.analyses.attention_knockout import attention_knockout
from mmlens.analyses.attribution_patching import attribution_patching
from mmlens.analyses.causal_trace import causal_trace
from mmlens.analyses.image_regions import named_regions
from mmlens.analyses.trace_grid import layer_centres, parts_of
from mmlens.branching.reads import Read
from mmlens.interventions.functions import add, batched, knockout, mean, restore, transplant, zero
from mmlens.interventions.intervention import names_of
from mmlens.interventions.of_runs import drawn_from
from mmlens.utils.tensors import flat_positions, listed_numbers


def case(seed: int) -> tuple[Any, Any]:
    """A model in float64, and a prompt with an image."""
    model = small_model(seed, n_layers=3).double()
    inputs = small_inputs(model, seed)
    return model, model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double())


def probability(logits: Any) -> Any:
    return logits[:, -1].softmax(-1)[:, 5]


@pytest.mark.parametrize("kind", ["a mask", "fractions"])
def test_positions_are_whole_numbers_wherever_they_are_given(kind: str, seed: int) -> None:
    """A mask was taken for the positions 0 and 1, and 2.7 for 2."""
    model, inputs = case(seed)
    given = inputs.is_image[0] if kind == "a mask" else torch.tensor([0.0, 1.7])
    recording = model.record(inputs, sites=[("resid_post", range(3))])
    last = inputs.span("last")
    # What runs where no test checks the signature.
    uses: list[Callable[[], Any]] = [
        lambda: unwrap(knockout)(given),
        lambda: unwrap(transplant)(recording, "resid_post", 1, given),
        lambda: unwrap(positions_of)(inputs, given),
        lambda: unwrap(parts_of)(given),
        lambda: unwrap(named_regions)(inputs, [given]),
        lambda: unwrap(Read.of.__func__)(Read, model, "z", 1, given, inputs.n_pos),
        lambda: unwrap(Recording._read)(recording, given),
        lambda: unwrap(drawn_from)(given, [0], (seed,)),
    ]
    edit = Intervention("resid_post", 1, last, unwrap(mean)(recording, given))
    uses.append(lambda: model.run_with_hooks(inputs, interventions=[edit]))
    for use in uses:
        with pytest.raises(TypeError, match="are integers, not torch"):
            use()
    assert flat_positions(range(3)).tolist() == [0, 1, 2]
    assert flat_positions([]).tolist() == []
    assert flat_positions(torch.tensor(3, dtype=torch.uint8)).tolist() == [3]


def test_numbers_of_numpy_and_torch(seed: int, tmp_path: Path) -> None:
    """Layers and coordinates, as argmin and arange give them."""
    model, inputs = case(seed)
    at = random.randrange(3)
    assert listed_numbers(iter([at, 0])) == [at, 0]
    for layer in (np.int64(at), torch.tensor(at), np.array([at]), torch.tensor([at])):
        edited = object.__new__(Intervention)
        unwrap(Intervention.__init__)(edited, "z", layer, None, zero())
        assert edited.layers == (at,)
        assert unwrap(names_of)([("z", layer)]) == [f"blocks.{at}.attn.hook_z"]
        assert unwrap(layers_of)(model, layer) == [at]
    recording = model.record(inputs)
    edit = [Intervention("mlp_out", at, inputs.span("last"), zero())]
    for numbers in (range(2), np.arange(2), torch.arange(2)):
        cells = {(i, j): edit for i in numbers for j in numbers}
        found = mmlens.patch(recording, cells, answer=5)
        assert found.coordinates == ((0, 1), (0, 1))
        saved = mmlens.Patched.load(found.save(tmp_path / "it.safetensors"))
        assert saved.coordinates == found.coordinates
    with pytest.raises(TypeError, match="layers are integers"):
        listed_numbers(1.5)


def test_layers_of_traces_are_numbers_of_python(seed: int) -> None:
    """A trace of numpy's layers could not be saved after all of it was done."""
    model, _ = case(seed)
    for layers in (np.arange(2), torch.arange(2), iter(range(2))):
        found = unwrap(layer_centres)(model, ("mlp_out",), layers)
        assert found == [0, 1] and {type(layer) for layer in found} == {int}


def test_a_metric_may_count(seed: int) -> None:
    """Whether an answer is the most probable one, say."""
    model, inputs = case(seed)
    token = int(model(inputs)[0, -1].argmax())
    found = mmlens.patch(model.record(inputs), {0: []}, lambda x: x[:, -1].argmax(-1) == token)
    assert (found.baseline, found.values.tolist()) == (1.0, [1.0])


def test_a_traced_metric_may_count(seed: int) -> None:
    """The rank of a token, as plain runs with hooks have it."""
    model, inputs = case(seed)
    other, last = words_swapped(inputs, seed), inputs.n_pos - 1
    token = random.randrange(2, 50)

    def rank(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1] > logits[:, -1, token, None]).sum(-1)

    trace = causal_trace(
        model, inputs, other, sites=("z",), positions=[[last]], answer=token, metric=rank
    )
    _, cache = model.run_with_cache(inputs)
    for layer in range(3):
        edit = Intervention("z", layer, [last], restore(cache))
        restored = rank(model.run_with_hooks(other, interventions=[edit]))
        assert trace.restored[0, 0, layer].item() == float(restored)
    assert (trace.clean, trace.corrupted) == (float(rank(model(inputs))), float(rank(model(other))))
    cut = attention_knockout(model, inputs, [0], [last], answer=token, metric=rank)
    for layer in range(3):
        edit = Intervention("attn_scores", layer, [last], knockout([0]))
        assert cut.values[layer].item() == float(
            rank(model.run_with_hooks(inputs, interventions=[edit]))
        )
    with pytest.raises(ValueError, match="the metric has no gradient"):
        attribution_patching(model, inputs, other, answer=token, metric=rank)


def test_an_activation_is_read_at_all_positions_by_default(seed: int) -> None:
    model, inputs = case(seed)
    recording = model.record(inputs)
    _, every = recording.run([[]], None, read=[("z", 1)])
    _, named = recording.run([[]], None, read=[("z", 1, None)])
    assert torch.equal(every["z", 1], named["z", 1])
    assert every["z", 1].shape[2] == inputs.n_pos


def test_branches_that_can_be_read_only_once(seed: int) -> None:
    """A generator was empty when its branch was run, which then changed nothing."""
    model, inputs = case(seed)
    recording, layer = model.record(inputs), random.randrange(3)
    edit = Intervention("mlp_out", layer, [inputs.n_pos - 1, inputs.n_pos - 2], zero())
    expected = probability(model.run_with_hooks(inputs, interventions=[edit]))
    run = unwrap(Recording.run)
    for plain in (False, True):
        found = run(recording, (iter([edit]) for _ in range(2)), probability, plain=plain)
        assert found.flatten().tolist() == pytest.approx(expected.tolist() * 2, abs=1e-10)
    for wrong, kind in ((edit, "Intervention"), (["mlp_out"], "str"), ("mlp_out", "str")):
        with pytest.raises(TypeError, match=rf"a branch is a list of .* not {kind}"):
            run(recording, [wrong], probability)


def test_a_batched_function_is_told_the_positions_of_each_branch(seed: int) -> None:
    """Also where one branch names all positions, and another gives None."""
    model, inputs = case(seed)
    told: list[Any] = []

    @batched
    def moved(slices: Any, hook: Any, branches: Any, positions: Any) -> Any:
        told.append(None if positions is None else positions.tolist())
        places = torch.arange(inputs.n_pos) if positions is None else positions
        shift = places.expand(len(slices), -1)[:, None, :, None]
        return slices + (1.0 + branches.view(-1, 1, 1, 1)) * shift

    everywhere = list(range(inputs.n_pos))
    for order in ([everywhere, None], [None, everywhere, None]):
        branches = [[Intervention("mlp_out", 1, positions, moved)] for positions in order]
        found = model.record(inputs).run(branches, probability)
        for number, value in enumerate(found[:, 0].tolist()):
            shift = (1.0 + number) * torch.arange(inputs.n_pos, dtype=torch.double)[:, None]
            edit = Intervention("mlp_out", 1, None, add(shift))
            expected = probability(model.run_with_hooks(inputs, interventions=[edit]))
            assert value == pytest.approx(float(expected), abs=1e-9)
        assert told.pop() == [everywhere] * len(order)


def test_one_box_is_no_list_of_regions(seed: int) -> None:
    """Its numbers were taken for four positions."""
    model, inputs = case(seed)
    first = float(inputs.span("image")[0])
    for box in ((first,) * 4, (int(first),) * 4):
        with pytest.raises(ValueError, match="is one box"):
            ablation_scan(model, inputs, "regions", regions=box)


def test_regions_and_heads_in_numbers_of_numpy_and_torch(seed: int, tmp_path: Path) -> None:
    """A box of them was four regions of one visual token each; heads of a layer were not found."""
    model, inputs = case(seed)
    at = int(inputs.span("image")[0])
    for box in (tuple(np.full(4, at)), tuple(np.full(4, at, dtype=np.float32))):
        with pytest.raises(ValueError, match="is one box"):
            named_regions(inputs, box)
    names, found = named_regions(inputs, tuple(np.array([1, 1])))
    assert names == [[0], [0]] and len(found) == 1
    assert unwrap(each_of)(np.int64(5), 2) == [5, 5] == unwrap(each_of)(torch.tensor(5), 2)
    knockout_of = unwrap(attention_knockout)
    options = {"layers": [1], "answer": 5, "window": 1}
    cut, same = (
        knockout_of(model, inputs, "image", "last", heads=heads, **options)
        for heads in ({1: [0]}, {torch.tensor(1): [0]})
    )
    assert torch.equal(cut.values, same.values)
    saved = copy.copy(cut)
    for name, value in (("window", np.int64(1)), ("metadata", {"seed": torch.tensor(seed)})):
        object.__setattr__(saved, name, value)  # frozen, and its signature is checked
    back = type(cut).load(unwrap(type(cut).save)(saved, tmp_path / "it.safetensors"))
    assert (back.window, back.metadata) == (1, {"seed": seed})


def test_a_position_twice_in_a_region_counts_once(seed: int) -> None:
    model = small_model(seed, n_layers=2).double()
    inputs = small_inputs(model, seed)
    inputs = model.inputs_from_tokens(inputs.tokens, inputs.pixel_values.double())
    at = int(random.choice(inputs.span("image").tolist()))
    scan = ablation_scan(model, inputs, "regions", regions=[[at, at]], control=1, answer=5)
    assert scan.regions == ((at,),)


def test_knockout_in_layers_that_are_not_there(seed: int) -> None:
    model, inputs = case(seed)
    with pytest.raises(ValueError, match=r"heads names layers \[99, -1\], .* among 0 ... 2"):
        attention_knockout(model, inputs, "image", "last", heads={1: [0], 99: [0], -1: [0]})


def test_a_lens_that_follows_no_token(seed: int) -> None:
    model, inputs = case(seed)
    with pytest.raises(ValueError, match=r"tokens=\[\]; give at least one"):
        mmlens.logit_lens(model, inputs, tokens=[])


def test_knockout_of_no_head(seed: int) -> None:
    """Nothing was cut, and the effect was 0."""
    model, inputs = case(seed)
    for heads in ([], {}, {1: []}, {0: [0]}):
        with pytest.raises(ValueError, match="names no head in the layers that are cut"):
            attention_knockout(model, inputs, "image", "last", layers=[1], heads=heads)
