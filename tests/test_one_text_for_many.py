"""A text in the place of a list of texts is refused, for Python would read it letter by letter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_models import picture, worded_model

from mmlens import causal_trace_many
from mmlens.data.chair import chair_scores
from mmlens.data.metrics import exact_match, is_right, parse_choice, soft_accuracy, yes_no_scores
from mmlens.editing.covariance import key_covariance


def test_prompts(seed: int) -> None:
    model = worded_model(seed)
    with pytest.raises(TypeError, match=r"inputs='Hello' is one text, .* list, inputs=\['Hello'\]"):
        model.record_many("Hello")
    assert len(model.record_many(["Hello"])) == 1
    with pytest.raises(TypeError, match="texts='Hello' is one text"):
        key_covariance(model, "Hello", [0])
    inputs = model.prepare("What is this?", picture(seed))
    for name in ("answers", "contrasts"):
        with pytest.raises(TypeError, match=f"{name}='Rome' is one text"):
            causal_trace_many(model, [(inputs, inputs)] * 4, **{name: "Rome"})


@pytest.mark.parametrize(
    ("score", "name"),
    [
        (lambda: is_right("cat", "cat"), "answers"),
        (lambda: soft_accuracy("cat", "cat"), "answers"),
        (lambda: exact_match("cat", "cat"), "answers"),
        (lambda: parse_choice("A", "cat"), "options"),
        (lambda: yes_no_scores("yes", ["yes", "no", "yes"]), "said"),
        (lambda: yes_no_scores(["yes"], "yes"), "answers"),
        (lambda: chair_scores("dog", [{"dog"}] * 3), "captions"),
    ],
)
def test_answers(score: Callable[[], Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}='.*' is one text"):
        score()
