"""Every kind of plot as a PNG, for images of 24, 576 and 2,880 tokens, and one seen in two views.

    python tests/support/make_gallery.py FOLDER

To be looked at. On random models that answer nothing, so that it takes a minute: what counts is
the layout.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console
from small_models import small_config
from small_tiled_models import tiled_model
from small_tokenizers import small_tokenizer

import mmlens
from mmlens import CausalTrace, HookedMultimodalTransformer, MultimodalInputs
from mmlens.analyses.attention_contribution import attention_contribution
from mmlens.analyses.attention_knockout import attention_knockout
from mmlens.analyses.attribution_patching import attribution_patching
from mmlens.analyses.direct_logit_attribution import direct_logit_attribution
from mmlens.analyses.logit_lens import logit_lens
from mmlens.plots import (
    Figure,
    TerminalHeatmap,
    attention,
    overlay,
    reported_prompt,
    tokens,
    write_report,
)

GRIDS = ((4, 6), (24, 24), (48, 60))
QUESTION = "What is the capital of this country? Answer in a few words."


def model_of(grid: tuple[int, int], n_layers: int = 24) -> HookedMultimodalTransformer:
    """A random model whose images have such a grid."""
    tokenizer = small_tokenizer("bytes")
    cfg = small_config(
        random.Random(0),
        n_layers=n_layers,
        d_model=24,
        d_vocab=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        bos_token_id=tokenizer.bos_token_id,
    )
    assert cfg.vision is not None
    size = tuple(4 * side for side in grid)
    cfg.vision = replace(cfg.vision, image_size=size, select="default")
    cfg.n_ctx = 4096
    model = HookedMultimodalTransformer(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.2, generator=generator)

    def process(pictures: list[Image.Image]) -> torch.Tensor:
        resized = [picture.convert("RGB").resize(size[::-1]) for picture in pictures]
        pixels = [
            torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in resized
        ]
        return torch.stack([each.view(*size, 3).permute(2, 0, 1) / 64.0 - 2.0 for each in pixels])

    model.tokenizer, model.image_processor = tokenizer, process
    return model


def write_all(model: HookedMultimodalTransformer, picture: Path, folder: Path) -> Iterator[Path]:
    """Every kind of plot that has positions in it; gives the files."""
    inputs = model.prepare(QUESTION, picture, spans={"constraint": "this country"})
    n = len(inputs.span("image"))
    corrupted = mmlens.swap_span(model, inputs, "constraint", "Paris")
    words = [inputs.span("constraint"), inputs.span("last")]
    trace = mmlens.causal_trace(model, inputs, corrupted)
    received = attention_contribution(model, inputs, range(inputs.n_pos), torch.cat(words))
    figures: dict[str, Figure] = {
        "trace": trace.plot(),
        "trace-roles": mmlens.causal_trace(model, inputs, corrupted, positions=words).plot(),
        "trace-picture": everywhere(trace, inputs).plot(),
        "contributions": received.plot(),
        "overlay": overlay(received, inputs),
        "knockout": attention_knockout(model, inputs, "image", "last").plot(),
        "lens": logit_lens(model, inputs).plot(),
        "logit-attribution": direct_logit_attribution(model, inputs).plot(),
        "attribution-patching": attribution_patching(model, inputs, corrupted).plot(),
    }
    if len(inputs.images[0].views) > 1:
        width, height = inputs.images[0].image.size
        thirds = [(width * i / 3, 0, width * (i + 1) / 3, height) for i in range(3)]
        regions = [inputs.patches(box) for box in thirds] + words
        figures |= {
            "overlay-tiles": overlay(received, inputs, view=1),
            "overlay-all": overlay(received, inputs, view="all"),
            "trace-regions": mmlens.causal_trace(
                model, inputs, mmlens.mean_image(model, inputs), positions=regions
            ).plot(kind="heatmap"),
        }
    for name, figure in figures.items():
        yield figure.save(folder / f"{name}-{n}.png")
    _, cache = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern")
    pages = {
        "attention": attention(cache, 1).save(folder / f"attention-{n}.html"),
        "tokens": tokens(torch.randn(inputs.n_pos), inputs).save(folder / f"tokens-{n}.html"),
        "report": write_report(
            folder / f"report-{n}.html",
            reported_prompt(model, inputs, corrupted, corruption="replaced by Paris"),
            trace=trace,
            contributions=[received],
        ),
    }
    for page in pages.values():
        yield photographed(page)
    console = Console(record=True, width=100, file=StringIO(), force_terminal=True)
    console.print(TerminalHeatmap(trace))
    terminal = folder / f"terminal-{n}.html"
    console.save_html(str(terminal))
    yield photographed(terminal)


def everywhere(trace: CausalTrace, inputs: MultimodalInputs) -> CausalTrace:
    """A trace of every position, with effects by chance."""
    n_sites, n_layers = len(trace.sites), len(trace.layers)
    return replace(
        trace,
        restored=trace.corrupted + 0.01 * torch.randn(n_sites, inputs.n_pos, n_layers).abs() ** 3,
        groups=tuple((position,) for position in range(inputs.n_pos)),
        group_labels=tuple(inputs.labels()),
    )


def photographed(page: Path) -> Path:
    """A page as Chromium shows it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.goto(page.absolute().as_uri())
        tab.wait_for_timeout(1500)
        tab.screenshot(path=page.with_suffix(".png"), full_page=True)
        browser.close()
    return page.with_suffix(".png")


def main(folder: Path) -> None:
    """Write the gallery."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Path(mmlens.__file__).parent / "demo" / "flags" / "br.png"
    for grid in GRIDS:
        for path in write_all(model_of(grid), picture, folder):
            print(path, flush=True)
    tiled = tiled_model(0, side=8)
    for path in write_all(tiled, picture, folder):
        print(path, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
