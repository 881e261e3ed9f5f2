"""The images in docs/images that show results: made by the demo model, taken in Chromium.

    python docs/make_images.py

needs the extras `demo` and `dev` and a Chromium; it takes half a minute.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from mmlens import (
    HookedMultimodalTransformer,
    attention_contribution,
    causal_trace,
    demo_questions,
    logit_lens,
    swap_span,
)
from mmlens.plots import attention, overlay, plot_trace, reported_prompt, write_report

IMAGES = Path(__file__).parent / "images"
HEAD_LAYER = 23
"""Where the last token reads the image."""


def small(path: Path) -> None:
    """The same image in a smaller file."""
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)


def screenshot(
    browser: Browser, page: Path, name: str, height: int, hover: str | None = None
) -> None:
    """A window's content, with the pointer on one of its elements.

    Not the whole page: for that the window is resized, and circuitsvis's chart vanishes.
    """
    tab = browser.new_page(viewport={"width": 1200, "height": height})
    tab.goto(page.as_uri())
    tab.wait_for_timeout(2000)  # circuitsvis draws a while after it has loaded
    if hover:
        tab.locator(hover).hover()
    tab.screenshot(path=str(IMAGES / name))
    tab.close()


def main() -> None:
    """Make all of them."""
    model = HookedMultimodalTransformer.from_pretrained("demo")
    asked = demo_questions(relation="capital")
    question = next(each for each in asked if each.subject == "Italy")
    clean = model.prepare(question.question, question.image, spans={"constraint": "this country"})
    corrupted = swap_span(model, clean, "constraint", "Paris")
    trace = causal_trace(model, clean, corrupted)
    groups = [clean.span("constraint"), clean.span("last")]
    plot_trace(trace).save(IMAGES / "trace.png", scale=1)
    causal_trace(model, clean, corrupted, positions=groups).plot().save(
        IMAGES / "profile.png", scale=1
    )
    heads = attention_contribution(model, clean, "image", "last", per_head=True)
    overlay(heads, clean, title="received by the last token").save(IMAGES / "overlay.png", scale=1)
    logit_lens(model, clean, tokens=[question.answers[0]]).plot().save(IMAGES / "lens.png", scale=1)
    prompt = reported_prompt(model, clean, corrupted, corruption="“this country” replaced by Paris")
    words = [*clean.span("constraint").tolist(), *clean.span("last").tolist()]
    received = attention_contribution(model, clean, list(range(clean.n_pos)), words)
    name = f"blocks.{HEAD_LAYER}.attn.hook_pattern"
    _, cache = model.run_with_cache(clean, names_filter=name)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder) / "report.html"
        write_report(report, prompt, trace=trace, contributions=[received])
        view = attention(cache, HEAD_LAYER).save(Path(folder) / "attention.html")
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        screenshot(browser, report, "report.png", 1270, hover=".token:text-is('country')")
        screenshot(browser, view, "attention.png", 1260)
        browser.close()
    for path in IMAGES.glob("*.png"):
        small(path)


if __name__ == "__main__":
    main()
