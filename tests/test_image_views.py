"""An image that a model sees whole and in tiles: overlays, the report, regions, foldings."""

from __future__ import annotations

import math
import random
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from small_tiled_models import noise_picture, tiled_model
from test_report_page import browser, opened  # noqa: F401
from tiled_models import FAMILIES, random_idefics, write

from mmlens import HookedMultimodalTransformer, causal_trace, mean_image, swap_span
from mmlens.analyses.attention_contribution import attention_contribution
from mmlens.analyses.image_regions import masked_positions
from mmlens.inputs.image_tokens import Box
from mmlens.inputs.position_labels import region_label, visual_label
from mmlens.plots import TerminalHeatmap, attention, overlay, tokens, write_report
from mmlens.plots.folding import foldings
from mmlens.plots.image_mesh import ImageMesh
from mmlens.plots.report.page import report_page
from mmlens.plots.report.prompt import ReportedPrompt, reported_prompt

QUESTION = "What is the capital of this country?"


@pytest.fixture
def tiled(seed):
    """A model, and a prompt with one image of any shape."""
    model = tiled_model(seed, onevision=seed % 2 == 1)
    size = random.randint(20, 90), random.randint(20, 90)
    inputs = model.prepare(
        QUESTION, noise_picture(seed, *size), spans={"constraint": "this country"}, template=None
    )
    return model, inputs


def expected_at(values, image, x, y):
    """The mean of the cells that show a point, one of each view; NaN where none does."""
    found = []
    for number, view in enumerate(image.views):
        if view.box is None or not math.prod(view.grid):
            continue
        left, top, right, bottom = view.box
        column = math.floor((x - left) / (right - left) * view.grid[1])
        row = math.floor((y - top) / (bottom - top) * view.grid[0])
        if 0 <= row < view.grid[0] and 0 <= column < view.grid[1]:
            cells = image.cells[image.is_visual].tolist()
            found.append(float(values[cells.index([number, row, column])]))
    return np.mean(found) if found else math.nan


class TestOverlay:
    def test_all_views_are_a_mean_over_the_image(self, tiled):
        """Points anywhere in the image, by the geometry of each view on its own."""
        _, inputs = tiled
        image = inputs.images[0]
        values = torch.randn(len(image.positions))
        (drawn,) = overlay(values, inputs, view="all").data
        x, y, z = (np.asarray(each, dtype=float) for each in (drawn.x, drawn.y, drawn.z))
        assert z.shape == (len(y) - 1, len(x) - 1) and (np.diff(x) > 0).all()
        chance = random.Random(len(x))
        for _ in range(40):
            at = chance.uniform(x[0], x[-1]), chance.uniform(y[0], y[-1])
            column, row = np.searchsorted(x, at[0]) - 1, np.searchsorted(y, at[1]) - 1
            found = z[row, column]
            assert found == pytest.approx(expected_at(values, image, *at), abs=1e-5, nan_ok=True)

    def test_one_view_shows_its_tokens_own_values(self, tiled):
        _, inputs = tiled
        image = inputs.images[0]
        values = torch.randn(2, len(image.positions))
        for view, (rows, columns) in enumerate(image.grids):
            (drawn,) = overlay(values, inputs, view=view, layers=[3, 5]).data
            step = overlay(values, inputs, view=view).layout.sliders[0].steps[1]
            of_view = (image.cells[image.is_visual][:, 0] == view).nonzero().flatten()
            grid = torch.tensor(np.asarray(step.args[0]["z"][0]))
            assert torch.equal(grid, values[1, of_view].view(rows, columns))
            box = image.views[view].box
            assert (drawn.x[0], drawn.x[-1]) == pytest.approx((box.left, box.right))
            assert (drawn.y[0], drawn.y[-1]) == pytest.approx((box.top, box.bottom))

    def test_the_pointer_tells_the_cells_of_each_view(self, tiled):
        _, inputs = tiled
        image = inputs.images[0]
        values = torch.randn(len(image.positions))
        (drawn,) = overlay(values, inputs, view="all").data
        cells = {f"view {v}: row {r}, column {c}": i for i, (v, r, c) in
                 enumerate(image.cells[image.is_visual].tolist())}  # fmt: skip
        for texts, numbers in zip(drawn.customdata, drawn.z, strict=True):
            for text, number in zip(texts, numbers, strict=True):
                named = [values[cells[name]] for name in text.split("<br>") if name]
                mean = float(torch.stack(named).mean()) if named else math.nan
                assert number == pytest.approx(mean, abs=1e-5, nan_ok=True)

    def test_contributions_of_some_views(self, tiled):
        model, inputs = tiled
        image = inputs.images[0]
        seen = attention_contribution(model, inputs, "image", "constraint", per_head=True)
        means = seen.values.mean(dim=2)  # over destinations
        whole = overlay(seen, inputs, view="all")
        alone = overlay(means, inputs, view="all")
        for one, other in zip(whole.data, alone.data, strict=True):
            np.testing.assert_allclose(one.z, other.z, atol=1e-6)
        fine = attention_contribution(model, inputs, image.block((0, 0, 1, 1), 1), "last")
        assert np.isfinite(np.asarray(overlay(fine, inputs, view=1).data[0].z)).sum() == 1
        with pytest.raises(ValueError, match="view 0"):
            overlay(fine, inputs, view=0)
        assert np.isfinite(np.asarray(overlay(fine, inputs, view="all").data[0].z)).any()

    def test_grids_by_view(self, tiled):
        model, inputs = tiled
        seen = attention_contribution(model, inputs, "image", "last")
        for view, (rows, columns) in enumerate(inputs.images[0].grids):
            grid = seen.image_grid(view=view)
            assert grid.shape[-2:] == (rows, columns)
            at = inputs.patch(rows - 1, 0, view=view)
            assert torch.equal(grid[:, 0, rows - 1, 0], seen[:, 0, seen.source.index(at)])

    def test_what_cannot_be_drawn_is_an_error(self, tiled):
        model, inputs = tiled
        values = torch.rand(len(inputs.images[0].positions))
        with pytest.raises(ValueError, match=r"view=2; this image has 2 view"):
            overlay(values, inputs, view=2)
        with pytest.raises(ValueError, match="that of one view"):
            overlay(values, inputs, view="all", frame=Box(0, 0, 9, 9))
        other = model.prepare(QUESTION, noise_picture(0, 30, 30), template=None)
        small = model.prepare(QUESTION, noise_picture(0, 30, 90), template=None)
        seen = attention_contribution(model, other, "image", "last")
        with pytest.raises(ValueError, match="patches, but image 0 of these"):
            overlay(seen, small)

    @pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 2000), (3, 1)])
    def test_images_of_extreme_shapes(self, seed, size):
        """A view may have no patch at all: everything that is left of it is padding."""
        model = tiled_model(seed)
        inputs = model.prepare(QUESTION, noise_picture(seed, *size), template=None)
        values = torch.rand(len(inputs.images[0].positions))
        (drawn,) = overlay(values, inputs, view="all").data
        assert np.isfinite(np.asarray(drawn.z, dtype=float)).any()
        prompt = reported_prompt(model, inputs)
        assert len(prompt.patches) == int((inputs.images[0].cells[:, 0] >= 0).sum())
        report_page(prompt)

    def test_a_view_without_patches_says_so(self, seed):
        model = tiled_model(seed, side=4)
        size = random.choice([(900, 1), (1, 900)])
        inputs = model.prepare(QUESTION, noise_picture(seed, *size), template=None)
        values = torch.rand(len(inputs.images[0].positions))
        calls = [
            lambda: overlay(values, inputs, view=1),
            lambda: inputs.patch(0, 0, view=1),
            lambda: inputs.tiles(1, 1, view=1),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="view 1 of this image has no patches"):
                call()
        assert inputs.patch(0, 0) == inputs.images[0].start


def test_tiles_that_lie_side_by_side(seed):
    """One view for each tile, as Idefics has them: each area is one cell of the whole and one."""
    from mmlens.inputs.image_tokens import ImageTokens, grid_cells

    n_rows, n_columns = random.randint(1, 3), random.randint(1, 3)
    tiles = [(row, column) for row in range(n_rows) for column in range(n_columns)]
    width, height = 30 * n_columns, 20 * n_rows
    boxes = [Box(0, 0, width, height)] + [
        Box(30 * column, 20 * row, 30 * column + 30, 20 * row + 20) for row, column in tiles
    ]
    cells = torch.cat([grid_cells((2, 2), view=view) for view in range(len(boxes))])
    image = ImageTokens(
        3, cells, ((2, 2),) * len(boxes), image=noise_picture(seed, width, height),
        boxes=lambda size: boxes,
    )  # fmt: skip
    mesh = ImageMesh.of(image, "all")
    values = np.random.default_rng(seed).normal(size=len(cells)).astype(np.float32)
    means = mesh.mean(values)
    assert ((mesh.tokens >= 0).sum(axis=0) == 2).all()
    middles = (mesh.x[1:] + mesh.x[:-1]) / 2, (mesh.y[1:] + mesh.y[:-1]) / 2
    for column, x in enumerate(middles[0]):
        for row, y in enumerate(middles[1]):
            assert means[row, column] == pytest.approx(expected_at(values, image, x, y), abs=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_views_of_idefics(seed, kind, tmp_path):
    """A view for each tile, with text between them that belongs to the image and is no patch."""
    write(FAMILIES[kind], tmp_path, random_idefics(FAMILIES[kind]))
    model = HookedMultimodalTransformer.from_pretrained(tmp_path).requires_grad_(False)
    size = random.randint(20, 90), random.randint(20, 90)
    inputs = model.prepare(QUESTION, noise_picture(seed, *size), template=None)
    (image,) = inputs.images
    values = torch.randn(len(image.positions))
    (drawn,) = overlay(values, inputs, view="all").data
    x, y, z = (np.asarray(each, dtype=float) for each in (drawn.x, drawn.y, drawn.z))
    for _ in range(40):
        at = random.uniform(x[0], x[-1]), random.uniform(y[0], y[-1])
        found = z[np.searchsorted(y, at[1]) - 1, np.searchsorted(x, at[0]) - 1]
        assert found == pytest.approx(expected_at(values, image, *at), abs=1e-5, nan_ok=True)
    told = [visual_label(label) for label in inputs.labels()]
    inside = range(image.start, image.start + image.length)
    assert [at for at, label in enumerate(told) if label] == list(inside)
    assert [at for at in inside if not told[at].mark] == image.positions.tolist()
    folded = foldings(inputs.labels())[0]
    assert [row.label for row in folded.rows if row.visual] == [f"image ({image.length} tokens)"]
    page = report_page(reported_prompt(model, inputs))
    assert page.count(" patches)") == len(image.views)
    everything = inputs.patches((-99, -99, 199, 199))
    assert torch.equal(everything, image.positions)
    corrupted = mean_image(model, inputs)
    left = inputs.patches((0, 0, size[0] / 2, size[1]))
    trace = causal_trace(model, inputs, corrupted, positions=[left, everything], layers=[0])
    assert trace.group_labels[1] == region_label([inputs.labels()[at] for at in everything])
    assert "0:" in trace.group_labels[1]


class TestRegions:
    def test_a_trace_takes_boxes_of_the_image(self, tiled):
        model, inputs = tiled
        width, height = inputs.images[0].image.size
        left = inputs.patches((0, 0, width / 2, height))
        right = inputs.patches((width / 2, 0, width, height))
        corrupted = swap_span(model, inputs, "constraint", "flag")
        with pytest.raises(ValueError, match="same"):
            causal_trace(model, inputs, inputs, positions=[left, right])
        trace = causal_trace(
            model, corrupted, inputs, positions=[left, right, inputs.span("last")], layers=[0, 1]
        )
        assert trace.groups[:2] == (tuple(left.tolist()), tuple(right.tolist()))
        for label, positions in zip(trace.group_labels, (left, right), strict=False):
            cells = inputs.grid[0, positions][:, 1:].tolist()
            for view in {view for view, _, _ in cells}:
                rows = [row for at, row, _ in cells if at == view]
                ends = f"{min(rows)}-{max(rows)}" if min(rows) < max(rows) else f"{rows[0]}"
                assert f"{view}:{ends}," in label
        assert trace.group_labels[2] == inputs.labels()[-1]
        figure = trace.plot(kind="heatmap")
        assert any("img" in str(text) for text in figure.layout.yaxis.ticktext)

    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            (["<img 3,5>", "<img 3,6>", "<img 4,5>", "<img 4,6>"], "<img 3-4,5-6>"),
            (["<img 3,5>", "<img 4,6>"], "<img 3-4,5-6 (2 of 4)>"),
            (["<img1 0:3,5>", "<img1 1:7,9>", "<img1 1:7,10>"], "<img1 0:3,5 1:7,9-10>"),
            (["<patch 0,0>", "<patch 1,0>"], "<patch 0-1,0>"),
            (["<patch *:0,0>", "<patch *:1,0>"], "<patch *:0-1,0>"),
            (["<img 3,5>"], None),
            (["<img 3>", "<img 4>"], None),
            (["<img 3,5>", "<img newline>"], None),
            (["<img 3,5>", "<img1 3,6>"], None),
            (["<img 3,5>", " word"], None),
            ([], None),
        ],
    )
    def test_labels(self, labels, expected):
        assert region_label(labels) == expected
        if expected:
            assert visual_label(expected) is None

    def test_labels_of_positions_are_read_back(self, tiled):
        _, inputs = tiled
        for label, (image, view, row, column) in zip(
            inputs.labels(), inputs.grid[0].tolist(), strict=True
        ):
            told = visual_label(label)
            if image < 0:
                assert told is None
            elif view < 0:
                assert told is not None and told.mark == "newline"
            else:
                assert told == ("img", view, row, column, "") and told.image == image


class TestViewsElsewhere:
    def test_circuitsvis_and_the_terminal(self, tiled):
        model, inputs = tiled
        _, cache = model.run_with_cache(inputs)
        assert "view 1 row 0" in attention(cache, 0, visual="rows").html
        assert "image newline" in tokens(torch.randn(inputs.n_pos), inputs, visual="rows").html
        corrupted = swap_span(model, inputs, "constraint", "flag")
        trace = causal_trace(model, corrupted, inputs, positions=range(inputs.n_pos), layers=[0])
        console = Console(file=StringIO(), width=100)
        console.print(TerminalHeatmap(trace))
        n = len(inputs.images[0].positions)
        assert f"image ({n} tokens)" in console.file.getvalue()

    def test_the_report_knows_every_view(self, tiled, tmp_path):
        model, inputs = tiled
        prompt = reported_prompt(model, inputs)
        image = inputs.images[0]
        assert prompt.grids == image.grids
        assert prompt.frames == tuple(view.box for view in image.views)
        for position, view, row, column in prompt.patches:
            assert position == inputs.patch(row, column, view=view)
        prompt.save(tmp_path / "p.safetensors")
        again = ReportedPrompt.load(tmp_path / "p.safetensors")
        assert (again.frames, again.grids) == (prompt.frames, prompt.grids)
        assert report_page(again) == report_page(prompt)


def test_a_view_is_chosen_on_the_page(tiled, tmp_path: Path, opened):  # noqa: F811
    model, inputs = tiled
    seen = attention_contribution(model, inputs, "image", "last")
    path = write_report(tmp_path / "r.html", reported_prompt(model, inputs), contributions=[seen])
    page = opened(path)
    image = inputs.images[0]
    choose = page.locator("#image-view")
    assert choose.locator("option").count() == 3
    mesh = ImageMesh.of(image, "all")
    shown = int((mesh.tokens >= 0).any(axis=0).sum())
    assert page.locator(".patch").count() == shown
    fills = "[...document.querySelectorAll('.patch')].map(p => p.style.fillOpacity)"
    layer = int(page.locator("#layer").input_value())
    means = mesh.mean(seen.values[layer, 0].numpy())
    means = means[np.isfinite(means)]
    found = np.array([float(x) for x in page.evaluate(fills)])
    assert np.allclose(found, 0.9 * means / means.max(), atol=2e-3)
    for view, (rows, columns) in enumerate(image.grids):
        choose.select_option(index=view + 1)
        assert page.locator(".patch").count() == rows * columns
        page.locator(".patch").last.hover()
        told = page.locator("#tip").inner_text()
        assert f"patch {view}:{rows - 1},{columns - 1}" in told
        last = seen.source.index(inputs.patch(rows - 1, columns - 1, view=view))
        value = float(seen.values[layer, 0, last])
        assert float(told.rsplit(": ", 1)[1]) == pytest.approx(value, rel=2e-3, abs=1e-3)
        page.locator(".token", has_text="image").hover()
        assert page.locator(".patch.lit").count() == rows * columns


@pytest.mark.parametrize("size", [(2000, 3), (3, 2000), (3, 1), (61, 17), None], ids=str)
def test_all_of_an_image_is_every_token_that_shows_some(seed, size):
    """Patches that are mostly padding, too: of a strip a whole view may be made of such ones."""
    model = tiled_model(seed, onevision=seed % 2 == 1)
    width, height = size or (random.randint(1, 120), random.randint(1, 120))
    inputs = model.prepare(QUESTION, noise_picture(seed, width, height), template=None)
    (image,) = inputs.images
    seen = []
    for offset, (view, row, column) in enumerate(image.cells.tolist()):
        if view < 0:
            continue
        left, top, right, bottom = image.views[view].cell_box(row, column)
        if min(right, width) > max(left, 0) and min(bottom, height) > max(top, 0):
            seen.append(image.start + offset)
    assert inputs.patches((0, 0, width, height)).tolist() == seen
    everywhere = masked_positions(inputs, np.ones((height, width), dtype=bool))
    assert set(everywhere.tolist()) <= set(seen)


def test_a_box_that_is_smaller_than_a_patch(tiled):
    """It is never nothing: the patches that hold most of it, in the whole image and in tiles."""
    _, inputs = tiled
    image = inputs.images[0]
    for view, (rows, cols) in enumerate(image.grids):
        row, col = random.randrange(rows), random.randrange(cols)
        cell = image.views[view].cell_box(row, col)
        x, y = (cell.left + cell.right) / 2, (cell.top + cell.bottom) / 2
        width, height = image.image.size
        if not (0 < x < width and 0 < y < height):
            continue  # padding
        found = inputs.patches((x - 1e-3, y - 1e-3, x + 1e-3, y + 1e-3)).tolist()
        assert inputs.patch(row, col, view=view) in found
        assert len(found) <= 4 * len(image.grids)
        assert any(image.cells[at - image.start, 0] == 0 for at in found)
        mask = np.zeros((height, width), dtype=bool)
        mask[int(y), int(x)] = True
        marked = masked_positions(inputs, mask)
        in_tiles = image.cells[marked - image.start, 0] > 0
        assert bool((~in_tiles).any()) and (view == 0 or bool(in_tiles.any()))
    with pytest.raises(ValueError, match="no visual token shows the box"):
        inputs.patches((-5000.0, -5000.0, -4999.0, -4999.0))
