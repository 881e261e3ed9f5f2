"""Positions in any form are numbers: a mask or floats would silently be other positions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_tiled_models import noise_picture, tiled_model
from test_processor_batches import as_a_user  # noqa: F401

from mmlens import (
    Intervention,
    ablation_scan,
    attention_contribution,
    attribution_patching,
    causal_trace,
    mean_image,
    patch,
    path_patch,
)
from mmlens.interventions.functions import knockout, mean, resample, transplant, zero
from mmlens.utils.tensors import flat_positions

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "dictionary's keys": lambda numbers: dict.fromkeys(numbers).keys(),
    "array": np.array,
    "int32": lambda numbers: torch.tensor(numbers, dtype=torch.int32),
    "column": lambda numbers: torch.tensor(numbers)[:, None],
    "numbers of numpy": lambda numbers: list(np.array(numbers)),
    "tensors": lambda numbers: [torch.tensor(number) for number in numbers],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_numbers_in_any_form(form: Callable[[list[int]], Any], seed: int) -> None:
    numbers = sorted(random.sample(range(60), 7))
    found = flat_positions(form(numbers))
    assert found.dtype == torch.long and sorted(found.tolist()) == numbers


def test_one_number_a_range_and_none() -> None:
    assert flat_positions(range(3, 6)).tolist() == [3, 4, 5]
    for one in (7, np.int64(7), torch.tensor(7)):
        assert flat_positions(one).tolist() == [7]
    assert flat_positions([]).dtype == torch.long


def test_masks_floats_and_names_are_refused_everywhere(as_a_user: None, seed: int) -> None:  # noqa: F811
    model = tiled_model(seed)
    clean = model.prepare("What is this country?", noise_picture(seed, 50, 31), template=None)
    corrupted = mean_image(model, clean)
    recording = model.record(clean, sites=[("z", 0)])
    query = clean.span("last")

    def run(hook: Any, site: str) -> Any:
        part = Intervention(site, 0, query, hook)
        return recording.run([[part]], lambda logits: logits)

    callers: list[Callable[[Any], Any]] = [
        lambda at: causal_trace(model, clean, corrupted, positions=[at]),
        lambda at: attribution_patching(model, clean, corrupted, positions=[at]),
        lambda at: path_patch(model, clean, corrupted, [("z[0]", 0, at)]),
        lambda at: attention_contribution(model, clean, at, "last"),
        lambda at: ablation_scan(model, clean, "regions", regions=[at]),
        lambda at: Intervention("mlp_out", 0, at, zero()),
        lambda at: run(knockout(at), "attn_scores"),
        lambda at: run(mean(recording, at), "z"),
        lambda at: run(resample(recording, seed, among=at), "z"),
        lambda at: run(transplant(recording, "z", 0, at), "z"),
        lambda at: recording.run([[]], None, read=[("z", 0, at)]),
        lambda at: recording.run([[]], lambda logits: logits, positions=at),
        lambda at: patch(
            recording, {(0,): []}, lambda logits: logits[:, -1, 0], axes=("one",), positions=at
        ),
    ]
    mask = clean.is_image[0]
    for number, call in enumerate(callers):
        for wrong in (mask, mask.tolist(), np.array(mask), [12.0, 3.5], torch.tensor([4.0])):
            with pytest.raises(TypeError, match=r"positions are integers, not torch\.") as error:
                call(wrong)
            assert ("mask.nonzero()" in str(error.value)) == (len(wrong) > 2), number
    for call in callers[:3]:
        with pytest.raises((TypeError, ValueError), match=r"inputs\.span\('last'\)"):
            call("last")
