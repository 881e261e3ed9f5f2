"""Steering vectors: against the formula in float64, scikit-learn's PCA, and transformers' hooks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from small_models import any_family, picture, small_inputs, small_model, worded_model
from steering_formula import direction
from torch import Tensor

from mmlens import Intervention, SteeringVector, hook_name, steering_vector
from mmlens.analyses.steering_vector import Method
from mmlens.inputs.multimodal_inputs import MultimodalInputs

SITES = ["resid_pre", "resid_post", "attn_out", "mlp_out", "post", "z", "q", "ln1.normalized"]


def pairs_of(model: Any, seed: int, n: int) -> tuple[list[MultimodalInputs], ...]:
    """Prompts of any length, and counterparts with other words and images."""
    return tuple(
        [small_inputs(model, seed + 1000 * side + pair) for pair in range(n)] for side in range(2)
    )


def activations(
    model: Any, prompts: list[MultimodalInputs], name: str, where: str
) -> np.ndarray[Any, Any]:
    """Mean activations [prompt, *unit] at a span, in float64, of runs with everything cached."""
    found = []
    for inputs in prompts:
        _, cache = model.run_with_cache(inputs)
        found.append(cache[name][0, inputs.span(where)].numpy().astype(np.float64).mean(axis=0))
    return np.stack(found)


@pytest.mark.parametrize("method", ["mean_difference", "pca"])
def test_vectors_are_those_of_the_formula(seed: int, method: Method) -> None:
    chance = random.Random(seed)
    model = any_family(seed)
    n = chance.randint(2, 7)
    site, where = chance.choice(SITES), chance.choice(["last", "image", "text"])
    layers = chance.sample(range(model.cfg.n_layers), 2)
    positive, negative = pairs_of(model, seed, n)
    found = steering_vector(
        model, positive, negative, site=site, layers=layers, positions=where, method=method
    )
    assert found.layers == tuple(layers) and found.margins.shape == (2, n)
    for at, layer in enumerate(layers):
        name = hook_name(site, layer)
        sides = [activations(model, prompts, name, where) for prompts in (positive, negative)]
        unit = sides[0].shape[1:]
        flat = [each.reshape(n, -1) for each in sides]
        differences = flat[0] - flat[1]
        norms = np.linalg.norm(np.concatenate(flat), axis=1)
        assert found.vectors.shape[1:] == unit
        assert abs(float(found.activation_norms[at]) - norms.mean()) <= 1e-5 * norms.max()
        # Activations of float32 runs that keep other things differ by some eps of themselves; a
        # component turns by that much over the gap between the largest singular values.
        largest = np.linalg.svd(differences, compute_uv=False)
        gap = 1.0 if method != "pca" else (largest[0] - largest[1]) / largest[0]
        if gap < 0.02:
            continue
        allowed = 1e-5 * norms.max() / gap
        expected = direction(differences, method)
        assert np.abs(found.vectors[at].flatten().numpy() - expected).max() <= allowed
        for pair in range(n):
            others = np.delete(differences, pair, axis=0)
            along = direction(others, method)
            singular = np.append(np.linalg.svd(others, compute_uv=False), 0.0)
            gap = 1.0 if method != "pca" else (singular[0] - singular[1]) / singular[0]
            size = np.linalg.norm(along)
            if gap < 0.02 or size < 0.02 * norms.max():
                continue
            margin = differences[pair] @ along / size
            allowed = 1e-4 * norms.max() ** 2 / (gap * size)
            assert abs(float(found.margins[at, pair]) - margin) <= allowed


def test_the_sign_of_a_component_points_from_negative_to_positive(seed: int) -> None:
    model = small_model(seed)
    positive, negative = pairs_of(model, seed, 5)
    there = steering_vector(model, positive, negative, method="pca")
    back = steering_vector(model, negative, positive, method="pca")
    size = there.vectors.abs().max()
    assert float((there.vectors + back.vectors).abs().max()) <= 1e-5 * float(size)


def planted_pairs(seed: int, n: int) -> tuple[Any, list[Any], list[Any], Tensor]:
    """Prompts whose noise moves the stream along one direction, and by little otherwise."""
    model = small_model(seed)
    direction = torch.randn(model.cfg.d_model)
    direction /= direction.norm()
    sides: list[list[Any]] = [[], []]
    for pair in range(n):
        inputs = small_inputs(model, seed + pair)
        for side, sign in zip(sides, (1.0, -1.0), strict=True):
            noise = 0.01 * torch.randn(1, inputs.n_pos, model.cfg.d_model) + sign * direction
            side.append(inputs.__class__(**{**vars_of(inputs), "noise": noise}))
    return model, sides[0], sides[1], direction


def vars_of(inputs: MultimodalInputs) -> dict[str, Any]:
    return {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}


@pytest.mark.parametrize("method", ["mean_difference", "pca"])
def test_a_planted_direction_is_found_and_generalises(seed: int, method: Method) -> None:
    model, positive, negative, direction = planted_pairs(seed, 6)
    found = steering_vector(
        model, positive, negative, site="resid_pre", layer=0, positions="text", method=method
    )
    cosine = torch.cosine_similarity(found.vectors[0], direction, dim=0)
    assert float(cosine) > 0.99  # noise of 0.01 in at most 25 dimensions, halved by each mean
    assert abs(float(found.vectors[0].norm()) - 2) < 0.1
    assert found.held_out.tolist() == [1.0]
    assert float((found.margins - 2).abs().max()) < 0.2


@pytest.mark.parametrize("site", ["resid_post", "attn_out", "z", "z[0]", "post[1-3]"])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_steering_adds_the_vector_where_it_says(seed: int, site: str, keep_norm: bool) -> None:
    chance = random.Random(seed)
    model = any_family(seed)
    positive, negative = pairs_of(model, seed, 2)
    layers = chance.sample(range(model.cfg.n_layers), 2)
    vector = steering_vector(model, positive, negative, site=site, layers=layers)
    inputs = small_inputs(model, seed + 7)
    positions = chance.sample(range(inputs.n_pos), 2)
    scale = chance.choice([-3.0, 0.5, 2.0])
    if keep_norm and site.startswith("post["):
        with pytest.raises(ValueError, match=r"keep_norm=True is for all of post"):
            vector.at(scale, positions, keep_norm=True)
        return
    # Of the lowest layer alone, since what is above it is already changed by that one.
    lowest = min(layers)
    steered = vector.at(scale, positions, layers=[lowest], keep_norm=keep_norm)
    name = hook_name(site.partition("[")[0], lowest)
    _, before = model.run_with_cache(inputs, names_filter=name)
    with model.hooks(fwd_hooks=steered.fwd_hooks()):
        _, after = model.run_with_cache(inputs, names_filter=name)
    expected = before[name].double()
    added = scale * vector.vectors[layers.index(lowest)].double()
    kept = torch.ones_like(added, dtype=torch.bool)
    if "[" in site:
        kept[:] = False
        kept[[0] if site == "z[0]" else [1, 2, 3]] = True
        assert not added[~kept].any()
    for position in positions:
        moved = expected[0, position] + added
        if keep_norm:
            norms = [x.norm(dim=-1, keepdim=True) for x in (expected[0, position], moved)]
            moved = torch.where(norms[1] > 0, moved * norms[0] / norms[1], moved)
        expected[0, position] = torch.where(kept, moved, expected[0, position])
    largest = float(expected.abs().max() + added.abs().max())
    assert float((after[name].double() - expected).abs().max()) <= 1e-5 * largest


def test_all_layers_are_one_intervention(seed: int) -> None:
    model = small_model(seed, n_layers=3)
    positive, negative = pairs_of(model, seed, 3)
    vector = steering_vector(model, positive, negative)
    assert vector.layers == (0, 1, 2)
    inputs = small_inputs(model, seed + 7)
    hooks = [
        (hook_name("resid_post", layer), lambda x, hook, layer=layer: x + 2 * vector.vectors[layer])
        for layer in range(3)
    ]
    expected = model.run_with_hooks(inputs, fwd_hooks=hooks)
    found = model.run_with_hooks(inputs, fwd_hooks=vector.at(2, None).fwd_hooks())
    assert torch.equal(found, expected)


def test_words_and_images_make_pairs(seed: int, tmp_path: Any) -> None:
    model = worded_model(seed)
    pictures = [picture(seed + index) for index in range(4)]
    positive = [model.prepare("What is this?", each) for each in pictures[:2]]
    negative = [model.prepare("What is this?", each) for each in pictures[2:]]
    of_images = steering_vector(model, positive, negative, layer=1, positions="image")
    of_texts = steering_vector(model, ["The flag", "Paris"], ["A city", "Rome is"], layer=0)
    assert of_images.layers == (1,) and of_texts.layers == (0,)
    assert of_images.metadata["positions"] == "image"
    again = SteeringVector.load(of_images.save(tmp_path / "it.safetensors"))
    assert torch.equal(again.vectors, of_images.vectors) and again.layers == (1,)
    assert again.metadata == of_images.metadata
    table = of_images.to_dataframe()
    assert table["layer"].tolist() == [1]
    norm = of_images.vectors.norm().item()
    assert table["norm"][0] == pytest.approx(norm)
    assert table["held_out"][0] == float((of_images.margins > 0).double().mean())
    assert len(of_images.plot().data) == 2
    alone = steering_vector(model, positive[:1], negative[:1], layer=1)
    assert alone.margins.isnan().all() and alone.held_out.isnan().all()
    alone.plot()


@pytest.mark.parametrize("n_key_value_heads", [None, 1, 2])
def test_a_vector_fits_the_model_it_was_made_with(n_key_value_heads: int | None, seed: int) -> None:
    """Whatever its number of key and value heads; another number does not fit."""
    given: dict[str, Any] = {"n_layers": 2, "n_heads": 4}
    model = small_model(seed, n_key_value_heads=n_key_value_heads, **given)
    another = {None: 2, 1: None, 2: 1}[n_key_value_heads]
    other = small_model(seed, n_key_value_heads=another, **given)
    for site in ("q", "k", "v", "rot_k", "z", "resid_post", "post"):
        [positive], [negative] = pairs_of(model, seed, 1)
        vector = steering_vector(model, [positive], [negative], site=site, positions="text")
        vector.check(model)
        if site in ("k", "v", "rot_k"):
            n = n_key_value_heads or 4
            with pytest.raises(ValueError, match=rf"a vector of \({n}, .* for {site}, which has"):
                vector.check(other)


def test_what_cannot_be_steered_is_refused(seed: int) -> None:
    model = worded_model(seed)
    prompts = [model.prepare("What is this?", picture(seed)) for _ in range(2)]
    other = [model.prepare("What is that?", picture(seed)) for _ in range(2)]
    with pytest.raises(ValueError, match="2 positive prompts and 1 negative ones"):
        steering_vector(model, prompts, other[:1])
    with pytest.raises(TypeError, match=r"positive='I love you' is one text, .* a list, positive="):
        steering_vector(model, "I love you", "I hate you", layer=1)
    with pytest.raises(TypeError, match="negative='No' is one text"):
        steering_vector(model, ["Is", "it"], "No")
    with pytest.raises(ValueError, match="0 positive prompts"):
        steering_vector(model, [], [])
    for site in ("pattern", "vision.resid_post", "input_embed", "projector.out"):
        with pytest.raises(ValueError, match=f"site='{site}'; a steering vector"):
            steering_vector(model, prompts, other, site=site)
    with pytest.raises(ValueError, match="unknown site"):
        steering_vector(model, prompts, other, site="mlp")
    with pytest.raises(ValueError, match="method='lda'"):
        steering_vector(model, prompts, other, method="lda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer or layers"):
        steering_vector(model, prompts, other, layer=0, layers=[1])
    with pytest.raises(ValueError, match="the same resid_post at last"):
        steering_vector(model, prompts, prompts)
    with pytest.raises(KeyError, match="no span is called 'constraint'"):
        steering_vector(model, prompts, other, positions="constraint")
    with pytest.raises(ValueError, match=r"z\[99\]"):
        steering_vector(model, prompts, other, site="z[99]")
    vector = steering_vector(model, prompts, other, layer=0)
    with pytest.raises(ValueError, match=r"layers \[1\]: this vector has \[0\]"):
        vector.at(1, layers=[1])
    assert isinstance(vector.at(1, 3), Intervention)
