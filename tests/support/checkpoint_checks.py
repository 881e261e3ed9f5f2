"""Checks that the tests of every family with images make of a checkpoint that transformers wrote.

The reference is always transformers' own model or whole forward passes. A `batch` is what
transformers' processor of the family gives, and `given` what its model is called with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import load
from PIL import Image
from rounding import assert_same, rounded_otherwise
from test_branching import assert_equal_to_plain_runs
from test_branching_families import any_edit
from torch import Tensor
from transformers import GenerationConfig

from mmlens import Intervention, causal_trace, swap_image
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import scale
from mmlens.model.transformer import HookedMultimodalTransformer

# Inputs


def inputs_of(model: HookedMultimodalTransformer, batch: Mapping[str, Any]) -> MultimodalInputs:
    """Make mmlens's inputs of a batch of transformers' processor."""
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    return model.inputs_from_tokens(batch["input_ids"], **rest)


def positioned(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with rotary positions that leave out padding, which transformers would count."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def check_same_images(inputs: MultimodalInputs, others: MultimodalInputs) -> None:
    """Assert that two inputs have the same images, in the same places, with the same cells."""
    assert (inputs.visual is None) == (others.visual is None)
    if inputs.visual is not None and others.visual is not None:
        assert inputs.visual.counts == others.visual.counts
        for name, tensor in inputs.visual.items():
            assert torch.equal(tensor, others.visual[name]), name
    for one, other in zip(inputs.images, others.images, strict=True):
        assert (one.row, one.start, one.grids) == (other.row, other.start, other.grids)
        assert torch.equal(one.cells, other.cells)


# Numbers


def check_logits_and_hooks(
    model: HookedMultimodalTransformer,
    hf: Any,
    batch: Mapping[str, Any],
    activations: Callable[[Any], tuple[Any, dict[str, Tensor]]],
    *,
    of_images: Callable[[str, Tensor], Tensor] = lambda name, x: x,
    visible: Callable[[str], Tensor] | None = None,
) -> None:
    """Assert that logits and the activation of every hook equal transformers'.

    Padding, and what a query may not attend to, is left out. The logits are compared twice, since
    attention and norms take fused kernels where nothing listens.

    Args:
        model: made of transformers' files.
        hf: transformers' model.
        batch: what both are called with.
        activations: transformers' output, and what it computes under our names.
        of_images: what is compared of an activation of tower or connector.
        visible: which keys a query may attend to at the hook of that name, [batch, query, key];
            those up to its own position, where this is not given.
    """
    real = batch["attention_mask"].bool()
    n_pos = real.shape[1]
    causal = torch.ones(n_pos, n_pos, dtype=torch.bool).tril() & real[:, None]

    def compared(name: str, x: Tensor) -> Tensor:
        if name.startswith(("vision.", "projector.")):
            return of_images(name, x)
        if not name.endswith(("hook_attn_scores", "hook_pattern")):
            return x[real]
        seen = causal if visible is None else visible(name)
        return x.masked_fill(~seen[:, None], 0.0).transpose(1, 2)[real]

    def theirs(hf: Any) -> dict[str, Tensor]:
        output, found = activations(hf)
        found = {**found, "logits": output.logits, "fused logits": output.logits}
        return {name: compared(name, x) for name, x in found.items()}

    expected = theirs(hf)
    with torch.no_grad():
        logits, cache = model.run_with_cache(**batch)
        ours = {**cache, "logits": logits, "fused logits": model(**batch)}
    ours = {name: compared(name, x) for name, x in ours.items()}
    assert expected["logits"].std() > 0.1  # tiny logits would show nothing
    assert_same(ours, expected, lambda: theirs(rounded_otherwise(hf)))


def check_greedy_generation(
    model: HookedMultimodalTransformer,
    hf: Any,
    batch: Mapping[str, Any],
    n_new: int,
    cached: Iterable[bool] = (True,),
) -> None:
    """Assert that a batch is continued greedily as by transformers, token for token.

    The image token is suppressed there, since a prompt's text cannot continue with it here.

    Args:
        model: made of transformers' files. Its generation settings are replaced by empty ones.
        hf: transformers' model, of the same dtype; likewise.
        batch: the prompts.
        n_new: how many tokens are added.
        cached: whether keys and values are kept: each of these is tried.
    """
    hf.generation_config, model.generation_config = GenerationConfig(), GenerationConfig()
    theirs = hf.generate(
        **batch,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        suppress_tokens=[model.cfg.image_token_id],
        pad_token_id=0,
    )
    for use in cached:
        of_batch = model.generate(
            **batch, max_new_tokens=n_new, stop_at_eos=False, use_past_kv_cache=use
        )
        assert torch.equal(of_batch, theirs)
    inputs = inputs_of(model, batch)
    of_inputs = model.generate(inputs, n_new, return_type="tokens", stop_at_eos=False)
    assert torch.equal(of_inputs, theirs)


@torch.no_grad()
def check_saved(
    model: HookedMultimodalTransformer,
    hf: Any,
    batch: Mapping[str, Any],
    given: Mapping[str, Any],
    folder: Path,
) -> HookedMultimodalTransformer:
    """Edit a model, save it, and assert that transformers opens the edited model, as we do.

    Weights of a block of the decoder and of the tower are edited here, others by the caller before.

    Args:
        model: made of transformers' files.
        hf: transformers' model of the same files.
        batch: what the model is called with.
        given: what transformers' is called with.
        folder: where it is saved.

    Returns:
        What mmlens opens there.
    """
    model.blocks[1].mlp.W_out[2:5].mul_(-2.0)
    model.vision.blocks[0].attn.W_V[0].mul_(3.0)
    model.save_pretrained(folder)
    reread = type(hf).from_pretrained(folder)
    real = batch["attention_mask"].bool()

    def theirs(hf: Any) -> Tensor:
        return hf(**given).logits[real]

    ours = model(**batch)[real]
    assert_same(ours, theirs(reread), lambda: theirs(rounded_otherwise(reread)))
    assert float((ours - theirs(hf)).abs().max()) > 1e-2
    again = load(folder)
    assert torch.equal(again(**batch)[real], ours)
    return again


# Branches and traces


@torch.no_grad()
def check_branches(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    own: Iterable[Intervention],
    chance: random.Random,
    n_random: int = 8,
) -> None:
    """Assert that branches equal plain runs: random ones, and one of each of these interventions.

    Those that every family has are added: at visual tokens, at the last position, and on both
    sides of the connector.
    """
    branches = [
        [any_edit(model, inputs, chance) for _ in range(chance.choice([1, 1, 2]))]
        for _ in range(n_random)
    ]
    visual = inputs.images[0].positions[-2:].tolist()
    layer = chance.randrange(3)
    always = [
        Intervention("mlp_out", layer, visual, scale(1.7)),
        Intervention("resid_post", layer, [inputs.n_pos - 1], scale(1.3)),
        Intervention("projector.in", None, [0, 3], scale(1.4)),
        Intervention("projector.out", None, [1], scale(1.4)),
    ]
    branches += [[one] for one in (*always, *own)]
    assert_equal_to_plain_runs(model, inputs, branches, chance, batch_rows=chance.choice([None, 3]))


@torch.no_grad()
def check_shared_images(model: HookedMultimodalTransformer, images: Sequence[Image.Image]) -> None:
    """Assert that prompts on one image encode it once, and are continued as if they had not.

    Two prompts are about the first image and one is about the second.
    """
    asked = [model.prepare(text, images[0]) for text in ("Which country?", "Which flag is it?")]
    asked.append(model.prepare("Which country?", images[1]))
    runs, forward = [], model.vision.forward
    model.vision.forward = lambda *a, **k: runs.append(1) or forward(*a, **k)
    recordings = model.record_many(asked)
    recordings.append(recordings[0].record(asked[1]))
    asked.append(asked[1])
    assert len(runs) == 2
    for inputs, recording in zip(asked, recordings, strict=True):
        plain = model(inputs)[:, -1]
        assert float((recording.logits()[:, -1] - plain).abs().max()) < 1e-4


@torch.no_grad()
def check_traces_over_tiles(
    model: HookedMultimodalTransformer,
    image: Image.Image,
    other: Image.Image,
    of_connector: Sequence[str],
    layer: int,
) -> MultimodalInputs:
    """Assert that traces over images in tiles equal whole passes; and fit images to each other.

    Args:
        model: whose images are tiles.
        image: of two tiles at least.
        other: of another size.
        of_connector: sites of the connector that are traced beside those of decoder and tower.
        layer: of decoder and tower.

    Returns:
        The clean inputs.
    """
    clean = model.prepare("Which country?", image)
    with pytest.raises(ValueError, match="give one of the same size, or fit=True"):
        swap_image(model, clean, other)
    corrupted = swap_image(model, clean, other, fit=True)
    fitted = model.prepare("Which country?", other.resize(image.size, Image.Resampling.BICUBIC))
    assert torch.equal(corrupted.visual["pixel_values"], fitted.visual["pixel_values"])
    whole, tile = (clean.images[0].block((0, 0, 1, 1), view=view) for view in (0, 2))
    groups: dict[str, list[Any]] = {
        "resid_post": [whole, tile, clean.span("last"), clean.patches((0, 0, 20, 20))],
        "vision.mlp_out": [[0], [3, 5]],
        **{site: [[0], [2]] for site in of_connector},
    }
    for site, positions in groups.items():
        layers = None if site.startswith("projector.") else [layer]
        given: dict[str, Any] = {"positions": positions, "layers": layers, "window": 1}
        found, expected = (
            causal_trace(model, clean, corrupted, sites=(site,), method=method, **given)
            for method in ("branch", "naive")
        )
        assert float((found.restored - expected.restored).abs().max()) < 1e-5
        assert float((expected.restored - expected.corrupted).abs().max()) > 0
    return clean
