"""What is computed on models of tiles: caches of batches, contributions, traces and sweeps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from anyres_checkpoints import random_image
from small_tiled_models import tiled_model
from sweep_cases import SETTINGS, in_order

from mmlens import attention_contribution, causal_trace, swap_image
from mmlens.analyses.trace_grid import labels_at
from mmlens.data import VisualQuestion
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps import sweep

SIZES = [(31, 52), (77, 20), (8, 8), (40, 41), (12, 90)]
ROWS = [[(31, 52)], [(77, 20), (9, 9)], [], [(12, 90)]]
TEXTS = ["who made this place", "is this place near", "this place has a", "name this place"]


@pytest.fixture(params=[False, True], ids=["NeXT", "OneVision"])
def model(request: Any, seed: int) -> HookedMultimodalTransformer:
    return tiled_model(seed, onevision=request.param)


def a_batch(model: HookedMultimodalTransformer) -> tuple[MultimodalInputs, list[MultimodalInputs]]:
    """Rows with other numbers of tiles, as a batch and each alone."""
    images = [[random_image(*size) for size in row] for row in ROWS]
    alone = [model.prepare(*each) for each in zip(TEXTS, images, strict=True)]
    return model.prepare(TEXTS, images), alone


@torch.no_grad()
def test_rows_of_a_cache_are_those_of_a_run_of_these_rows(
    model: HookedMultimodalTransformer,
) -> None:
    inputs, alone = a_batch(model)
    _, cache = model.run_with_cache(inputs)
    for row, own in enumerate(alone):
        _, expected = model.run_with_cache(own)
        sliced = cache.apply_slice_to_batch_dim([row])
        seen = {name for name in sliced if name.startswith(("vision.", "projector."))}
        assert seen == {n for n in expected if n.startswith(("vision.", "projector."))}
        for name in [*seen, "blocks.1.hook_resid_post", "ln_final.hook_normalized"]:
            ours = sliced[name] if name in seen else sliced[name][:, -own.n_pos :]
            assert ours.shape == expected[name].shape, name
            assert float((ours - expected[name]).abs().max()) < 1e-4, name


@torch.no_grad()
def test_contributions_lie_in_the_views(model: HookedMultimodalTransformer) -> None:
    inputs = model.prepare(TEXTS[0], random_image(*random.choice(SIZES)))
    found = attention_contribution(model, inputs, inputs.span("image"), [inputs.n_pos - 1])
    _, cache = model.run_with_cache(inputs)
    assert len(found.grids[0]) == 2
    for layer in range(model.cfg.n_layers):
        attention: Any = model.blocks[layer].attn
        pattern = cache["pattern", layer][0, :, -1]  # [head, key]
        repeats = model.cfg.n_heads // model.cfg.n_kv_heads
        values = cache["v", layer][0].repeat_interleave(repeats, dim=1)
        moved = torch.einsum("hk, khd, hdm -> km", pattern, values, attention.W_O).norm(dim=-1)
        for view, (rows, columns) in enumerate(found.grids[0]):
            grid = found.image_grid(0, view)[layer, 0]
            expected = [
                [float(moved[inputs.patch(row, column, view=view)]) for column in range(columns)]
                for row in range(rows)
            ]
            assert torch.allclose(grid, torch.tensor(expected), atol=1e-5)


@torch.no_grad()
def test_traces_at_every_stack(model: HookedMultimodalTransformer) -> None:
    clean = model.prepare(TEXTS[0], random_image(50, 33))
    corrupted = swap_image(model, clean, random_image(50, 33))
    assert model.cfg.vision is not None and clean.visual is not None
    rows, columns = model.cfg.vision.grid
    assert len(clean.visual["pixel_values"]) > 2
    everything = range(len(labels_at(model, clean, "vision.resid_post")))
    n_visual = len(clean.images[0].positions)
    options: dict[str, Any] = {"answer": 7, "window": 1}
    for site, positions in [("vision.mlp_out", everything), ("projector.out", range(n_visual))]:
        options |= {"sites": (site,), "positions": [positions, [1]]}
        branched = causal_trace(model, clean, corrupted, **options)
        naive = causal_trace(model, clean, corrupted, method="naive", **options)
        assert torch.allclose(branched.restored, naive.restored, atol=1e-5)
    # All visual tokens restored: that is the clean run.
    assert float(branched.restored[0, 0, 0]) == pytest.approx(branched.clean, abs=1e-5)
    labels = labels_at(model, clean, "vision.patch_embed")
    assert labels[-1] == f"<patch *:{rows - 1},{columns - 1}>"
    few = replace(clean, visual=None, images=(), tokens=clean.tokens * 0)
    assert labels_at(model, few, "vision.patch_embed")[-1] == f"<patch {rows - 1},{columns - 1}>"
    labels = labels_at(model, clean, "projector.out")
    assert len(labels) == n_visual and labels[-1] == "<img newline>"


@pytest.mark.parametrize("task", ["trace", "contributions"])
def test_sweeps_over_images_of_other_sizes(
    task: str, model: HookedMultimodalTransformer, tmp_path: Path
) -> None:
    """Together, in shards and batches, as one question after the other."""
    model = model.double()
    questions = []
    for row in range(5):
        path = tmp_path / f"{row % 3}.png"
        if not path.exists():
            random_image(*SIZES[row % 3]).save(path)
        questions.append(
            VisualQuestion(
                question=TEXTS[row % 4],
                image=path,
                visual_constraint="this place",
                subject=f"subject {row % 3}",
                source=f"made/{row}",
            )
        )
    settings = SETTINGS if task == "trace" else {"progress": False, "shard_size": 3}
    together = sweep(task, model, questions, tmp_path / "together", **settings)
    single = {**settings, "shard_size": 1}
    apart = sweep(task, model, questions, tmp_path / "apart", **single)
    assert together.n_done == apart.n_done == len(questions)
    assert together.failures().empty and apart.failures().empty
    pd.testing.assert_frame_equal(in_order(together), in_order(apart), rtol=1e-5, atol=1e-5)
