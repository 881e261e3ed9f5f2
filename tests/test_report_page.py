"""Pages in a real browser: no network, no errors; what is pointed at lights up everywhere."""

from __future__ import annotations

import base64
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid_inputs import grid_images
from PIL import Image
from plotly import graph_objects as go

from mmlens.analyses.attention_contribution import AttentionContribution
from mmlens.analyses.trace_result import CausalTrace
from mmlens.inputs.image_tokens import Box
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.plots import (
    ReportedPrompt,
    attention,
    heatmap,
    overlay,
    save_figure,
    tokens,
    write_report,
)
from mmlens.plots.overlay import encoded

EVIL = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
WORDS = (" The", " capital", " of", " this", " country", " is")
Open = Callable[[Path], Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright; skipped where there is none, but not in CI."""
    import os

    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if chromium is None or sync_playwright is None:
        reason = "no Chromium" if chromium is None else "no playwright"
        if os.environ.get("CI"):
            pytest.fail(f"CI must have it: {reason}")
        pytest.skip(reason)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox"],
            timeout=120_000,  # a machine may be busy
        )
        yield launched
        launched.close()


@pytest.fixture
def opened(browser) -> Iterator[Open]:
    """Open a file as a page; at the end: no errors, and nothing asked of anybody."""
    complaints: list[str] = []
    pages = []

    def watch(message: Any) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def asked(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            complaints.append(request.url)

    def open_file(path: Path) -> Any:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)  # a machine may be busy
        page.on("console", watch)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", asked)
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_file
    for page in pages:
        page.close()
    assert not complaints


def prompt_of(
    grid: tuple[int, int] = (3, 4), words: tuple[str, ...] = WORDS, question: str | None = None
) -> ReportedPrompt:
    """BOS, an image, words; a frame beyond the image."""
    n = grid[0] * grid[1]
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    content, kind = encoded(Image.fromarray(pixels))
    question = "".join(words).strip() if question is None else question
    return ReportedPrompt(
        image_file=torch.tensor(list(content), dtype=torch.uint8),
        image_kind=kind,
        image_size=(80, 60),
        frames=((0.0, -10.0, 80.0, 70.0),),
        grids=(grid,),
        patches=tuple((1 + i, 0, *divmod(i, grid[1])) for i in range(n)),
        labels=(
            "<s>",
            *(f"<img {i // grid[1]},{i % grid[1]}>" for i in range(n)),
            *words,
        ),
        text=f"<image>\n{question}",
        spans={"constraint": [n + 4, n + 5], "last": [n + len(words)]},
        char_spans={"question": [8, 8 + len(question)], "constraint": [23, 35]},
        answers=((" Rome", 0.75, 0.01), (" Paris", 0.1, 0.6)),
        corruption="“this country” replaced by Paris",
        metadata={"model": "demo"},
    )


def trace_of(prompt: ReportedPrompt, n_layers: int = 6, all_positions: bool = False) -> CausalTrace:
    """Random effects of the words (or of all positions), one at a time."""
    first = 0 if all_positions else 1 + len(prompt.patches)
    at = range(first, len(prompt.labels))
    return CausalTrace(
        restored=torch.rand(2, len(at), n_layers),
        clean=0.75,
        corrupted=0.25,
        sites=("attn_out", "mlp_out"),
        layers=tuple(range(n_layers)),
        window=1,
        groups=tuple((position,) for position in at),
        group_labels=prompt.labels[first:],
        answer=" Rome",
        answer_tokens=(7,),
        method="branch",
        metadata={"model": "demo", "prompt": prompt.text},
    )


def contribution_of(prompt: ReportedPrompt, n_layers: int = 6) -> AttentionContribution:
    """Random norms of everything, received by the constraint and the last token."""
    n = len(prompt.labels)
    destinations = [*prompt.spans["constraint"], *prompt.spans["last"]]
    known = {position: (0, *cell) for position, *cell in prompt.patches}
    return AttentionContribution(
        values=torch.rand(n_layers, len(destinations), n),
        layers=tuple(range(n_layers)),
        source=tuple(range(n)),
        destination=tuple(destinations),
        source_labels=prompt.labels,
        destination_labels=tuple(prompt.labels[position] for position in destinations),
        source_patches=tuple(known.get(position, (-1, -1, -1, -1)) for position in range(n)),
        grids=(prompt.grids,) if prompt.grids else (),
    )


@contextmanager
def reported(tmp_path: Path, prompt: ReportedPrompt, **options: Any) -> Iterator[Path]:
    """A report with everything in it."""
    trace = trace_of(prompt, **options)
    received = contribution_of(prompt)
    yield write_report(tmp_path / "report.html", prompt, trace=trace, contributions=[received])


@pytest.fixture
def report(tmp_path, opened, seed):
    """A small report, open; and what is in it."""
    prompt = prompt_of()
    trace, received = trace_of(prompt), contribution_of(prompt)
    path = write_report(tmp_path / "r.html", prompt, trace=trace, contributions=[received])
    return opened(path), prompt, trace, received


def lit(page: Any, selector: str) -> list[str]:
    """The texts of the elements that are lit."""
    found = page.locator(f"{selector}.lit")
    return [found.nth(i).text_content() for i in range(found.count())]


def number_in(told: str) -> float:
    """The number at the end of what the pointer tells."""
    return float(told.rsplit(": ", 1)[1])


def is_largest(values: torch.Tensor, index: int) -> bool:
    """Up to what the page's four digits leave out."""
    return bool(values[index] >= values.max() - 1e-3)


class TestReport:
    def test_a_patch_lights_up_with_its_image_and_its_number(self, report) -> None:
        page, _, _, received = report
        page.locator(".patch").nth(5).hover()
        assert page.locator(".patch.lit").count() == 1
        assert lit(page, ".token") == ["image (12 tokens)"]
        layer = int(page.locator("#layer").input_value())
        assert is_largest(received.values[:, 1, 1:13].sum(dim=1), layer)
        told = page.locator("#tip").inner_text()
        assert "patch 1,1" in told
        assert number_in(told) == pytest.approx(float(received.values[layer, 1, 6]), abs=1e-3)
        assert "position 6" in page.locator("#layers").text_content()
        page.mouse.move(2, 2)
        assert page.locator(".lit").count() == 0
        assert not page.locator("#tip").is_visible()

    def test_a_token_lights_up_in_every_panel(self, report) -> None:
        page, _, trace, _ = report
        page.locator(".token", has_text="country").hover()
        assert page.locator(".row.lit").count() == len(trace.sites)
        assert lit(page, ".row") == ["country"] * 2

    def test_a_cell_tells_its_number_and_its_layer(self, report) -> None:
        page, _, trace, _ = report
        n_layers, n_rows = len(trace.layers), len(trace.groups)
        cell = page.locator(".cell").nth(n_rows * n_layers + 2 * n_layers + 3)  # MLP, row 2
        cell.hover()
        told = page.locator("#tip").inner_text()
        assert "MLP output, layer 3" in told
        assert number_in(told) == pytest.approx(float(trace.indirect_effect[1, 2, 3]), abs=1e-3)
        assert lit(page, ".token") == [trace.group_labels[2].strip()]
        cell.click()
        assert page.locator("#layer-name").inner_text() == "3"

    def test_layers_and_maps_can_be_chosen(self, report) -> None:
        page, _, _, received = report
        fills = "[...document.querySelectorAll('.patch')].map(p => p.style.fillOpacity)"
        page.locator("#layer").fill("2")
        shown = np.array([float(x) for x in page.evaluate(fills)])
        expected = received.values[2, 1, 1:13].numpy()
        assert np.allclose(shown, 0.9 * expected / expected.max(), atol=1e-3)
        assert page.locator("#map option").all_text_contents() == [
            "received by “this”", "received by “country”", "received by “is”",
            "restored: attention output", "restored: MLP output",
        ]  # fmt: skip
        page.locator("#map").select_option(index=2)
        layer = int(page.locator("#layer").input_value())
        shown = np.array([float(x) for x in page.evaluate(fills)])
        expected = received.values[layer, 2, 1:13].numpy()
        assert np.allclose(shown, 0.9 * expected / expected.max(), atol=1e-3)
        page.locator("#map").select_option(index=4)  # only words were restored
        assert set(page.evaluate(fills)) == {"0"}

    def test_patches_lie_in_the_frame(self, report) -> None:
        page, *_ = report
        first = page.locator(".patch").first
        assert [float(first.get_attribute(name)) for name in ("x", "y", "width", "height")] == (
            pytest.approx([0, -10, 20, 80 / 3])
        )
        assert page.locator("#image svg").get_attribute("viewBox") == "0 -10 80 80"

    def test_the_constraint_is_marked_and_the_answers_are_there(self, report) -> None:
        page, *_ = report
        assert page.locator("h1 mark").inner_text() == "this country"
        assert page.locator("h1").inner_text() == "The capital of this country is"
        table = page.locator("#answers").inner_text()
        for text in ("Rome", "0.750", "0.010", "Paris", "0.600", "replaced by Paris"):
            assert text in table
        assert page.locator(".token.constraint").all_text_contents() == ["this", "country"]

    def test_an_image_that_was_traced_unfolds(self, tmp_path, opened, seed) -> None:
        with reported(tmp_path, prompt_of(), all_positions=True) as path:
            page = opened(path)
        assert page.locator(".row").count() == 2 * 8
        page.locator("#view").select_option(index=1)
        assert page.locator(".row").count() == 2 * 10
        page.locator(".row", has_text="image row 1").first.locator(".cell").first.hover()
        assert page.locator(".patch.lit").count() == 4

    def test_what_users_write_is_text(self, tmp_path, opened, seed) -> None:
        prompt = prompt_of(words=(" The", EVIL, " of", " this", EVIL, " is"), question=EVIL)
        with reported(tmp_path, prompt) as path:
            page = opened(path)
        assert page.evaluate("window.hacked") is None
        assert page.locator("h1").inner_text() == EVIL
        assert page.locator("img").count() == 1  # the image itself
        page.locator(".token").nth(3).hover()
        assert page.evaluate("window.hacked") is None

    @pytest.mark.parametrize("options", ["prompt", "trace", "contributions"])
    def test_any_part_may_be_missing(self, tmp_path, opened, seed, options) -> None:
        prompt = prompt_of()
        parts: dict[str, Any] = {}
        if options == "trace":
            parts["trace"] = trace_of(prompt)
        if options == "contributions":
            parts["contributions"] = [contribution_of(prompt)]
        page = opened(write_report(tmp_path / "r.html", prompt, **parts))
        page.locator(".patch").first.hover()
        assert page.locator("#tip").is_visible()
        assert page.locator("#trace").count() == ("trace" in parts)

    def test_a_prompt_without_an_image(self, tmp_path, opened, seed) -> None:
        labels = ("<s>", *WORDS)
        prompt = replace(
            prompt_of(),
            image_file=torch.zeros(0, dtype=torch.uint8),
            image_kind="",
            frames=(),
            grids=(),
            patches=(),
            labels=labels,
            spans={"constraint": [4, 5], "last": [6]},
        )
        received, trace = contribution_of(prompt), trace_of(prompt)
        path = write_report(tmp_path / "r.html", prompt, trace=trace, contributions=[received])
        page = opened(path)
        assert page.locator("#image, #thumbnail").count() == 0
        layer = int(page.locator("#layer").input_value())
        assert is_largest(received.values[:, 1].sum(dim=1), layer)
        page.locator(".token", has_text="country").hover()
        assert page.locator(".row.lit").count() == 2

    @pytest.mark.parametrize("grid", [(24, 24), (48, 60)])
    def test_a_usual_page_is_small(self, tmp_path, seed, grid) -> None:
        words = tuple(f" w{i}" for i in range(22))
        prompt = prompt_of(grid, words)
        received = contribution_of(prompt, n_layers=32)
        path = write_report(
            tmp_path / "r.html", prompt, trace=trace_of(prompt, 32), contributions=[received]
        )
        assert path.stat().st_size < 10_000_000

    def test_what_is_no_number_is_refused(self, tmp_path, seed) -> None:
        """NaN was shown as 0, and beside an infinity every other number was."""
        prompt = prompt_of()
        received, trace = contribution_of(prompt), trace_of(prompt, all_positions=True)
        at = tuple(int(torch.randint(n, ())) for n in trace.restored.shape)
        for wrong in (torch.nan, torch.inf):
            trace.restored[at] = wrong
            with pytest.raises(ValueError, match=r"1 of \d+ values are NaN or infinite"):
                write_report(tmp_path / "r.html", prompt, trace=trace)
        received.values[0, -1, 3] = torch.nan
        with pytest.raises(ValueError, match="are NaN or infinite, which a report cannot show"):
            write_report(tmp_path / "r.html", prompt, contributions=[received])

    def test_another_suffix_is_an_error(self, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"\.html"):
            write_report(tmp_path / "report.pdf", prompt_of())

    def test_a_saved_prompt_is_the_same(self, tmp_path) -> None:
        prompt = prompt_of()
        prompt.save(tmp_path / "prompt.safetensors")
        loaded = ReportedPrompt.load(tmp_path / "prompt.safetensors")
        for name in (
            "labels",
            "frames",
            "grids",
            "patches",
            "answers",
            "spans",
            "char_spans",
            "text",
        ):
            assert getattr(loaded, name) == getattr(prompt, name)
        assert torch.equal(loaded.image_file, prompt.image_file)


def inputs_of(n: int = 12) -> MultimodalInputs:
    """An image, and words of which one means harm."""
    ids = torch.tensor([[1, *[60] * n, 6, 7]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    visual, (image,) = grid_images(ids, mask, 60, (3, 4))
    return MultimodalInputs(
        tokens=ids,
        attention_mask=mask,
        visual=visual,
        spans=({},),
        images=(replace(image, image=Image.new("RGB", (80, 60), "red")),),
        image_token_id=60,
        str_tokens=(["<s>", *["<image>"] * n, " flag", EVIL],),
    )


class TestFigures:
    def test_the_image_unfolds(self, tmp_path, opened, seed) -> None:
        labels = prompt_of().labels
        figure = heatmap(torch.rand(len(labels), 4), rows=labels, columns=range(4))
        page = opened(figure.save(tmp_path / "f.html"))
        shown = "document.querySelector('.plotly-graph-div').data.map(t => t.visible)"
        assert page.evaluate(shown) == [True, False, False]
        page.locator(".updatemenu-header").click()
        page.locator(".updatemenu-dropdown-button", has_text="every patch").click()
        assert page.evaluate(shown) == [False, False, True]
        ticks = page.locator(".ytick").all_text_contents()
        assert "‹img 2,3›" in ticks

    def test_sliders_of_an_overlay_go_together(self, tmp_path, opened, seed) -> None:
        values = torch.rand(3, 2, 12)
        figure = overlay(values, inputs_of(), frame=Box(0.0, 0.0, 80.0, 60.0))
        page = opened(figure.save(tmp_path / "o.html"))
        div = "document.querySelector('.plotly-graph-div')"
        strongest = page.evaluate(f"{div}.data.map(t => t.visible)").index(True)
        other = 1 - strongest
        sliders = page.locator(".slider-group")
        box = sliders.nth(0).locator(".slider-rail-touch-rect").bounding_box()
        page.mouse.click(
            box["x"] + box["width"] - 3, box["y"] + box["height"] / 2
        )  # the last layer
        box = sliders.nth(1).locator(".slider-rail-touch-rect").bounding_box()
        page.mouse.click(box["x"] + 3 + other * (box["width"] - 6), box["y"] + box["height"] / 2)
        # Playwright's wait_for_function evaluates a text in the page, which its policy forbids.
        for _ in range(600):
            if page.evaluate(f"{div}.data[{other}].visible"):
                break
            page.wait_for_timeout(100)
        z = page.evaluate(f"Array.from({div}.calcdata[{other}][0].z, row => Array.from(row))")
        assert np.allclose(np.array(z), values[2, other].view(3, 4).numpy(), atol=1e-6)


class Scripts(HTMLParser):
    """The scripts of a page that a browser would run, and its content policy."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.policies: list[str] = []
        self.reading = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag == "script" and given.get("type") != "application/json":
            assert "src" not in given
            self.reading = True
            self.found.append("")
        if given.get("http-equiv") == "Content-Security-Policy":
            assert not self.found, "it holds for what comes after it"
            self.policies.append(given["content"])

    def handle_data(self, data: str) -> None:
        if self.reading:
            self.found[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.reading = self.reading and tag != "script"


def pages(folder: Path) -> dict[str, Path]:
    """A page of every kind, all of them with a text that means harm."""
    prompt = prompt_of(words=(" The", EVIL, " of", " this", EVIL, " is"), question=EVIL)
    figure = trace_of(prompt).plot()
    figure.update_layout(title_text=EVIL)
    return {
        "report": write_report(folder / "r.html", prompt, trace=trace_of(prompt)),
        "figure": figure.save(folder / "f.html"),
        "circuits": tokens(torch.rand(15), inputs_of()).save(folder / "t.html"),
    }


def sent_to(server: socket.socket) -> bytes:
    """What anybody sent; Chromium opens connections ahead of requests, and sends nothing then."""
    received = b""
    try:
        while True:
            connection, _ = server.accept()
            connection.settimeout(0.2)
            with connection, suppress(TimeoutError):
                received += connection.recv(100)
    except TimeoutError:
        return received


class TestPolicy:
    def test_it_names_each_script_and_lets_nothing_else_run(self, tmp_path, seed) -> None:
        for kind, path in pages(tmp_path).items():
            scripts = Scripts(path.read_text(encoding="utf-8"))
            [policy] = scripts.policies
            rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
            digests = {
                f"'sha256-{base64.b64encode(sha256(x.encode()).digest()).decode()}'"
                for x in scripts.found
            }
            extra = {"'wasm-unsafe-eval'"} if kind == "circuits" else set()
            assert set(rules["script-src"].split()) == digests | extra, kind
            assert len(scripts.found) == {"report": 1, "figure": 2, "circuits": 1}[kind]
            for name in ("default-src", "base-uri", "form-action"):
                assert rules[name] == "'none'", kind
            assert rules["img-src"] == "data: blob:"
            assert not rules.keys() & {"connect-src", "font-src", "frame-src", "object-src"}

    def test_what_is_smuggled_in_does_not_run(self, tmp_path, seed, browser) -> None:
        """Even if a text got into a page as markup."""
        server = socket.create_server(("127.0.0.1", 0))
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        smuggled = (
            f"<script>window.hacked = 1</script><script src='{address}'></script>"
            f"<img src='{address}' onerror='window.hacked = 1'><img onerror='window.hacked = 1'>"
            f"<iframe src='{address}'></iframe><a id=a href='javascript:window.hacked=1'>a</a>"
            f"<form id=f action='{address}'></form><link rel=stylesheet href='{address}'>"
        )
        for kind, path in pages(tmp_path).items():
            before, _, after = path.read_text(encoding="utf-8").rpartition("</body>")
            path.write_text(f"{before}{smuggled}</body>{after}", encoding="utf-8")
            page = browser.new_page()
            page.set_default_timeout(120_000)  # a machine may be busy
            page.goto(path.as_uri())
            # circuitsvis draws over what comes after it.
            page.evaluate("document.getElementById('f')?.submit()")
            page.evaluate("document.getElementById('a')?.click()")
            page.evaluate(f"fetch('{address}').catch(() => 0)")
            page.wait_for_timeout(200)
            assert page.evaluate("window.hacked") is None, kind
            assert page.url == path.as_uri()
            page.close()
        assert not sent_to(server)
        server.close()

    def test_figures_with_a_title_that_means_harm(self, tmp_path, opened, seed) -> None:
        page = opened(pages(tmp_path)["figure"])
        assert page.locator(".plotly-graph-div .main-svg").count() > 0
        assert page.evaluate("window.hacked") is None
        image = "Plotly.toImage(document.getElementById('plot'), {format: 'png'})"
        assert page.evaluate(f"{image}.then(x => x.slice(0, 22))") == "data:image/png;base64,"

    def test_frames_of_an_animation_are_there(self, tmp_path, opened) -> None:
        shown = {"type": "scatter", "x": [0, 1], "y": [0, 1]}
        frames = [go.Frame(data=[{**shown, "y": [1, 0]}], name="other way")]
        figure = go.Figure(data=[shown], frames=frames)
        page = opened(save_figure(figure, tmp_path / "f.html"))
        page.wait_for_timeout(200)
        named = "document.getElementById('plot')._transitionData._frames.map(f => f.name)"
        assert page.evaluate(named) == ["other way"]


class TestCircuits:
    def test_attention_is_drawn_from_the_disk(self, tmp_path, opened, seed) -> None:
        inputs = inputs_of()
        pattern = torch.rand(1, 3, 15, 15).tril()
        cache = {("pattern", 0): pattern / pattern.sum(dim=-1, keepdim=True)}
        page = opened(attention(cache, 0, inputs).save(tmp_path / "a.html"))
        page.wait_for_selector("text=L0H2")
        page.wait_for_selector("canvas")
        assert page.evaluate("window.hacked") is None

    def test_tokens_are_drawn_from_the_disk(self, tmp_path, opened, seed) -> None:
        inputs = inputs_of()
        page = opened(tokens(torch.rand(15), inputs).save(tmp_path / "t.html"))
        page.wait_for_selector("text=flag")
        page.wait_for_selector("text=image (12 tokens)")
        assert page.evaluate("window.hacked") is None
