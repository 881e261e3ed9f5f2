"""A small model, questions about a few images, and what the sweep of them should give."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from small_models import worded_model

from mmlens.data import VisualQuestion
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps import Sweep, sweep

TEXTS = ("who made this place", "this place has a", "is this place near", "name this place, please")
SETTINGS: dict[str, Any] = {
    "sites": ("mlp_out",),
    "roles": ("constraint", "last token", "text constraint"),
    "shard_size": 3,
    "progress": False,
}


def write_image(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def made_questions(folder: Path, n: int = 8, n_images: int = 3) -> list[VisualQuestion]:
    """Questions about few images, in an order that mixes them."""
    pictures = [write_image(folder / f"{i}.png", seed=i) for i in range(n_images)]
    return [
        VisualQuestion(
            question=TEXTS[row % len(TEXTS)],
            image=pictures[row % n_images],
            visual_constraint="this place",
            text_constraints=("near",) if "near" in TEXTS[row % len(TEXTS)] else (),
            answers=("a",) if row % 2 else (),
            subject=f"subject {row % n_images}",
            source=f"made/{row}",
        )
        for row in range(n)
    ]


def made_model(seed: int) -> HookedMultimodalTransformer:
    """In float64, so that rounding is no excuse."""
    return worded_model(seed, n_layers=2).double()


def in_order(found: Sweep) -> pd.DataFrame:
    keys = ["question", *found.manifest["keys"]]
    table = found.results()
    assert not table.duplicated(keys).any()
    texts = table.select_dtypes("category").columns
    table = table.astype(dict.fromkeys(texts, object))
    return table.sort_values(keys, ignore_index=True)


def assert_same(found: Sweep, expected: Sweep) -> None:
    """Row for row; numbers to the float32 that files hold, and some rounding of the runs."""
    assert found.n_done == expected.n_done == expected.n_questions
    pd.testing.assert_frame_equal(in_order(found), in_order(expected), rtol=1e-5, atol=1e-5)
    failures = [
        each.failures().sort_values("question", ignore_index=True) for each in (found, expected)
    ]
    pd.testing.assert_frame_equal(*failures)
    assert not list((found.folder.path / ".unfinished").iterdir())


def in_child(run: Callable[[], Any], kill_after: float | None = None) -> int:
    """The exit code of a forked process: minus the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def swept(model: Any, questions: Any, out: Path, **settings: Any) -> Sweep:
    return sweep("trace", model, questions, out, **SETTINGS | settings)
