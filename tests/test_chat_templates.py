"""Chat templates of checkpoints, next to transformers' `apply_chat_template`.

A template takes the content of a message as a string, as typed parts, or either.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folders import load
from PIL import Image
from random_models import Shape, random_language_model, random_llava
from small_tokenizers import tokenizer_with
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from mmlens.inputs.processor import Processor

QUESTION = "What is the capital of this country?"
TURNS = "{{% for message in messages %}}{}{{% endfor %}}{}"
PROMPT = "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
STRINGS = {
    "concatenated": TURNS.format("{{ 'USER: ' + message['content'] + '\n' }}", PROMPT),
    "printed": TURNS.format("USER: {{ message['content'] }}\n", PROMPT),
    "trimmed": TURNS.format("USER: {{ message['content'] | trim }}\n", PROMPT),
    "with BOS": TURNS.format("{{ bos_token + 'USER: ' + message['content'] + '\n' }}", PROMPT),
    "strings alone": TURNS.format(
        "{% if message['content'] is not string %}{{ raise_exception('a string, please') }}"
        "{% endif %}USER: {{ message['content'] }} ",
        PROMPT,
    ),
}
TYPED = {
    "parts": TURNS.format("USER: " + PARTS + " ", PROMPT),
    "trimmed parts": TURNS.format("USER: " + PARTS.replace("['text']", "['text'] | trim"), PROMPT),
    "parts with BOS": TURNS.format("{{ bos_token }}USER: " + PARTS + " ", PROMPT),
    "either": TURNS.format(
        "USER: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
        + PARTS
        + "{% endif %} ",
        PROMPT,
    ),
    "numbered": TURNS.format(
        "{% set n = namespace(value=0) %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{% set n.value = n.value + 1 %}"
        "Image {{ n.value }}: <image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} ",
        PROMPT,
    ),
}


def written(folder: Path, template: str, bos: str, images: bool, processor: bool = False) -> Any:
    """A checkpoint with this template, opened; with or without a processor_config.json."""
    tokenizer = tokenizer_with(bos=bos, chat_template=template)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    shape = Shape(vocabulary=image_id + 1, image_id=image_id)
    hf = random_llava(shape) if images else random_language_model(shape)
    hf.save_pretrained(folder)
    size = {"height": 15, "width": 15}
    pictures = CLIPImageProcessor(size=size, crop_size=size)
    if not processor:
        tokenizer.save_pretrained(folder)
        if images:
            pictures.save_pretrained(folder)
    else:
        LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=shape.patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        ).save_pretrained(folder)
    assert (folder / "processor_config.json").exists() == processor
    return load(folder)


def pictures(n: int) -> list[Image.Image]:
    pixels = np.random.randint(0, 256, (n, 14, 11, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in pixels]


def content(typed: bool, n_images: int, question: str) -> Any:
    if not typed:
        return "<image>\n" * n_images + question
    return [*[{"type": "image"}] * n_images, {"type": "text", "text": question}]


@pytest.mark.parametrize("bos", ["added", "named"])
@pytest.mark.parametrize("name", [*STRINGS, "parts", "either"])
def test_a_language_model_gets_the_tokenizers_chat(
    name: str, bos: str, seed: int, tmp_path: Path
) -> None:
    template = (STRINGS | TYPED)[name]
    model = written(tmp_path, template, bos, images=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for question in (QUESTION, f"  {QUESTION} \n", "x"):
        turn = [{"role": "user", "content": content(name == "parts", 0, question)}]
        chat = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        expected = tokenizer.apply_chat_template(turn, **chat)
        inputs = model.prepare(question, spans={"constraint": question.strip()})
        assert inputs.tokens[0].tolist() == expected
        words = tokenizer.decode(inputs.tokens[0, inputs.span("constraint")])
        assert words.strip() == question.strip()


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_language_model_has_no_processor(file: str, seed: int, tmp_path: Path) -> None:
    """So its files say nothing: transformers' tokenizer does not read them."""
    template = STRINGS[random.choice(list(STRINGS))]
    written(tmp_path, template, "added", images=False)
    (tmp_path / file).write_text(json.dumps({"chat_template": "Other: {{ messages }}"}))
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "Which?"}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert Processor.from_pretrained(tmp_path)("Which?").tokens[0].tolist() == expected


@pytest.mark.parametrize("processor", [True, False], ids=["processor", "no processor"])
@pytest.mark.parametrize("name", [*STRINGS, *TYPED])
def test_a_multimodal_model_gets_the_processors_chat(
    name: str, processor: bool, seed: int, tmp_path: Path
) -> None:
    bos = ("added", "named")[seed % 2]
    model = written(tmp_path, (STRINGS | TYPED)[name], bos, images=True, processor=processor)
    theirs = AutoProcessor.from_pretrained(tmp_path)
    theirs.patch_size, theirs.num_additional_image_tokens = 5, 1
    theirs.vision_feature_select_strategy = "default"
    for n_images in (1, 0, 2, 3):
        images = pictures(n_images)
        turn = [{"role": "user", "content": content(name in TYPED, n_images, QUESTION)}]
        prompt = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # As `apply_chat_template(tokenize=True)` calls it, which takes images from parts alone.
        expected = theirs(
            text=prompt,
            images=images or None,
            add_special_tokens=not prompt.startswith("<s>"),
            return_tensors="pt",
        )
        inputs = model.prepare(QUESTION, images)
        assert inputs.texts == (prompt,)
        assert torch.equal(inputs.tokens, expected["input_ids"])
        assert inputs.tokens[0].tolist().count(1) <= 1
        if name in TYPED:
            parts = [{"type": "image", "image": image} for image in images]
            turn[0]["content"] = [*parts, {"type": "text", "text": QUESTION}]
            chat = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
            given = theirs.apply_chat_template(turn, return_tensors="pt", **chat)
            assert torch.equal(inputs.tokens, given["input_ids"])


def test_a_template_that_drops_images_has_them_in_front(seed: int, tmp_path: Path) -> None:
    text_alone = PARTS.replace("<image>\n", "")
    model = written(tmp_path, TURNS.format("USER: " + text_alone, PROMPT), "added", images=True)
    inputs = model.prepare(QUESTION, pictures(2))
    assert inputs.texts == (f"<image><image>USER: {QUESTION}{'ASSISTANT:'}",)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'].missing.more }}", "UndefinedError"),
        ("{{ raise_exception('never') }}", "TemplateError: never"),
        ("nothing of it", "the question does not appear in it"),
        ("{{ messages }}", "it changes the question's characters"),
        ("{{ messages[0]['content'] | tojson }}", "it changes the question's characters"),
        ("{% for x in %}", "TemplateSyntaxError"),
    ],
)
@pytest.mark.parametrize("images", [True, False])
def test_a_template_that_cannot_be_used_is_named_and_left(
    template: str, reason: str, images: bool, seed: int, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"chat template of .* cannot be used .*{reason}"):
        model = written(tmp_path, template, "added", images=images)
    assert model.cfg.default_template is None
    assert model.prepare(QUESTION).texts == (QUESTION,)


def test_a_template_is_a_text_that_can_be_copied(seed: int, tmp_path: Path) -> None:
    model = written(tmp_path, TYPED["numbered"], "added", images=True)
    template = model.cfg.default_template
    assert template == "Image 1: <image> {question} ASSISTANT:"
    for again in (copy.deepcopy(template), pickle.loads(pickle.dumps(template))):
        assert again == template
        prepared = model.prepare(QUESTION, pictures(2), template=again)
        assert prepared.texts[0].startswith("Image 1: <image> Image 2: <image> What")
