"""Positions in one tile of the tower: interventions, branches, traces and their labels."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from anyres_checkpoints import random_image
from small_tiled_models import tiled_model

from mmlens import CausalTrace, Intervention, InTile, causal_trace, hook_name, swap_image
from mmlens.analyses.trace_grid import labels_at
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import add, restore, scale, zero
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.plots.folding import foldings
from mmlens.plots.report.page import trace_data, trace_maps

SITES = [
    *("vision.resid_pre", "vision.mlp_out", "vision.z", "vision.pattern", "vision.embed"),
    *("vision.patch_embed", "vision.out", "projector.in", "projector.pre"),
]
TEXT = "who made this place"


@pytest.fixture(params=[False, True], ids=["NeXT", "OneVision"])
def model(request: Any, seed: int) -> HookedMultimodalTransformer:
    return tiled_model(seed, onevision=request.param).double()


@pytest.fixture
def inputs(model: HookedMultimodalTransformer) -> MultimodalInputs:
    found = model.prepare(TEXT, random_image(50, 33))
    assert found.visual is not None
    pixels = found.visual["pixel_values"].double()
    return replace(found, visual=found.visual.replaced(pixel_values=pixels))


def layer_of(site: str) -> int | None:
    return (
        0 if site in ("vision.resid_pre", "vision.mlp_out", "vision.z", "vision.pattern") else None
    )


def by_hand(tile: int, positions: list[int], value: torch.Tensor, axis: int) -> Any:
    """A plain hook function that writes into one row of the tower."""

    def written(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = activation.clone()
        changed[tile].index_copy_(
            axis - 1,
            torch.tensor(positions),
            value[tile].index_select(axis - 1, torch.tensor(positions)),
        )
        return changed

    return written


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_one_tile_is_edited(
    site: str, model: HookedMultimodalTransformer, inputs: MultimodalInputs
) -> None:
    """Against a plain hook function, in a run and in branches that share a pass."""
    assert inputs.pixel_values is not None
    name, n_tiles = hook_name(site, layer_of(site)), len(inputs.pixel_values)
    axis = model.SITES[site].position_axis
    _, cache = model.run_with_cache(inputs, names_filter=[name])
    other = torch.rand_like(cache[name])
    branches, expected = [], []
    for tile in range(n_tiles):
        some = random.sample(range(other.shape[axis]), 3)
        branches.append(
            [Intervention(site, layer_of(site), InTile(tile, some), restore({name: other}))]
        )
        hooks = [(name, by_hand(tile, some, other, axis))]
        expected.append(model.run_with_hooks(inputs, fwd_hooks=hooks)[0, -1])
        found = model.run_with_hooks(inputs, interventions=branches[-1])[0, -1]
        assert torch.allclose(found, expected[-1], atol=1e-10)
    found = model.record(inputs).run(branches, lambda logits: logits[:, -1])
    assert torch.allclose(found[:, 0], torch.stack(expected), atol=1e-10)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-9
    everywhere = [Intervention(site, layer_of(site), some, zero())]
    each = [Intervention(site, layer_of(site), InTile(t, some), zero()) for t in range(n_tiles)]
    together = (model.run_with_hooks(inputs, interventions=it) for it in (everywhere, each))
    assert torch.allclose(*together, atol=1e-10)


@torch.no_grad()
def test_a_trace_of_single_tiles(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, tmp_path: Path
) -> None:
    corrupted = swap_image(model, inputs, random_image(50, 33))
    assert inputs.pixel_values is not None
    n_tiles = len(inputs.pixel_values)
    n = len(labels_at(model, inputs, "vision.mlp_out"))
    whole = [InTile(tile, range(n)) for tile in range(n_tiles)]
    given: dict[str, Any] = {"sites": ("vision.mlp_out",), "layers": [0, 1], "answer": 7}
    groups = [*whole, whole, range(n), InTile(2, 1), [InTile(0, [1, 2]), InTile(1, [1])]]
    trace, naive = (
        causal_trace(model, inputs, corrupted, positions=groups, method=method, **given)
        for method in ("branch", "naive")
    )
    assert torch.allclose(trace.restored, naive.restored, atol=1e-10)
    assert torch.allclose(trace.restored[:, n_tiles], trace.restored[:, n_tiles + 1], atol=1e-10)
    for layer in (0, 1):
        name = hook_name("vision.mlp_out", layer)
        _, clean = model.run_with_cache(inputs, names_filter=[name])
        hooks = [(name, by_hand(2, [1], clean[name], 1))]
        logits = model.run_with_hooks(corrupted, fwd_hooks=hooks)
        expected = float(logits[0, -1].softmax(-1)[7])
        assert float(trace.restored[0, -2, layer]) == pytest.approx(expected, abs=1e-10)
    first = 1 if model.cfg.vision and model.cfg.vision.class_token else 0
    side = model.cfg.vision.grid[0] if model.cfg.vision else 0
    at = {position: divmod(position - first, side) for position in range(first, n)}
    assert trace.group_labels[-2] == ("<patch 2:{},{}>".format(*at[1]))
    assert trace.groups[-1] == (1, 2, 1)
    trace.save(tmp_path / "trace.safetensors")
    read = CausalTrace.load(tmp_path / "trace.safetensors")
    assert read.metadata["tiles"][-1] == [0, 0, 1] and read.metadata["tiles"][-3] == [None] * n
    assert list(read.to_dataframe()["label"].unique()) == list(dict.fromkeys(trace.group_labels))
    read.plot(kind="heatmap")
    plain = causal_trace(model, inputs, corrupted, positions=[1], **given)
    assert plain.group_labels == ("<patch *:{},{}>".format(*at[1]),)
    assert "tiles" not in plain.metadata
    # Patch 1 of a tile is not word 1 of the prompt: the report page marks no word.
    assert marked(plain) == [] and trace_maps(plain) == []
    words = causal_trace(model, inputs, corrupted, positions=[1], **given | {"sites": ("mlp_out",)})
    assert marked(words) == [1] and len(trace_maps(words)) == 1


def test_a_position_of_a_tile_counts_once(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs
) -> None:
    """Also where two parts of a group name it."""
    corrupted = swap_image(model, inputs, random_image(50, 33))
    trace = causal_trace(
        model,
        inputs,
        corrupted,
        sites=("vision.mlp_out",),
        positions=[[InTile(1, [1, 2]), InTile(0, 3), InTile(1, [2, 4])], InTile(1, [1, 2, 4])],
        answer=7,
    )
    assert trace.groups == ((1, 2, 4, 3), (1, 2, 4))
    assert trace.metadata["tiles"] == [[1, 1, 1, 0], [1, 1, 1]]


def marked(trace: CausalTrace) -> list[int]:
    """The words that the report page marks for rows of a trace."""
    rows = trace_data(trace)["views"][0]["rows"]
    return [position for row in rows for position in row["at"]]


def test_labels_name_tile_and_patch(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs
) -> None:
    assert model.cfg.vision is not None
    every, third = (labels_at(model, inputs, "vision.resid_post", tile) for tile in (None, 2))
    assert third == [label.replace("*", "2") for label in every]
    if model.cfg.vision.class_token:
        assert (every[0], third[0]) == ("<cls *>", "<cls 2>")
    both = foldings([*third, *labels_at(model, inputs, "vision.resid_post", 0)])
    rows = next(way.rows for way in both if way.name == "rows")
    shown = [row.label for row in rows if row.visual]
    grid = range(model.cfg.vision.grid[0])
    assert shown == [f"image tile {tile} row {row}" for tile in (2, 0) for row in grid]
    one = replace(inputs, visual=None, images=(), tokens=inputs.tokens * 0)
    assert labels_at(model, one, "vision.resid_post")[-1].count(":") == 0


def test_what_is_no_tile_is_refused(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs
) -> None:
    assert inputs.pixel_values is not None
    n_tiles = len(inputs.pixel_values)
    for site, layer in [("mlp_out", 0), ("projector.out", None), ("input_embed", None)]:
        with pytest.raises(ValueError, match="no tiles"):
            Intervention(site, layer, InTile(0, 1), zero())
    with pytest.raises(IndexError, match=f"tiles 0 ... {n_tiles - 1}"):
        beyond = [Intervention("vision.z", 0, InTile(n_tiles, 1), scale(2.0))]
        model.run_with_hooks(inputs, interventions=beyond)
    for wrong in (
        (-1, [0]),
        (0, []),
        (0, [-2]),
        (0, torch.tensor([0.5])),
        (0, torch.tensor([True])),
    ):
        with pytest.raises(ValueError, match="count from 0|integers"):
            InTile(*wrong)
    corrupted = swap_image(model, inputs, random_image(50, 33))
    given: dict[str, Any] = {"sites": ("vision.z",), "answer": 7}
    for positions, why in [
        ([InTile(n_tiles, 0)], "counted from 0"),
        ([[InTile(0, 0), 1]], "not both"),
        ([InTile(0, 10_000)], "not among"),
    ]:
        with pytest.raises(ValueError, match=why):
            causal_trace(model, inputs, corrupted, positions=positions, **given)


def test_an_edit_in_place_stays_in_its_tile(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs
) -> None:
    def in_place(activation: torch.Tensor, hook: Any) -> None:
        activation.mul_(-3.0).add_(1.0)

    edits = [Intervention("vision.resid_post[1]", 0, InTile(1, [2, 3]), it) for it in (in_place,)]
    with torch.no_grad():
        _, before = model.run_with_cache(inputs, names_filter="vision.blocks.0.hook_resid_post")
        _, after = model.run_with_cache(
            inputs, names_filter="vision.blocks.0.hook_resid_post", interventions=edits
        )
    name = "vision.blocks.0.hook_resid_post"
    changed = (before[name] != after[name]).nonzero().tolist()
    assert changed == [[1, 2, 1], [1, 3, 1]]
    assert torch.allclose(after[name][1, 2:4, 1], before[name][1, 2:4, 1] * -3 + 1)
    assert Intervention("vision.z", 0, InTile(0, torch.tensor([4, 4])), add(1.0)).tile == 0
