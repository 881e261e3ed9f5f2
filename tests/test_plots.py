"""Figures show the numbers they are given, files are whole, the terminal needs no colour."""

from __future__ import annotations

import inspect
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from plotly import io as pio
from rich.console import Console

from mmlens.analyses.trace_result import CausalTrace
from mmlens.plots import save
from mmlens.plots.labels import shorten, visible
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.plots.style import heat_scale
from mmlens.plots.terminal import TerminalHeatmap
from mmlens.plots.trace import plot_trace
from mmlens.utils.files import write_atomically

SITES = ("resid_post", "attn_out", "mlp_out")
TOKENS = ("<img 2,2>", "\n", "The", " capital", " of", " this", " country")


def make_trace(
    labels: tuple[str, ...] = TOKENS,
    n_layers: int = 5,
    sites: tuple[str, ...] = SITES,
    low: float = 0.1,
    corrupted: float = 0.1,
) -> CausalTrace:
    """Random effects between `low` and 0.7."""
    return CausalTrace(
        restored=low + (0.7 - low) * torch.rand(len(sites), len(labels), n_layers),
        clean=0.75,
        corrupted=corrupted,
        sites=sites,
        layers=tuple(range(n_layers)),
        window=1,
        groups=tuple((10 + i,) for i in range(len(labels))),
        group_labels=labels,
        answer=" Rome",
        answer_tokens=(7,),
        method="branch",
        metadata={"model": "demo", "prompt": "<image>\nThe capital"},
    )


def lines_of(trace: CausalTrace, width: int = 80) -> list[str]:
    """What the terminal shows without colours."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(TerminalHeatmap(trace))
    return captured.get().splitlines()


class TestTraceHeatmap:
    def test_one_panel_per_site_holds_the_indirect_effects(self, seed):
        trace = make_trace()
        figure = plot_trace(trace)
        assert len(figure.data) == len(SITES)
        for panel, effect in zip(figure.data, trace.indirect_effect, strict=True):
            assert torch.allclose(torch.tensor(panel.z), effect)
            assert list(panel.x) == list(trace.layers)

    def test_the_axis_shows_the_tokens_and_the_pointer_the_values(self, seed):
        figure = plot_trace(make_trace())
        assert list(figure.layout.yaxis.ticktext) == [
            "‹img 2,2›", "↵", "The", " capital", " of", " this", " country",
        ]  # fmt: skip
        assert "%{z" in figure.data[0].hovertemplate
        assert figure.data[0].customdata[0][0] == "‹img 2,2›"

    def test_a_scale_of_effects_of_one_sign_starts_at_white(self, seed):
        axis = plot_trace(make_trace()).layout.coloraxis
        assert axis.cmin == 0
        assert axis.colorscale[0][1] == "rgb(255, 255, 255)"

    def test_a_scale_of_both_signs_has_white_at_zero(self, seed):
        axis = plot_trace(make_trace(low=0.0, corrupted=0.3)).layout.coloraxis
        assert axis.cmin < 0 < axis.cmax
        share = -axis.cmin / (axis.cmax - axis.cmin)
        _, color = min(axis.colorscale, key=lambda point: abs(point[0] - share))
        assert all(int(part) > 225 for part in color[4:-1].split(","))

    def test_effects_of_nothing_can_be_drawn(self):
        trace = make_trace()
        axis = plot_trace(trace_of(trace, torch.full_like(trace.restored, 0.1))).layout.coloraxis
        assert axis.cmin < axis.cmax

    @pytest.mark.parametrize("name", ["restored", "indirect_effect", "recovery"])
    def test_any_of_the_values_can_be_chosen(self, seed, name):
        trace = make_trace()
        figure = plot_trace(trace, value=name)
        assert torch.allclose(torch.tensor(figure.data[2].z), getattr(trace, name)[2])

    def test_a_wrong_choice_is_an_error_that_names_the_right_ones(self):
        unchecked = inspect.unwrap(plot_trace)  # what runs where no test checks the signature
        with pytest.raises(ValueError, match="'heatmap'"):
            unchecked(make_trace(), kind="pie")
        with pytest.raises(ValueError, match="indirect_effect"):
            unchecked(make_trace(), value="loss")


def trace_of(trace: CausalTrace, restored: torch.Tensor) -> CausalTrace:
    """The same trace with other values."""
    return replace(trace, restored=restored)


class TestTraceProfile:
    def test_few_groups_are_lines_between_clean_and_corrupted(self, seed):
        trace = make_trace(("this country", "last"))
        figure = plot_trace(trace)
        assert {line.name for line in figure.data} == {
            "residual stream", "attention output", "MLP output",
        }  # fmt: skip
        by_panel = [line for line in figure.data if line.name == "MLP output"]
        for group, line in enumerate(by_panel):
            assert torch.allclose(torch.tensor(line.y), trace.restored[2, group])
        levels = {shape.y0 for shape in figure.layout.shapes}
        assert levels == {trace.clean, trace.corrupted}
        texts = [note.text for note in figure.layout.annotations]
        assert "clean" in texts
        assert "corrupted" in texts

    @pytest.mark.parametrize(
        ("gap", "sides"),
        [(0.5, "middle middle"), (0.001, "bottom top"), (0, "bottom top"), (-0.001, "top bottom")],
    )
    def test_lines_that_are_close_have_their_names_on_both_sides(self, seed, gap, sides):
        trace = replace(make_trace(("last",)), clean=0.3 + gap, corrupted=0.3)
        notes = {note.text: note.yanchor for note in plot_trace(trace).layout.annotations}
        assert f"{notes['clean']} {notes['corrupted']}" == sides

    def test_lines_differ_without_colour(self):
        figure = plot_trace(make_trace(("last",)))
        styles = {(line.line.dash, line.marker.symbol) for line in figure.data}
        assert len(styles) == len(SITES)

    def test_recovery_lies_between_zero_and_one(self):
        figure = plot_trace(make_trace(("last",)), value="recovery")
        assert {shape.y0 for shape in figure.layout.shapes} == {0.0, 1.0}

    def test_the_title_says_what_was_traced(self):
        title = plot_trace(make_trace(("last",))).layout.title
        assert "Rome" in title.text
        assert "0.750" in title.text
        assert "demo" in title.subtitle.text
        assert "<image>" not in title.subtitle.text  # plotly would take it for markup

    def test_the_result_draws_itself(self):
        assert make_trace().plot().data


class TestLayerProfile:
    def frame(self) -> pd.DataFrame:
        rows = [
            (model, site, role, layer, mean, mean - 0.1, mean + 0.1)
            for model in ("demo", "language model alone")
            for site in ("attn_out", "mlp_out")
            for role in ("constraint", "last")
            for layer, mean in enumerate(torch.rand(6).tolist())
        ]
        return pd.DataFrame(rows, columns=["model", "site", "role", "layer", "mean", "low", "high"])

    def test_a_line_and_a_band_per_model_and_panel(self, seed):
        df = self.frame()
        figure = plot_layer_profile(df, title="t", subtitle="60 questions")
        lines = [shape for shape in figure.data if shape.fill is None]
        assert len(lines) == 8
        assert sum(bool(line.showlegend) for line in lines) == 2
        first = df[(df.model == "demo") & (df.site == "attn_out") & (df.role == "constraint")]
        assert list(lines[0].y) == first["mean"].tolist()
        band = figure.data[0]
        assert list(band.y) == first["high"].tolist() + first["low"].tolist()[::-1]

    def test_rows_in_any_order_give_the_same_lines(self, seed):
        df = self.frame()
        shuffled = df.sample(frac=1, random_state=1).sort_values(["model", "site", "role"])
        ordered = df.sort_values(["model", "site", "role"], kind="stable")
        assert plot_layer_profile(shuffled) == plot_layer_profile(ordered)

    def test_what_is_missing_is_named(self):
        with pytest.raises(ValueError, match="low, high"):
            plot_layer_profile(self.frame().drop(columns=["low", "high"]))
        with pytest.raises(ValueError, match="no rows"):
            plot_layer_profile(self.frame().iloc[:0])


class TestTerminal:
    def test_every_row_ends_with_its_peak(self, seed):
        trace = make_trace(("this country", "last"))
        lines = lines_of(trace)
        rows = [line for line in lines if " at " in line and "restored" not in line]
        assert len(rows) == 6
        effect = trace.indirect_effect[2, 1]
        best = int(effect.argmax())
        assert rows[5].endswith(f"{effect[best]:+.3f} at {best}")

    def test_many_positions_have_a_block_per_site(self):
        lines = lines_of(make_trace())
        assert [line for line in lines if line in ("residual stream", "MLP output")]
        assert sum("country" in line for line in lines) == len(SITES)

    def test_the_largest_effect_is_dark_and_negative_ones_have_a_sign(self):
        trace = make_trace(("last",), sites=("mlp_out",), n_layers=3)
        trace = trace_of(trace, torch.tensor([[[0.1, 0.7, 0.0]]]))
        row = lines_of(trace)[1]
        assert "  ██" in row
        assert "--" in row

    @pytest.mark.parametrize("n_layers", [1, 4, 32, 48, 200])
    @pytest.mark.parametrize("width", [20, 45, 60, 80, 120])
    def test_it_fits_the_terminal(self, seed, n_layers, width):
        trace = make_trace(n_layers=n_layers, low=0.0, corrupted=0.3)
        for line in lines_of(trace, width):
            assert len(line) <= width

    def test_an_image_is_one_row(self, seed):
        patches = tuple(f"<img {i // 4},{i % 4}>" for i in range(12))
        lines = lines_of(make_trace((*patches, " a", " b", " c")))
        assert sum("image (12 tokens)" in line for line in lines) == len(SITES)
        assert not any("img 0,0" in line for line in lines)

    def test_of_very_many_positions_the_strongest_are_shown(self, seed):
        labels = tuple(f" w{i}" for i in range(200))
        trace = make_trace(labels)
        trace.restored[1, 117, 2] = 0.9
        lines = lines_of(trace)
        assert sum(bool(re.search(r" w\d", line)) for line in lines) == 40 * len(SITES)
        assert sum(" w117 " in line for line in lines) == len(SITES)
        assert lines[-1].startswith("160 positions")

    def test_colours_are_used_where_there_are_some(self):
        console = Console(width=80, color_system="truecolor", force_terminal=True)
        with console.capture() as captured:
            console.print(TerminalHeatmap(make_trace()))
        assert "48;2;254;232;56" in captured.get()  # cividis's yellow, as a background


class TestSaving:
    def test_a_page_needs_no_network(self, tmp_path):
        path = save.save_figure(plot_trace(make_trace()), tmp_path / "trace.html")
        page = path.read_text()
        assert "<script src" not in page
        assert "Plotly.newPlot" in page

    @pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
    def test_an_image(self, tmp_path, require, suffix, magic):
        found = any(map(shutil.which, ("chromium", "google-chrome", "chrome")))
        require(found, "no Chromium for kaleido")
        path = save.save_figure(plot_trace(make_trace()), tmp_path / f"trace.{suffix}")
        assert path.read_bytes().startswith(magic)

    def test_another_suffix_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=r"\.html, \.png"):
            save.save_figure(plot_trace(make_trace()), tmp_path / "trace.xlsx")

    def test_without_kaleido_the_error_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "kaleido", None)
        with pytest.raises(save.FigureNotSaved, match="pip install"):
            save.save_figure(plot_trace(make_trace()), tmp_path / "trace.png")
        assert not list(tmp_path.iterdir())

    def test_without_a_browser_the_error_says_so(self, tmp_path, monkeypatch):
        kaleido = pytest.importorskip("kaleido")
        from kaleido.errors import ChromeNotFoundError

        def fail(*_, **__):
            raise ChromeNotFoundError

        monkeypatch.setattr(kaleido, "calc_fig_sync", fail)
        with pytest.raises(save.FigureNotSaved, match="Chromium"):
            save.save_figure(plot_trace(make_trace()), tmp_path / "trace.png")
        assert not list(tmp_path.iterdir())

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "file"
        path.write_text("old")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, "new")
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
        assert path.read_text() == "old"

    def test_a_file_is_as_readable_as_any_other(self, tmp_path: Path):
        ordinary = tmp_path / "ordinary"
        ordinary.write_text("x")
        path = write_atomically(tmp_path / "file", "x")
        assert path.stat().st_mode == ordinary.stat().st_mode


class TestStyle:
    @pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (-0.2, 0.9), (-1, 0), (-3, 0.5)])
    def test_equal_sizes_have_equal_strength(self, low, high):
        scale = heat_scale(low, high)
        assert [scale[0][0], scale[-1][0]] == [0.0, 1.0]
        unit = max(high, -low)
        full = {"rgb(5, 48, 97)": 1, "rgb(127, 59, 8)": -1}
        for share, color in scale:
            value = (low + (high - low) * share) / unit
            if color in full:
                assert math.isclose(value, full[color])

    def test_labels_stay_on_one_line(self):
        assert visible("a\n<b>") == "a↵‹b›"
        assert len(shorten("x" * 50, 20)) == 20
        assert shorten("short", 20) == "short"


class TestFigure:
    def test_a_figure_saves_itself(self, tmp_path: Path) -> None:
        path = make_trace().plot().save(tmp_path / "trace.html")
        assert "Plotly.newPlot" in path.read_text()

    @pytest.mark.parametrize(
        ("chosen", "variable", "used"),
        [
            ("plotly_mimetype", None, "plotly_mimetype+notebook"),
            ("plotly_mimetype", "plotly_mimetype", "plotly_mimetype"),
            ("json", None, "json"),
        ],
    )
    def test_in_a_notebook_it_brings_its_script_unless_told_otherwise(
        self, monkeypatch, chosen, variable, used
    ) -> None:
        before, shown = pio.renderers.default, []
        monkeypatch.setattr(pio, "show", lambda figure: shown.append(pio.renderers.default))
        monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
        if variable is not None:
            monkeypatch.setenv("PLOTLY_RENDERER", variable)
        try:
            pio.renderers.default = chosen
            plot_trace(make_trace())._ipython_display_()
        finally:
            pio.renderers.default = before
        assert shown == [used]
