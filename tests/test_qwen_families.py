"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: positions, logits, hooks, runs and files equal transformers'."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_checks import (
    check_branches,
    check_greedy_generation,
    check_logits_and_hooks,
    check_saved,
    inputs_of,
)
from checkpoint_folders import load
from qwen_models import FAMILIES, positioned, qwen_activations, random_batch, random_qwen, write
from slow_cases import some_fast
from torch import Tensor

from mmlens import Intervention
from mmlens.checkpoints.errors import CheckpointError
from mmlens.interventions.functions import scale
from mmlens.model.components import KeyValueCache

EVERY = pytest.mark.parametrize("family", FAMILIES)
N_NEW = 7


def checkpoint(family: str, folder: Path, chance: random.Random, **bounds: int) -> Any:
    """Transformers' model and processor, written to a folder."""
    hf = random_qwen(family, chance)
    return hf, write(family, folder, hf, **bounds)


@EVERY
@pytest.mark.parametrize("images", [[1], [1, 0, 3], [0, 0]], ids=str)
def test_logits_and_every_hook_equal_hugging_face(
    family: str, images: list[int], seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    hf, processor = checkpoint(family, tmp_path, chance)
    batch = random_batch(processor, images, chance)

    def of_images(name: str, x: Tensor) -> Tensor:
        """Without the scores of patches that do not attend to each other."""
        return x.masked_fill(x == -torch.inf, 0.0)

    check_logits_and_hooks(
        load(tmp_path),
        hf,
        batch,
        lambda hf: qwen_activations(family, hf, batch),
        of_images=of_images,
    )


def test_more_deepstack_than_layers_is_refused(seed: int, tmp_path: Path) -> None:
    """What the last of them brings could be added nowhere; as many as there are layers can."""
    chance = random.Random(seed)
    n_deepstack = 0
    while n_deepstack < 2:
        hf = random_qwen("qwen3", chance)
        n_deepstack = len(hf.config.vision_config.deepstack_visual_indexes)
    del hf.model.language_model.layers[n_deepstack:]
    hf.config.text_config.num_hidden_layers = n_deepstack
    processor = write("qwen3", tmp_path, hf, least=4)
    model = load(tmp_path)
    _, cache = model.run_with_cache(inputs_of(model, random_batch(processor, [1], chance)))
    assert float(cache["deepstack", n_deepstack - 1].abs().max()) > 0
    file, n_layers = tmp_path / "config.json", n_deepstack - 1
    config = json.loads(file.read_text())
    config["text_config"]["num_hidden_layers"] = n_layers
    file.write_text(json.dumps(config))
    says = f"{n_deepstack} layers of the tower, but the decoder has {n_layers}"
    with pytest.raises(CheckpointError, match=f"deepstack_visual_indexes.*{says}"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"n_deepstack={n_deepstack}, but .*n_layers={n_layers}"):
        replace(model.cfg, n_layers=n_layers)


@EVERY
def test_rotary_positions_equal_hugging_face(family: str, seed: int, tmp_path: Path) -> None:
    """Of several images of different grids, one-row images among them, in padded batches."""
    chance = random.Random(seed)
    hf, processor = checkpoint(family, tmp_path, chance)
    model = load(tmp_path)
    for images in ([1], [3], [1, 0, 2], [0, 4, 1]):
        batch = random_batch(processor, images, chance)
        inputs = inputs_of(model, batch)
        positions, deltas = hf.model.get_rope_index(
            batch["input_ids"],
            batch["mm_token_type_ids"],
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=batch["attention_mask"],
        )
        assert torch.equal(inputs.rope_positions, positions)
        ends = inputs.rope_positions.amax(dim=(0, 2)) + 1
        assert torch.equal(ends - batch["attention_mask"].sum(dim=1), deltas[:, 0])
        row = inputs.rows([len(images) - 1])
        assert torch.equal(row.rope_positions, positions[:, -1:])


@EVERY
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "from the beginning"])
def test_greedy_generation_equals_hugging_face(
    family: str, cached: bool, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    hf, processor = checkpoint(family, tmp_path, chance)
    batch = random_batch(processor, [1, 0, 2], chance)
    batch["pixel_values"] = batch["pixel_values"].double()
    check_greedy_generation(load(tmp_path).double(), hf.double(), batch, 7, cached=[cached])


@EVERY
@torch.no_grad()
def test_an_image_after_a_cache_goes_on_counting(family: str, seed: int, tmp_path: Path) -> None:
    """A prompt in pieces, with an image in each, is the prompt."""
    chance = random.Random(seed)
    _, processor = checkpoint(family, tmp_path, chance)
    model = load(tmp_path).double()
    inputs = inputs_of(model, random_batch(processor, [3], chance))
    expected, cache = model(inputs), KeyValueCache(model.cfg.n_layers)
    cuts = [image.start - 1 for image in inputs.images[1:]]
    pieces, first, grids = [], 0, inputs.visual["image_grid_thw"]
    for i, end in enumerate([*cuts, inputs.n_pos]):
        image = inputs.visual.of([i])
        tokens = inputs.tokens[:, first:end]
        piece = {"pixel_values": image["pixel_values"], "image_grid_thw": grids[i : i + 1]}
        mask = torch.ones_like(tokens)
        pieces.append(model(tokens, attention_mask=mask, past_kv_cache=cache, **piece))
        first = end
    assert torch.equal(cache.rope_positions, inputs.rope_positions)
    assert float((torch.cat(pieces, dim=1) - expected).abs().max()) < 1e-9
    held = cache.prefix(inputs.images[1].start)
    rest = inputs.tokens[:, -1:]
    recorded = model.record(inputs).past
    assert torch.equal(recorded.rope_positions[..., : len(held)], held.rope_positions)
    after = model(rest, past_kv_cache=recorded, attention_mask=torch.ones_like(rest))
    grown = model(inputs.append(rest[0]))[:, -1:]
    assert float((after - grown).abs().max()) < 1e-9
    assert torch.equal(model(rest, past_kv_cache=cache.prefix(0)), model(rest))


@some_fast("family", {name: name for name in FAMILIES}, ["qwen3"])
def test_every_hook_is_alive(family: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    _, processor = checkpoint(family, tmp_path, chance, least=4)
    model = load(tmp_path)
    assert model.verify_hooks(inputs_of(model, random_batch(processor, [2], chance))) == []


@EVERY
def test_branches_equal_plain_runs(family: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    _, processor = checkpoint(family, tmp_path, chance, least=4)
    model = load(tmp_path)
    inputs = inputs_of(model, random_batch(processor, [1, 2], chance))
    visual = inputs.images[0].positions[-2:].tolist()
    layer = chance.randrange(3)
    own = [
        Intervention("vision.mlp_out", layer, [1, 2], scale(1.4)),
        Intervention("vision.pattern", layer, [0, 3], scale(0.3)),
        Intervention("vision.rot_q", layer, None, scale(0.5)),
    ]
    if model.cfg.qk_norm:
        last = [inputs.n_pos - 1, visual[0]]
        own += [
            Intervention(f"{norm}.{site}", layer, last, scale(1.6))
            for norm in ("q_norm", "k_norm")
            for site in ("scale", "normalized")
        ]
    for deep in range(model.cfg.n_deepstack):
        own += [
            Intervention("deepstack", deep, visual, scale(2.5)),
            Intervention("deepstack", deep, None, scale(0.0)),
            Intervention("projector.deepstack.out", deep, [0, 1], scale(1.5)),
        ]
    check_branches(model, inputs, own, chance)


@EVERY
@torch.no_grad()
def test_the_stream_is_the_sum_of_what_is_added(family: str, seed: int, tmp_path: Path) -> None:
    """`resid_post` of a block is `resid_pre` of the next; all that is added sums to the end."""
    chance = random.Random(seed)
    _, processor = checkpoint(family, tmp_path, chance)
    model = load(tmp_path).double()
    _, cache = model.run_with_cache(inputs_of(model, random_batch(processor, [1, 2], chance)))
    n_layers = model.cfg.n_layers
    for layer in range(1, n_layers):
        assert torch.equal(cache["resid_post", layer - 1], cache["resid_pre", layer])
    parts = [cache["hook_input_embed"]]
    for layer in range(n_layers):
        parts += [cache["attn_out", layer], cache["mlp_out", layer]]
        if layer < model.cfg.n_deepstack:
            parts.append(cache["deepstack", layer])
            is_image = cache.inputs.is_image
            assert float(parts[-1][~is_image].abs().max()) == 0 < float(parts[-1].abs().max())
    end = cache["resid_post", n_layers - 1]
    assert float((torch.stack(parts).sum(dim=0) - end).abs().max()) < 1e-12 * float(end.abs().max())


@EVERY
@torch.no_grad()
def test_prompts_share_images_of_the_same_grid(family: str, seed: int, tmp_path: Path) -> None:
    """Recorded keys hold up to the first image that differs, in its patches or in its grid."""
    chance = random.Random(seed)
    _, processor = checkpoint(family, tmp_path, chance, least=6, most=6)
    model = load(tmp_path).double()
    first = inputs_of(model, random_batch(processor, [2], chance))
    grids = first.visual["image_grid_thw"]
    turned = {"image_grid_thw": grids[:, [0, 2, 1]], "pixel_values": first.visual["pixel_values"]}
    others = [
        first.append(torch.tensor([5, 6, 7])),
        model.inputs_from_tokens(first.tokens, **turned),
        first.with_pixels(first.visual["pixel_values"] + 0.5),
    ]
    for inputs, recording in zip(
        [first, *others], model.record_many([first, *others]), strict=True
    ):
        assert float((recording.logits()[:, -1] - model(inputs)[:, -1]).abs().max()) < 1e-9
    root = model.record(first)
    for inputs in others:
        again = root.record(inputs)
        assert float((again.logits()[:, -1] - model(inputs)[:, -1]).abs().max()) < 1e-9
        branch = [Intervention("resid_post", 1, [inputs.n_pos - 1, 1], scale(1.5))]
        branched = again.run([branch], lambda logits: logits)[0]
        plain = again.run([branch], lambda logits: logits, plain=True)[0]
        assert float((branched - plain).abs().max()) < 1e-9


@EVERY
@torch.no_grad()
def test_a_saved_model_opens_in_transformers(family: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    hf, processor = checkpoint(family, tmp_path / "a", chance)
    batch = random_batch(processor, [2, 1], chance)
    model = load(tmp_path / "a")
    model.projector.linear_1.weight.add_(torch.randn_like(model.projector.linear_1.weight) / 9)
    check_saved(model, hf, batch, positioned(batch), tmp_path / "b")
