"""`attribution_patching(steps=)`: gradients on the way from corrupted to clean embeddings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import qwen_models
import torch
from anyres_checkpoints import random_image
from checkpoint_folders import load
from small_models import small_inputs, small_model
from test_trace_effects import words_swapped
from torch import Tensor

from mmlens import HookedMultimodalTransformer, attribution_patching, swap_image
from mmlens.inputs.multimodal_inputs import MultimodalInputs

Pair = tuple[HookedMultimodalTransformer, MultimodalInputs, MultimodalInputs]


def of_words(seed: int) -> Pair:
    model = small_model(seed, n_layers=3).double()
    clean = small_inputs(model, seed)
    clean = clean.with_pixels(clean.pixel_values.double())
    return model, clean, words_swapped(clean, seed)


def of_images(seed: int, folder: Path) -> Pair:
    """Images enter Qwen3-VL's stream in its first blocks, too."""
    hf = qwen_models.random_qwen("qwen3", random.Random(seed))
    qwen_models.write("qwen3", folder, hf)
    model = load(folder).double()
    clean = model.prepare("Which?", random_image(48, 40))
    return model, clean, swap_image(model, clean, random_image(48, 40), fit=True)


@pytest.mark.parametrize("change", ["words", "images"])
def test_all_effects_together_are_the_change(change: str, seed: int, tmp_path: Path) -> None:
    """They are complete: what embeddings and images do adds up to clean - corrupted.

    A sum at the beginning of n steps is off from the integral by (last - first slope) / 2n and a
    term of order 1 / n^2 (Euler-Maclaurin), so that from n to 2n what remains falls to a fourth.
    """
    model, clean, other = of_words(seed) if change == "words" else of_images(seed, tmp_path)
    n_deepstack = model.cfg.n_deepstack
    assert (n_deepstack > 0) == (change == "images")

    def total(clean: MultimodalInputs, other: MultimodalInputs, steps: int) -> tuple[float, float]:
        everywhere: Any = [list(range(clean.n_pos))]
        options: Any = {"positions": everywhere, "metric": "loss", "answer": 7, "steps": steps}
        found = attribution_patching(model, clean, other, sites=("input_embed",), **options)
        effect = float(found.indirect_effect.sum())
        if n_deepstack:
            layers = range(n_deepstack)
            options |= {"sites": ("deepstack",), "layers": layers}
            effect += float(
                attribution_patching(model, clean, other, **options).indirect_effect.sum()
            )
        return effect, found.clean - found.corrupted

    (first, _), (last, _) = total(clean, other, 1), total(other, clean, 1)
    slopes = -last - first

    def remains(steps: int) -> float:
        effect, change = total(clean, other, steps)
        return abs(effect + slopes / (2 * steps) - change)

    # Of two numbers of steps, since terms of higher orders may cancel at one.
    coarse, fine = max(remains(8), remains(11)), remains(32)
    assert fine <= coarse / 6 + 1e-9  # were there no higher orders: an eighth to a sixteenth


def test_gradients_are_those_of_runs_on_the_way(seed: int) -> None:
    model, clean, other = of_words(seed)
    answer, steps = random.randrange(2, 50), 3
    found = attribution_patching(
        model, clean, other, sites=("mlp_out",), metric="loss", answer=answer, steps=steps
    )
    embeds = [model(each, stop_at_layer=0) for each in (clean, other)]
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    acts = [model.run_with_cache(each, names_filter=names)[1] for each in (clean, other)]
    zeros = {name: torch.zeros_like(acts[0][name], requires_grad=True) for name in names}

    def adding(activation: Tensor, hook: Any) -> Tensor:
        return activation + zeros[hook.name]

    gradients = {name: torch.zeros_like(acts[0][name]) for name in names}
    for step in range(steps):
        resid = embeds[1] + step / steps * (embeds[0] - embeds[1])
        with torch.enable_grad(), model.hooks(fwd_hooks=[(name, adding) for name in names]):
            logits = model(resid, start_at_layer=0, **model.resuming(other, 0))
            loss = -logits[0, -1].log_softmax(-1)[answer]
        for name, part in zip(names, torch.autograd.grad(loss, [*zeros.values()]), strict=True):
            gradients[name] += part / steps
    expected = torch.stack(
        [((acts[0][name] - acts[1][name]) * gradients[name])[0].sum(-1) for name in names], dim=1
    )
    for group, numbers in enumerate(found.groups):
        ours, theirs = found.indirect_effect[0, group], expected[list(numbers)].sum(0)
        assert (ours - theirs).abs().max() <= 1e-9 * (1 + theirs.abs().max())


def test_less_than_one_step_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"steps=0; there must be 1 or more"):
        attribution_patching(*of_words(seed), steps=0)
