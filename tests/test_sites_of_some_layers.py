"""Sites that not every layer of the decoder has: deepstack's, and those of the tower's layers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from small_models import small_inputs, small_model
from test_qwen_towers import EVERY, drawn

from mmlens import (
    Intervention,
    ablation_scan,
    attribution_patching,
    causal_trace,
    logit_lens,
    steering_vector,
)
from mmlens.interventions.functions import zero

ANSWER = 5


def other_image(inputs: Any) -> Any:
    """The same prompt with other patches."""
    patches = inputs.visual["pixel_values"]
    return inputs.with_pixels(patches + torch.randn_like(patches))


def ablated(model: Any, inputs: Any, site: str, layer: int) -> float:
    """P(answer) of a plain run without this."""
    edit = Intervention(site, layer, None, zero())
    logits = model.run_with_hooks(inputs, interventions=[edit])
    return float(logits[0, -1].softmax(-1)[ANSWER])


@torch.no_grad()
def test_analyses_of_deepstack_are_of_its_layers(seed: int) -> None:
    model, inputs = drawn("qwen3", random.Random(seed), [1])
    layers = tuple(range(model.cfg.n_deepstack))
    assert 0 < len(layers) <= model.cfg.n_layers
    corrupted = other_image(inputs)
    options: dict[str, Any] = {
        "sites": ("mlp_out", "deepstack"),
        "positions": [inputs.span("image")],
        "answer": ANSWER,
    }
    trace = causal_trace(model, inputs, corrupted, window=2, **options)
    plain = causal_trace(model, inputs, corrupted, window=2, method="naive", **options)
    assert trace.layers == plain.layers == layers
    torch.testing.assert_close(trace.restored, plain.restored, rtol=0, atol=1e-5)
    with torch.enable_grad():
        assert attribution_patching(model, inputs, corrupted, **options).layers == layers
    assert logit_lens(model, inputs, site="deepstack").layers == layers
    scan = ablation_scan(model, inputs, "layers", site="deepstack", answer=ANSWER)
    expected = [ablated(model, inputs, "deepstack", layer) for layer in layers]
    torch.testing.assert_close(scan.values, torch.tensor(expected), rtol=0, atol=1e-5)
    prompts = [inputs], [corrupted]
    vector = steering_vector(model, *prompts, site="deepstack", positions="image")
    assert vector.layers == layers


def test_layers_without_a_site_are_refused(seed: int) -> None:
    model, inputs = drawn("qwen3", random.Random(seed), [1])
    n_layers = model.cfg.n_deepstack
    outside: dict[str, Any] = {"layers": [n_layers]}
    says = rf"layers \[{n_layers}\].* 0 \.\.\. {n_layers - 1}\b.*deepstack"
    with pytest.raises(ValueError, match=says):
        causal_trace(model, inputs, other_image(inputs), sites=("deepstack",), **outside)
    with pytest.raises(ValueError, match=says):
        ablation_scan(model, inputs, "layers", site="deepstack", **outside)
    other = small_model(seed)
    prompt = small_inputs(other, seed)
    with pytest.raises(ValueError, match="'deepstack': this model has none"):
        ablation_scan(other, prompt, "layers", site="deepstack")


@EVERY
@torch.no_grad()
def test_the_towers_heads_and_layers_are_scanned(family: str, seed: int) -> None:
    """All of them, whatever the decoder has."""
    model, inputs = drawn(family, random.Random(seed), [2])
    vision = model.cfg.vision
    heads = ablation_scan(model, inputs, "heads", site="vision.z", answer=ANSWER)
    assert heads.values.shape == (vision.n_layers, vision.n_heads)
    layer, head = random.randrange(vision.n_layers), random.randrange(vision.n_heads)
    expected = ablated(model, inputs, f"vision.z[{head}]", layer)
    assert float(heads.values[layer, head]) == pytest.approx(expected, abs=1e-5)
    layers = ablation_scan(model, inputs, "layers", site="vision.mlp_out", answer=ANSWER)
    expected = ablated(model, inputs, "vision.mlp_out", layer)
    assert float(layers.values[layer]) == pytest.approx(expected, abs=1e-5)


def test_parts_that_a_site_does_not_have_are_refused(seed: int) -> None:
    model, inputs = drawn("qwen2", random.Random(seed), [1])
    for over, options, says in (
        ("heads", {"site": "mlp_out"}, "'mlp_out' has dimensions, and no heads"),
        ("neurons", {"site": "z"}, "'z' has heads"),
        (
            "heads",
            {"site": "vision.z", "positions": "last"},
            "patches of the tower",
        ),
        ("regions", {"site": "projector.out"}, "visual tokens of the connector"),
    ):
        with pytest.raises(ValueError, match=says):
            ablation_scan(model, inputs, over, **options)
