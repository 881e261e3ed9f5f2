"""Prompts that editing makes of another prompt: the form is that of transformers' processors.

A text around an image ("<start_of_image>", "<img>") is written once, and BOS stands where it did.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemma_models
import internvl_models
import pytest
import qwen_models
import torch
from checkpoint_folders import load
from tiled_models import random_image

from mmlens import EditRequest
from mmlens.editing.references import asked, question_of
from mmlens.model.transformer import HookedMultimodalTransformer

Ids = Callable[[str, list[Any]], torch.Tensor]
"""Transformers' token ids of a question and its images."""


def by_chat(processor: Any) -> Ids:
    """What a processor makes with its chat template."""

    def ids(question: str, images: list[Any]) -> torch.Tensor:
        parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
        turn = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True)
        begins = text.startswith(str(processor.tokenizer.bos_token))
        given = {"images": images} if images else {}
        batch = processor(text=[text], **given, add_special_tokens=not begins, return_tensors="pt")
        return batch["input_ids"]

    return ids


def of_gemma(folder: Path) -> Ids:
    return by_chat(gemma_models.write(gemma_models.FAMILIES["gemma3"], folder))


def of_paligemma(folder: Path) -> Ids:
    processor = gemma_models.write(gemma_models.FAMILIES["paligemma"], folder)

    def ids(question: str, images: list[Any]) -> torch.Tensor:
        if images:
            text = "<image>" * len(images) + question
            return processor(text=text, images=[images], return_tensors="pt")["input_ids"]
        written = processor.tokenizer(f"<bos>{question}\n", add_special_tokens=False)
        return torch.tensor([written["input_ids"]])

    return ids


def of_internvl(folder: Path) -> Ids:
    family = random.choice(list(internvl_models.FAMILIES.values()))
    hf = internvl_models.random_internvl(family)
    return by_chat(internvl_models.write(family, folder, hf))


def of_qwen(folder: Path) -> Ids:
    hf = qwen_models.random_qwen("qwen2.5", random.Random(0))
    return by_chat(qwen_models.write("qwen2.5", folder, hf))


FAMILIES = {
    "Gemma 3": of_gemma,
    "PaliGemma": of_paligemma,
    "InternVL": of_internvl,
    "Qwen2.5-VL": of_qwen,
}


@pytest.fixture(params=FAMILIES)
def case(request: Any, tmp_path: Path) -> tuple[HookedMultimodalTransformer, Ids]:
    ids = FAMILIES[request.param](tmp_path)
    return load(tmp_path), ids


@pytest.mark.parametrize("n_images", [1, 2])
def test_references_have_the_form_of_the_prompt(case: Any, n_images: int, seed: int) -> None:
    model, ids = case
    chance = random.Random(seed)
    images = [random_image((chance.randint(9, 60), chance.randint(9, 60)), seed) for _ in range(3)]
    own = images[:n_images]
    like = model.prepare("Which country is it?", own)
    assert torch.equal(like.tokens, ids("Which country is it?", own))
    assert question_of(like, model.cfg.image_text) == "Which country is it?"
    other = asked(model, like, "What is the capital?")
    assert torch.equal(other.tokens, ids("What is the capital?", own))
    assert torch.equal(other.pixel_values, like.pixel_values)
    about = asked(model, like, "Which country is it?", images[2])
    assert torch.equal(about.tokens, ids("Which country is it?", [images[2]] * n_images))


def test_the_text_of_a_prompt_is_a_prompt(case: Any, seed: int) -> None:
    """Also where the image's place is in the question, and with spans by their characters."""
    model, _ = case
    image = random_image((40, 30), seed)
    given = "In <image> is <image> red?"
    like = model.prepare(given, [image, image], spans={"it": "red"}, template=None)
    text = like.texts[0]
    at = text.index("red")
    again = model.prepare(
        text,
        [image, image],
        spans={"it": (at, at + 3)},
        template=None,
        prepend_bos="bos" in like.spans[0],
    )
    assert torch.equal(again.tokens, like.tokens) and again.texts == like.texts
    assert torch.equal(again.span("it"), like.span("it"))
    assert question_of(like, model.cfg.image_text) == " red?"
    other = asked(model, like, " blue?")
    expected = model.prepare("In <image> is <image> blue?", [image, image], template=None)
    assert torch.equal(other.tokens, expected.tokens)


def test_the_written_question_has_no_image(case: Any, seed: int) -> None:
    model, ids = case
    question = "What is the capital of this country?"
    inputs = model.prepare(
        question, random_image((40, 30), seed), spans={"constraint": "this country"}
    )
    written = EditRequest(inputs, "Rome", subject="Italy").written(model)
    assert torch.equal(written.tokens, ids("What is the capital of Italy?", []))
    words = "".join(written.str_tokens[0][at] for at in written.span("constraint").tolist())
    assert words.strip() == "Italy"
