"""Names of sites, windows, and what an `Intervention` gives its function and does with it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SITES_WITHOUT_LAYERS, language_model, sites_of, small_inputs, small_model

from mmlens import Intervention, hook_name, window
from mmlens.interventions.functions import add, replace, scale, zero
from mmlens.interventions.intervention import LAYERED_SITES


def all_names(model):
    """Every hook point that a short name can say."""
    names = {hook_name(site) for site in SITES_WITHOUT_LAYERS}
    for layer in range(model.cfg.n_layers):
        names |= {hook_name(site, layer) for site in LAYERED_SITES}
    for layer in range(model.cfg.vision.n_layers):
        names |= {hook_name(f"vision.{site}", layer) for site in LAYERED_SITES}
    return names


def test_every_hook_point_has_a_short_name(seed):
    model = small_model(
        seed, gated_mlp=True, qk_norm=True, post_norms=True, normalization_type="RMS"
    )
    gated, normed = ("rot_q", "rot_k", "pre_linear", "deepstack"), ("attn.out", "mlp.out")
    absent = {
        hook_name(f"vision.{site}", layer)
        for site in LAYERED_SITES
        if site in (*gated, *normed) or "_norm." in site or "_post." in site
        for layer in range(model.cfg.vision.n_layers)
    }
    absent |= {hook_name("deepstack", layer) for layer in range(model.cfg.n_layers)}
    assert all_names(model) - absent == set(model.hook_dict)


@pytest.mark.parametrize(
    ("site", "layer", "says"),
    [
        ("mlp_output", 0, "unknown site 'mlp_output'.*mlp_out"),
        ("vision.embedding", 0, "unknown site"),
        ("mlp_out", None, "needs layers"),
        ("vision.z", None, "needs layers"),
        ("embed", 2, "has no layers"),
        ("projector.out", 0, "has no layers"),
    ],
)
def test_a_wrong_site_is_an_error(site, layer, says):
    with pytest.raises(ValueError, match=says):
        hook_name(site, layer)
    with pytest.raises(ValueError, match=says):
        Intervention(site, layer, None, zero())


MODEL = small_model(0)


@given(n_layers=st.integers(1, 40), center=st.integers(0, 39), width=st.integers(1, 50))
def test_window(n_layers, center, width):
    MODEL.cfg.n_layers = n_layers  # nothing else of it matters here
    without = window("mlp_out", center, width)
    expected = [center - width // 2 + i for i in range(width)]
    assert list(without) == [layer for layer in expected if layer >= 0]
    if center >= n_layers:
        with pytest.raises(ValueError, match="a window around layer"):
            window("mlp_out", center, width, MODEL)
        return
    clipped = list(window("mlp_out", center, width, MODEL))
    assert clipped == [layer for layer in expected if 0 <= layer < n_layers]
    assert center in clipped


def test_windows_of_the_paper():
    assert list(window("mlp_out", 10, 1)) == [10]
    assert list(window("mlp_out", 10, 3)) == [9, 10, 11]
    assert list(window("mlp_out", 10, 5)) == [8, 9, 10, 11, 12]
    assert list(window("mlp_out", 10, 6)) == [7, 8, 9, 10, 11, 12]
    assert list(window("mlp_out", 0, 6)) == [0, 1, 2]


def test_a_window_is_of_the_stack_of_its_site(seed):
    model = small_model(seed, n_layers=5)
    assert list(window("vision.mlp_out", 1, 3, model)) == [0, 1]
    assert list(window("mlp_out", 4, 3, model)) == [3, 4]
    with pytest.raises(ValueError, match="layers are 0 ... 1"):
        window("vision.mlp_out", 2, 1, model)
    with pytest.raises(ValueError, match="no vision tower"):
        window("vision.mlp_out", 0, 1, language_model(seed))


@pytest.mark.parametrize("width", [0, -1])
def test_a_window_has_layers(width):
    with pytest.raises(ValueError, match="at least 1"):
        window("mlp_out", 3, width)
    with pytest.raises(ValueError, match="around layer -1"):
        window("mlp_out", -1, 1)


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_the_function_sees_its_slice_only(seed):
    chance = random.Random(seed)
    model = small_model(seed)
    inputs = small_inputs(model, seed, images=(1, 2))
    site, layer = chance.choice(sites_of(model)), chance.randrange(model.cfg.n_layers)
    positions = chance.sample(range(inputs.n_pos), chance.randint(1, inputs.n_pos))
    name = hook_name(site, layer)
    axis = 2 if site in ("attn_scores", "pattern") else 1
    _, before = model.run_with_cache(inputs, names_filter=name)
    seen = []

    def watch(slice, hook, positions):
        seen.append((slice.clone(), hook.name, positions.tolist()))
        return slice + 1

    edit = Intervention(site, layer, positions, watch)
    with model.hooks(fwd_hooks=edit.fwd_hooks()):
        _, after = model.run_with_cache(inputs, names_filter=name)
    [(slice, at, told)] = seen
    assert at == name
    assert told == positions  # in the order that they were given
    chosen = torch.tensor(positions)
    assert torch.equal(slice, before[name].index_select(axis, chosen))
    expected = before[name].index_copy(axis, chosen, slice + 1)
    assert torch.equal(after[name], expected)


def test_without_positions_it_sees_everything(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    told = []

    def watch(whole, hook, positions=0):
        told.append((whole.shape, positions))

    def bare(whole, hook):
        told.append((whole.shape, None))

    for hook in (watch, bare):
        for site in ("embed", "vision.out"):
            edit = Intervention(site, None, None, hook)
            model.run_with_hooks(inputs, fwd_hooks=edit.fwd_hooks())
    shapes = (1, inputs.n_pos, model.cfg.d_model), (1, model.cfg.vision.n_visual_tokens)
    assert [told[0][0], told[1][0][:2]] == list(shapes)
    assert [positions for _, positions in told] == [None] * 4


def test_leaving_it_as_it_is_and_editing_in_place(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    plain = model(inputs)

    def leave(slice, hook):
        return None

    def in_place(slice, hook):
        slice[:] = 0

    for positions in (None, [1, 2], []):
        unchanged = Intervention("mlp_out", [0, 1], positions, leave).fwd_hooks()
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=unchanged), plain)
        edited, zeroed = (
            model.run_with_hooks(
                inputs, fwd_hooks=Intervention("mlp_out", [0, 1], positions, hook).fwd_hooks()
            )
            for hook in (in_place, zero())
        )
        assert torch.equal(edited, zeroed)
        assert torch.equal(edited, plain) == (positions == [])


def test_layers_and_positions_in_any_form(seed):
    model = small_model(seed, n_layers=4)
    inputs = small_inputs(model, seed)
    forms = [
        ([1, 3], [2, 3, 4]),
        ({3, 1}, torch.tensor([2, 3, 4])),
        (range(1, 4, 2), range(2, 5)),
        ((3, 1, 1), torch.tensor([[4, 2], [3, 2]])),
        (iter([1, 3]), (3, 2, 4, 4)),
    ]
    edits = [Intervention("attn_out", *form, zero()) for form in forms]
    assert {edit.layers for edit in edits} == {(1, 3)}
    results = [model.run_with_hooks(inputs, fwd_hooks=edit.fwd_hooks()) for edit in edits]
    assert all(torch.equal(result, results[0]) for result in results)
    assert Intervention("attn_out", 2, 3, zero()).layers == (2,)
    assert Intervention("attn_out", [], 3, zero()).fwd_hooks() == []


def test_a_list_composes(seed):
    model = small_model(seed, n_layers=3)
    inputs = small_inputs(model, seed)
    at = [2, 4]
    edits = [
        Intervention("mlp_out", 1, at, replace(3.0)),
        Intervention("mlp_out", 1, [4], scale(2.0)),
        Intervention("mlp_out", 1, None, add(1.0)),
    ]
    hooks = [pair for edit in edits for pair in edit.fwd_hooks()]
    name = hook_name("mlp_out", 1)
    _, before = model.run_with_cache(inputs, names_filter=name)
    with model.hooks(fwd_hooks=hooks):
        _, after = model.run_with_cache(inputs, names_filter=name)
    expected = before[name] + 1
    expected[:, 2], expected[:, 4] = 4.0, 7.0
    assert torch.equal(after[name], expected)


@pytest.mark.parametrize(
    ("positions", "error", "says"),
    [
        ([-1], ValueError, "count from 0"),
        (-3, ValueError, "count from 0"),
        ([True, False], TypeError, r"mask.nonzero\(\)"),
        (torch.tensor([0.5]), TypeError, "integers"),
    ],
)
def test_positions_that_are_none(positions, error, says):
    with pytest.raises(error, match=says):
        Intervention("mlp_out", 0, positions, zero())


def test_what_a_model_does_not_have(seed):
    model = language_model(seed, n_layers=3)
    inputs = small_inputs(model, seed, images=(0,))

    def run(*edit):
        return model.run_with_hooks(inputs, fwd_hooks=Intervention(*edit, zero()).fwd_hooks())

    with pytest.raises(IndexError, match=f"there is no {inputs.n_pos}"):
        run("mlp_out", 0, [0, inputs.n_pos])
    with pytest.raises(KeyError, match="blocks.3.hook_mlp_out.*nearest"):
        run("mlp_out", [2, 3], 0)
    with pytest.raises(KeyError, match="vision"):
        run("vision.mlp_out", 0, 0)
    with pytest.raises(KeyError, match="projector"):
        run("projector.out", None, 0)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_another_shape_is_an_error(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    for positions in (None, [1, 2]):
        edit = Intervention("mlp_out", 0, positions, lambda slice, hook: slice[:, :1])
        with pytest.raises(ValueError, match="returned"):
            model.run_with_hooks(inputs, fwd_hooks=edit.fwd_hooks())


def test_gradients_flow_through_the_slice(seed):
    model = small_model(seed)
    inputs = small_inputs(model, seed)
    delta = torch.zeros(model.cfg.d_model, requires_grad=True)
    edit = Intervention("mlp_out", 0, [2, 3], add(delta))
    model.run_with_hooks(inputs, fwd_hooks=edit.fwd_hooks())[0, -1, 5].backward()
    assert delta.grad is not None
    assert delta.grad.abs().max() > 0
