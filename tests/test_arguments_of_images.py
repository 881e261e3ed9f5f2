"""Wrong arguments about images are told in a sentence, and none is taken for another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_tiled_models import noise_picture, tiled_model
from test_processor_batches import as_a_user  # noqa: F401

from mmlens import (
    blur_image,
    causal_trace,
    mean_image,
    noise_image,
    noise_span,
    swap_image,
)
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.plots import overlay

Model = HookedMultimodalTransformer
Call = Callable[[Model, MultimodalInputs], Any]
OTHER = noise_picture(3, 20, 70)

WRONG: dict[str, tuple[Call, str]] = {
    "a level": (lambda m, i: swap_image(m, i, OTHER, level="pixel", fit=True), "level='pixel'; it"),
    "of a blur": (lambda m, i: blur_image(m, i, 2.0, level="embedding"), "level='embedding'; it"),
    "of a mean": (lambda m, i: mean_image(m, i, level=None), "level=None; it is 'pixels' or"),
    "all images": (lambda m, i: swap_image(m, i, OTHER, which=None), "swap_image changes one"),
    "noise": (lambda m, i: noise_image(m, i, multiple=math.nan), "multiple=nan; it is 0 or more"),
    "less": (lambda m, i: noise_image(m, i, multiple=-1.0), "multiple=-1.0; it is 0 or more"),
    "on words": (lambda m, i: noise_span(m, i, "last", multiple=math.inf), "multiple=inf; it is 0"),
    "samples": (lambda m, i: noise_image(m, i, samples=2.5), "samples=2.5; it is a whole number"),
    "a view": (lambda m, i: i.patch(0, 0, view="all"), "view='all'; this image has 2 view"),
    "drawn": (lambda m, i: overlay(torch.rand(9), i, view="every"), "view='every'; this image"),
    "a block": (lambda m, i: i.block((0, 0, 2)), r"a block is \(row0, col0, row1, col1\)"),
    "a span": (lambda m, i: i.span("images"), r"called 'images' in row 0 \(this row has 1 image\)"),
    "an image": (lambda m, i: m("Which?", OTHER), "return_type is a name or None, not Image"),
    "pixels": (
        lambda m, i: m(i.tokens, i.pixel_values),
        "not Tensor: images go to `model",
    ),
    "a name": (
        lambda m, i: causal_trace(m, i, mean_image(m, i), positions="last"),
        r"positions='last'; they are groups, such as \[inputs.span\('last'\)\]",
    ),
    "another image": (
        lambda m, i: causal_trace(m, i, m.prepare("Which?", OTHER), positions=[[0]]),
        "the other image has .* visual tokens in views of .* or fit=True",
    ),
    **{
        f"{rows!r} rows": (
            lambda m, i, rows=rows: causal_trace(  # type: ignore[misc]
                m, i, mean_image(m, i), positions=[[i.n_pos - 1]], batch_rows=rows
            ),
            f"batch_rows={rows!r}; it is a whole number of rows, at least 1, or None",
        )
        for rows in (0, -3, 2.5, "4")
    },
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG)
def test_what_is_refused(call: Call, said: str, as_a_user: None, seed: int) -> None:  # noqa: F811
    model = tiled_model(seed)
    inputs = model.prepare("Which?", noise_picture(seed, 70, 20))
    with pytest.raises((ValueError, TypeError, KeyError), match=said) as error:
        call(model, inputs)
    assert len(str(error.value)) < 300


def test_an_overlay_takes_arrays(seed: int) -> None:
    model = tiled_model(seed)
    inputs = model.prepare("Which?", noise_picture(seed, 70, 20))
    values = np.random.default_rng(seed).random((2, len(inputs.images[0].positions)))
    one, other = overlay(values, inputs).data[0], overlay(torch.tensor(values), inputs).data[0]
    assert np.array_equal(one.z, other.z, equal_nan=True)
