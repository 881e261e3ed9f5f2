"""Positions folded and unfolded, heatmaps of anything, overlays, circuitsvis: without a browser."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from grid_inputs import grid_images
from PIL import Image
from small_models import small_inputs, small_model

from mmlens.analyses.attention_contribution import AttentionContribution
from mmlens.inputs.image_tokens import Box
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.plots import attention, heatmap, overlay, tokens
from mmlens.plots.circuitsvis import HtmlView
from mmlens.plots.folding import foldings
from mmlens.plots.overlay import encoded
from mmlens.plots.save import still


def labels_of(rows: int, columns: int, words: int = 5, class_token: bool = False) -> list[str]:
    """BOS, an image, words."""
    patches = [f"<img {r},{c}>" for r in range(rows) for c in range(columns)]
    return ["<s>", *["<img cls>"] * class_token, *patches, *(f" w{i}" for i in range(words))]


def inputs_with_image(
    rows: int = 3, columns: int = 4, size: tuple[int, int] = (80, 60)
) -> MultimodalInputs:
    """Two words, an image, three words; no model."""
    n = rows * columns
    ids = torch.tensor([[1, 5, *[60] * n, 6, 7, 8]])
    pixels = np.random.default_rng(random.randrange(2**31)).integers(0, 255, (*size[::-1], 3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    visual, (image,) = grid_images(ids, mask, 60, (rows, columns))
    return MultimodalInputs(
        tokens=ids,
        attention_mask=mask,
        visual=visual,
        spans=({"image": torch.arange(2, 2 + n), "last": torch.tensor([n + 4])},),
        images=(replace(image, image=Image.fromarray(pixels.astype(np.uint8))),),
        image_token_id=60,
        str_tokens=(["<s>", " look", *["<image>"] * n, " at", " the", " flag"],),
    )


class TestViews:
    def test_an_image_is_one_row_its_rows_and_its_patches(self) -> None:
        found = foldings(labels_of(3, 4))
        assert [view.name for view in found] == ["folded", "rows", "tokens"]
        assert [len(view.rows) for view in found] == [7, 9, 18]
        assert found[0].rows[1].label == "image (12 tokens)"
        assert found[0].rows[1].members == tuple(range(1, 13))
        assert [row.label for row in found[1].rows[1:4]] == [f"image row {i}" for i in range(3)]
        assert found[2].rows[1].label == "‹img 0,0›"

    def test_a_class_token_stands_with_its_image(self) -> None:
        found = foldings(labels_of(2, 3, class_token=True))
        assert found[0].rows[1].members == tuple(range(1, 8))
        assert found[1].rows[1].label == "‹img cls›"

    def test_two_images_are_two_rows(self) -> None:
        labels = [*labels_of(2, 2), *(f"<img1 {i},0>" for i in range(3))]
        assert [row.label for row in foldings(labels)[0].rows if row.visual] == [
            "image 0 (4 tokens)", "image 1 (3 tokens)",
        ]  # fmt: skip

    def test_nothing_to_fold(self) -> None:
        assert [view.name for view in foldings([" a", " b", " a"])] == ["tokens"]
        assert [view.name for view in foldings([" a", "<img 3,2>"])] == ["tokens"]

    def test_every_position_is_in_one_row(self, seed: int) -> None:
        labels = labels_of(random.randint(1, 5), random.randint(1, 5), random.randint(0, 4))
        for view in foldings(labels):
            members = [member for row in view.rows for member in row.members]
            assert members == list(range(len(labels)))

    def test_folding(self, seed: int) -> None:
        values = np.random.randn(2, 18, 3).astype(np.float32)
        view = foldings(labels_of(3, 4))[0]
        peak, largest = view.fold(values, "peak")
        assert peak.shape == (2, 7, 3)
        picture = values[:, 1:13]
        assert np.array_equal(np.abs(peak[:, 1]), np.abs(picture).max(axis=1))
        where = largest[:, 1][:, None]
        assert np.array_equal(np.take_along_axis(values, where, axis=1)[:, 0], peak[:, 1])
        assert np.allclose(view.fold(values, "sum")[0][:, 1], picture.sum(axis=1), atol=1e-5)
        assert np.allclose(view.fold(values, "mean")[0][:, 1], picture.mean(axis=1), atol=1e-6)
        assert np.array_equal(peak[:, 2:], values[:, 13:])

    def test_views_and_the_ends_of_lines(self) -> None:
        """Rows are those of a view; what is no patch has one row of its own kind."""
        base = [f"<img 0:{r},{c}>" for r in range(2) for c in range(2)]
        lines = [[*(f"<img 1:{r},{c}>" for c in range(3)), "<img newline>"] for r in range(2)]
        found = foldings(["<s>", *base, *lines[0], *lines[1], " w"])
        assert [row.label for row in found[0].rows] == ["‹s›", "image (12 tokens)", " w"]
        rows = {row.label: row.members for row in found[1].rows if row.visual}
        assert rows == {
            "image view 0 row 0": (1, 2),
            "image view 0 row 1": (3, 4),
            "image view 1 row 0": (5, 6, 7),
            "image view 1 row 1": (9, 10, 11),
            "image newline (2)": (8, 12),
        }
        assert list(rows)[-1] == "image newline (2)"
        assert [row.label for row in found[2].rows[8:10]] == ["‹img newline›", "‹img 1:1,0›"]

    def test_separators_between_tiles_stand_with_their_image(self) -> None:
        labels = ["<img row_1_col_1>", "<img 1:0,0>", "<img 1:0,1>", "<img row_1_col_2>",
                  "<img 2:0,0>", "<img 2:0,1>", " w"]  # fmt: skip
        found = foldings(labels)
        assert [row.label for row in found[0].rows] == ["image (6 tokens)", " w"]
        assert [row.label for row in found[1].rows] == [
            "‹img row_1_col_1›", "image view 1 row 0", "‹img row_1_col_2›", "image view 2 row 0",
            " w",
        ]  # fmt: skip

    def test_a_region_is_a_row_of_its_own(self) -> None:
        assert [way.name for way in foldings(["<img 0-1,2-3>", "<img 2-3,0-1>"])] == ["tokens"]


class TestHeatmap:
    def test_views_are_behind_a_menu(self, seed: int) -> None:
        values = torch.randn(2, 18, 4)
        figure = heatmap(values, rows=labels_of(3, 4), columns=range(4), panels=("a", "b"))
        assert len(figure.data) == 6
        assert [trace.visible for trace in figure.data] == [True, True] + [False] * 4
        (menu,) = figure.layout.updatemenus
        assert [button.label for button in menu.buttons] == [
            "image in one row", "rows of the image", "every patch",
        ]  # fmt: skip
        for index, button in enumerate(menu.buttons):
            seen, changes = button.args
            assert seen["visible"] == [i // 2 == index for i in range(6)]
            assert len(changes["yaxis.tickvals"]) == len(changes["yaxis.ticktext"])
        assert torch.equal(torch.tensor(figure.data[5].z), values[1])

    @pytest.mark.parametrize("n", [24, 576, 2880])
    def test_a_readable_height_whatever_the_number_of_patches(self, n: int) -> None:
        labels = labels_of(24 if n > 24 else 4, n // 24 if n > 24 else 6, words=20)
        values = np.zeros((len(labels), 3), dtype=np.float32)
        figure = heatmap(values, rows=labels, columns=range(3))
        for button in figure.layout.updatemenus[0].buttons:
            changes = button.args[1]
            assert 380 <= changes["height"] <= 1800
            at = sorted(changes["yaxis.tickvals"])
            unit = (changes["height"] - 216) / changes["yaxis.range"][0]
            assert min(np.diff(at)) * unit > 12  # pixels: no label on another
            assert sum(" w" in label for label in changes["yaxis.ticktext"]) == 20

    def test_a_chosen_view_comes_first(self) -> None:
        values = np.zeros((18, 2), dtype=np.float32)
        figure = heatmap(values, rows=labels_of(3, 4), columns=(3, 7), visual="rows")
        assert [trace.visible for trace in figure.data] == [False, True, False]
        assert figure.layout.updatemenus[0].active == 1
        assert list(figure.data[1].x) == [3, 7]

    def test_what_does_not_fit_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="2 rows"):
            heatmap(np.zeros((3, 4), dtype=np.float32), rows=["a", "b"], columns=range(4))

    def test_a_file_of_pixels_has_no_menu(self) -> None:
        values = np.zeros((18, 2), dtype=np.float32)
        figure = still(heatmap(values, rows=labels_of(3, 4), columns=(3, 7)))
        assert not figure.layout.updatemenus


class TestOverlay:
    frame = Box(0.0, -10.0, 80.0, 70.0)

    def test_patches_lie_in_the_frame(self, seed: int) -> None:
        inputs = inputs_with_image()
        values = torch.rand(12)
        figure = overlay(values, inputs, frame=self.frame)
        (patches,) = figure.data
        assert np.allclose(patches.x, np.linspace(0, 80, 5))
        assert np.allclose(patches.y, np.linspace(-10, 70, 4))
        assert torch.equal(torch.tensor(patches.z), values.view(3, 4))
        assert not figure.layout.sliders
        (picture,) = figure.layout.images
        assert (picture.sizex, picture.sizey) == (80, 60)
        assert list(figure.layout.yaxis.range) == [70.0, -10.0]  # with its padding

    def test_sliders_over_layers_and_heads(self, seed: int) -> None:
        values = torch.rand(3, 2, 12)
        figure = overlay(values, inputs_with_image(), frame=self.frame, layers=[4, 5, 9])
        layers, heads = figure.layout.sliders
        assert [step.label for step in layers.steps] == ["4", "5", "9"]
        assert [step.label for step in heads.steps] == ["0", "1"]
        for layer, step in enumerate(layers.steps):
            for head, grid in enumerate(step.args[0]["z"]):
                assert torch.equal(torch.tensor(grid), values[layer, head].view(3, 4))
        layer, head = layers.active, heads.active
        sums = values.sum(dim=-1)
        assert torch.isclose(sums[layer, head], sums.max())
        assert [trace.visible for trace in figure.data] == [i == head for i in range(2)]
        assert still(figure).layout.title.text == f"layer {[4, 5, 9][layer]}, head {head}"

    def test_both_signs_have_both_colours(self) -> None:
        values = torch.linspace(-1, 0.5, 12)
        (patches,) = overlay(values, inputs_with_image(), frame=self.frame).data
        assert (patches.zmin, patches.zmax) == (-1, 1)
        assert patches.colorscale[1][1].endswith(",0)")  # zero is clear

    def test_a_contribution(self, seed: int) -> None:
        inputs = inputs_with_image()
        contribution = AttentionContribution(
            values=torch.rand(2, 3, 1, 12),
            layers=(1, 6),
            source=tuple(range(2, 14)),
            destination=(16,),
            source_labels=tuple(inputs.labels()[2:14]),
            destination_labels=(" flag",),
            source_patches=tuple((0, 0, i // 4, i % 4) for i in range(12)),
            grids=(((3, 4),),),
        )
        figure = overlay(contribution, inputs, frame=self.frame)
        assert [step.label for step in figure.layout.sliders[0].steps] == ["1", "6"]
        grid = figure.layout.sliders[0].steps[1].args[0]["z"][2]
        assert torch.equal(torch.tensor(grid), contribution.values[1, 2, 0].view(3, 4))

    def test_what_cannot_be_drawn_is_an_error(self) -> None:
        inputs = inputs_with_image()
        with pytest.raises(ValueError, match="12 visual tokens"):
            overlay(torch.rand(11), inputs, frame=self.frame)
        with pytest.raises(ValueError, match="give frame="):
            overlay(torch.rand(12), inputs)
        with pytest.raises(ValueError, match="image 1 of 1"):
            overlay(torch.rand(12), inputs, frame=self.frame, image=1)
        with pytest.raises(ValueError, match="names"):
            overlay(torch.rand(2, 12), inputs, frame=self.frame, layers=[1])

    def test_images_are_small_files(self, seed: int) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (900, 2000, 3), dtype=np.uint8)
        content, kind = encoded(Image.fromarray(noise))
        assert kind == "jpeg"
        assert len(content) < 1_000_000
        assert encoded(Image.new("RGB", (300, 200), "red"))[1] == "png"


def props_of(html: str) -> str:
    """What circuitsvis is given, after its script."""
    return html[html.rindex("CircuitsVis.render(") :]


class TestCircuits:
    @pytest.fixture
    def run(self, seed: int) -> tuple[HookedMultimodalTransformer, MultimodalInputs]:
        model = small_model(seed)
        return model, small_inputs(model, seed)

    def test_an_image_is_one_token_and_rows_still_sum_to_one(self, run) -> None:
        model, inputs = run
        _, cache = model.run_with_cache(inputs)
        view = attention(cache, 1, inputs)
        props = props_of(view.html)
        n_rows = len(foldings(inputs.labels())[0].rows)
        assert props.count("[[") >= 1
        numbers = re.search(r'"attention": (\[.*?\]\]\])', props)
        assert numbers is not None
        pattern = np.array(eval(numbers[1]))
        assert pattern.shape == (model.cfg.n_heads, n_rows, n_rows)
        assert np.allclose(pattern.sum(axis=-1), 1, atol=1e-5 * n_rows)

    def test_a_cache_knows_what_was_run(self, run) -> None:
        model, inputs = run
        _, cache = model.run_with_cache(inputs)

        def drawn(view: HtmlView) -> str:
            return re.sub(r"circuits-vis-[\w-]+", "", props_of(view.html))  # a name by chance

        assert drawn(attention(cache, 1)) == drawn(attention(cache, 1, inputs))
        _, unknown = model.run_with_cache(cache["resid_pre", 0], start_at_layer=0)
        assert unknown.inputs is None
        with pytest.raises(ValueError, match="which words"):
            attention(unknown, 1)
        assert drawn(attention(unknown, 1, inputs)) == drawn(attention(cache, 1))

    def test_nothing_is_fetched_whether_there_is_a_network_or_not(self, run) -> None:
        model, inputs = run
        _, cache = model.run_with_cache(inputs)
        html = attention(cache, 0, inputs)._repr_html_()
        assert "unpkg.com" not in html
        assert not re.search(r"import\s*{[^}]*}\s*from", html[:200])
        assert len(html) > 1_000_000  # the script is inside

    def test_tokens_and_their_numbers(self, tmp_path) -> None:
        inputs = inputs_with_image()
        values = torch.arange(17.0)
        props = props_of(tokens(values, inputs).html)
        assert '"values": [0.0, 1.0, 13.0, 14.0, 15.0, 16.0]' in props  # the image's largest
        several = tokens(torch.stack([values, -values], dim=1), inputs, names=["<a>", "b"])
        assert "\\u2039a\\u203a" in several.save(tmp_path / "t.html").read_text()

    def test_what_does_not_fit_is_an_error(self) -> None:
        inputs = inputs_with_image(30, 30)
        with pytest.raises(ValueError, match="5 values"):
            tokens(torch.zeros(5), inputs)
        with pytest.raises(ValueError, match="folded"):
            tokens(torch.zeros(905), inputs, visual="tokens")
