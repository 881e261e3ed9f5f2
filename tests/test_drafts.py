"""Greedy continuations that check drafts are those that `generate` finds token by token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gemma_models
import internvl_models
import pytest
import qwen_models
import torch
from checkpoint_folders import load
from small_models import any_attention, picture, small_inputs, worded_model
from tiled_models import random_image

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


def write(name: str, folder: Path, chance: random.Random) -> None:
    """Write a checkpoint whose attention or rotary positions are not those of text."""
    if name in qwen_models.FAMILIES:
        qwen_models.write(name, folder, qwen_models.random_qwen(name, chance))
    elif name in gemma_models.FAMILIES:
        gemma_models.write(gemma_models.FAMILIES[name], folder)
    else:
        family: Any = internvl_models.FAMILIES[name]
        internvl_models.write(family, folder, internvl_models.random_internvl(family))


@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "Qwen2", "qwen2.5", "qwen3"])
@torch.no_grad()
def test_what_follows_several_prompts_is_as_in_plain_runs(
    name: str, seed: int, tmp_path: Path
) -> None:
    """In one pass, whatever images the prompts have, and where their rotary positions go on."""
    chance = random.Random(seed)
    write(name, tmp_path, chance)
    model = load(tmp_path).double()
    sizes = [(chance.randint(20, 90), chance.randint(20, 90)) for _ in range(2)]
    images = [random_image(size, chance.randrange(2**31)) for size in sizes]
    asked = [("Which country is it?", images[0]), ("What?", images), ("In words alone", None)]
    prompts = [model.prepare(*each) for each in asked]
    several = [FinishedPrompt.of(model.record(inputs)) for inputs in prompts]
    words = [at for at in range(5, model.cfg.d_vocab) if at != model.cfg.image_token_id]
    told = [tuple(chance.choices(words, k=n)) for n in (3, 1, 2)]
    found = GreedyContinuations(model, several).follow(told)
    for inputs, tokens, logits in zip(prompts, told, found, strict=True):
        plain = model(inputs.append(torch.tensor(tokens)))[0, inputs.n_pos - 1 :]
        assert (logits - plain).abs().max() < 1e-9


@torch.no_grad()
def test_padding_of_a_prompt_out_of_a_batch_is_no_key(seed: int) -> None:
    """Its continuations are those of the same prompt alone."""
    chance = random.Random(seed)
    model = any_attention(seed).double()
    n_words = chance.sample(range(4, 20), 3)
    batch = small_inputs(model, seed, images=(1, 0, 1), words=tuple(n_words))
    batch = batch.with_pixels(batch.pixel_values.double())
    rows = [batch.rows([row]) for row in range(3)]
    assert not batch.attention_mask.all()
    told = [tuple(chance.choices(range(2, 60), k=n)) for n in (2, 3, 1)]
    found = GreedyContinuations(model, [FinishedPrompt.of(model.record(row)) for row in rows])
    for row, tokens, logits in zip(rows, told, found.follow(told), strict=True):
        alone = model.inputs_from_tokens(row.tokens[:, row.attention_mask[0]], row.pixel_values)
        plain = model(alone.append(torch.tensor(tokens)))[0, alone.n_pos - 1 :]
        assert (logits - plain).abs().max() < 1e-9


@torch.no_grad()
def test_rotary_positions_of_a_prompt_out_of_a_batch(seed: int, tmp_path: Path) -> None:
    """Words alone are counted without the padding, beside a prompt whose image has rows."""
    chance = random.Random(seed)
    write("qwen3", tmp_path, chance)
    model = load(tmp_path).double()
    image = random_image((chance.randint(20, 90), chance.randint(20, 90)), seed)
    asked = [("Which of these countries is it?", [image]), ("In words", [])]
    batch = model.prepare([text for text, _ in asked], [images for _, images in asked])
    rows = [batch.rows([row]) for row in range(2)]
    assert not rows[1].attention_mask.all()
    words = [at for at in range(5, model.cfg.d_vocab) if at != model.cfg.image_token_id]
    told = [tuple(chance.choices(words, k=n)) for n in (2, 3)]
    found = GreedyContinuations(model, [FinishedPrompt.of(model.record(row)) for row in rows])
    for one, tokens, logits in zip(asked, told, found.follow(told), strict=True):
        alone = model.prepare(one[0], one[1] or None)
        plain = model(alone.append(torch.tensor(tokens)))[0, alone.n_pos - 1 :]
        assert (logits - plain).abs().max() < 1e-9
