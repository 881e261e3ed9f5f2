"""Greedy continuations that check drafts are those that `generate` finds token by token."""

from __future__ import annotations

import random

import pytest
from small_models import picture, worded_model

from mmlens.model.drafts import FinishedPrompt, GreedyContinuations

LENGTH = 7


def said(model, inputs):
    """The tokens that `generate` adds."""
    whole = model.generate(inputs, LENGTH, do_sample=False, num_beams=1, return_type="tokens")
    return whole[0, inputs.n_pos :].tolist()


@pytest.mark.parametrize("draft", ["none", "right", "wrong"])
@pytest.mark.parametrize("stops", [False, True])
def test_they_are_those_of_generate(seed, draft, stops):
    model = worded_model(seed)
    inputs = model.prepare("What is the capital of this country?", picture(0))
    if stops:  # words alone: the string of half a character is none
        texts = [model.to_string([token]) for token in range(model.cfg.d_vocab)]
        words = {i for i, text in enumerate(texts) if text.isascii() and text.isalpha()}
        others = set(range(model.cfg.d_vocab)) - words
        model.generation_config.suppress_tokens = sorted(others)
    tokens = said(model, inputs)
    if stops:
        model.generation_config.stop_strings = [model.to_string(tokens[2:3])]
    expected = said(model, inputs)
    drafts = {
        "none": (),
        "right": tuple(tokens),
        "wrong": tuple(random.choices(range(3, model.cfg.d_vocab), k=4)),
    }
    prompt = FinishedPrompt.of(model.record(inputs))
    [found] = GreedyContinuations(model, [prompt]).greedy([LENGTH], [drafts[draft]])
    ends = set(model.cfg.eos_token_ids)
    assert list(found) == [each for each in expected if each not in ends]
    assert not stops or len(expected) <= 3 < len(tokens)
