"""Prompts and images of the formats of LLaVA's code, from a question and a file to the logits.

The references: the published conversations, written out; the untouched tokenizer, used piece by
piece as LLaVA's `tokenizer_image_token` does it; and Pillow for the images.
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import llava_code_checkpoints as published
import numpy as np
import pytest
import sentencepiece
import torch
from checkpoint_folders import load
from llava_code_checkpoints import Parts, parts, write
from PIL import Image
from random_models import Prompts
from rounding import assert_same
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CodeGenTokenizer, LlamaTokenizer

from mmlens.checkpoints.formats.llava_code import template
from mmlens.checkpoints.processors import add_image_token
from mmlens.checkpoints.towers.named_towers import KNOWN, find_tower
from mmlens.model.transformer import HookedMultimodalTransformer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "What is the capital of this country?"
PROMPT = f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"
SENTENCES = [SYSTEM, f"USER: \n{QUESTION} ASSISTANT: Paris", "Where is the city?"] * 5


@cache
def sentencepiece_model() -> bytes:
    """A tokenizer.model, as Llama has it."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=out,
        vocab_size=330,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def llama_files(folder: Path) -> Any:
    """As beside Vicuna: SentencePiece's model alone. Returns the tokenizer, untouched."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return LlamaTokenizer.from_pretrained(folder)


def phi_files(folder: Path) -> Any:
    """As beside Phi-2: byte pairs in vocab.json and merges.txt."""
    folder.mkdir(exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(SENTENCES, vocab_size=340, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    settings = {"tokenizer_class": "CodeGenTokenizer", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CodeGenTokenizer.from_pretrained(folder)


FORMATS = {
    "LLaVA": (published.llava, llama_files, {"decoder": "llama", "tower": "clip"}),
    "Bunny": (published.bunny, phi_files, {"decoder": "phi", "tower": "siglip"}),
    "TinyLLaVA": (
        published.tinyllava,
        phi_files,
        {"decoder": "phi", "tower": "siglip", "drops_first": True},
    ),
    "LLaVA-Phi": (published.llava_phi, phi_files, {"decoder": "phi", "tower": "clip"}),
    "LLaVA-Phi, first layout": (
        published.llava_phi_msft,
        phi_files,
        {"decoder": "phi", "tower": "clip"},
    ),
}


def opened(name: str, folder: Path) -> tuple[Parts, HookedMultimodalTransformer, Any]:
    """A random model of the format with a tokenizer in its folder."""
    writer, files, choices = FORMATS[name]
    tokenizer = files(folder)
    these = parts(**choices, vocabulary=len(tokenizer))
    model = load(write(folder, writer(these)))
    these.image_id = model.cfg.image_token_id or -1
    return these, model, tokenizer


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


def piece_by_piece(tokenizer: Any, prompt: str, image_id: int, n_visual: int) -> list[int]:
    """LLaVA's `tokenizer_image_token`, with one id for each visual token."""
    pieces = [tokenizer(piece)["input_ids"] for piece in prompt.split("<image>")]
    has_bos = pieces[0][:1] == [tokenizer.bos_token_id]
    ids = pieces[0][:1] * has_bos
    for index, piece in enumerate(pieces):
        ids += [image_id] * n_visual * (index > 0) + piece[has_bos:]
    return ids


def pixels_of(image: Image.Image, tower: Any, pad: bool) -> np.ndarray:
    """LLaVA's `expand2square`, and CLIP's or SigLIP's preprocessing, by hand."""
    clip = CLIPImageProcessorPil()
    is_clip, size = "clip_vision" in tower.config.model_type, tower.config.image_size
    mean, std = (clip.image_mean, clip.image_std) if is_clip else ([0.5] * 3, [0.5] * 3)
    width, height = image.size
    if pad:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if is_clip:
        short = min(image.size)
        image = image.resize([size * x // short for x in image.size], Image.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), Image.BICUBIC)
    return ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("sides", [(23, 41), (38, 17), (20, 20)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_from_a_question_to_the_logits(
    name: str, sides: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    these, model, tokenizer = opened(name, tmp_path)
    image = picture(*sides)
    inputs = model.prepare(QUESTION, image, spans={"constraint": "this country"})
    assert inputs.texts == (PROMPT,)
    expected = piece_by_piece(tokenizer, PROMPT, these.image_id, these.n_visual)
    assert inputs.tokens.tolist() == [expected]
    pixels = pixels_of(image, these.tower, pad=name != "TinyLLaVA")
    assert inputs.pixel_values is not None
    # 3 roundings of float32 at values below 4.
    assert np.abs(inputs.pixel_values[0].numpy() - pixels).max() < 1e-6
    assert "country" in tokenizer.decode(inputs.tokens[0, inputs.span("constraint")])
    with torch.no_grad():
        prompts = Prompts(inputs.tokens, torch.ones_like(inputs.tokens), inputs.pixel_values)

        def reference(these: Parts) -> Tensor:
            return these.decoder(**these.embeddings(prompts)).logits

        assert_same(model(inputs), reference(these), lambda: reference(these.rounded_otherwise()))


def test_patches_are_where_the_tower_puts_them(seed: int, tmp_path: Path) -> None:
    for name in FORMATS:
        these, model, _ = opened(name, tmp_path / name)
        inputs = model.prepare(QUESTION, picture(30, 20))
        start = int(inputs.span("image")[0])
        assert len(inputs.span("image")) == these.n_visual
        lost = name == "TinyLLaVA"
        assert inputs.patch(1, 2) == start + 1 * 3 + 2 - lost
        assert inputs.grid[0, inputs.patch(2, 1)].tolist() == [0, 0, 2, 1]
        assert inputs.block((1, 1, 3, 2)).tolist() == [inputs.patch(1, 1), inputs.patch(2, 1)]
        if not lost:
            assert inputs.patch(0, 0) == start
            continue
        assert inputs.patch(0, 1) == start
        for box in [(0, 0, 1, 1), (0, 0, 2, 2)]:
            with pytest.raises(ValueError, match=r"patch \(0, 0\) has no visual token"):
                inputs.block(box)


def test_several_images_and_a_batch(seed: int, tmp_path: Path) -> None:
    for name in ("LLaVA", "Bunny"):
        these, model, tokenizer = opened(name, tmp_path / name)
        texts = ["<image>\nWhat is this?", "Where <image> is the <image><image> city?"]
        images = [[picture(20, 30)], [picture(30, 20), picture(15, 16), picture(16, 50)]]
        prompt = "USER: {question} ASSISTANT:"
        inputs = model.prepare(texts, images, template=prompt)
        for row, text in enumerate(texts):
            real = inputs.tokens[row][inputs.attention_mask[row]].tolist()
            whole = prompt.format(question=text)
            assert real == piece_by_piece(tokenizer, whole, these.image_id, these.n_visual)
        assert inputs.pixel_values is not None and len(inputs.pixel_values) == 4


def test_bos_as_the_model_was_trained(seed: int, tmp_path: Path) -> None:
    for name, begins in [("LLaVA", True), ("Bunny", False)]:
        _, model, tokenizer = opened(name, tmp_path / name)
        bos = tokenizer.bos_token_id
        assert (int(model.prepare(QUESTION).tokens[0, 0]) == bos) == begins
        assert (int(model.to_tokens("Paris")[0, 0]) == bos) == begins
        assert int(model.prepare(QUESTION, prepend_bos=True).tokens[0, 0]) == bos


def test_without_an_image_the_prompt_has_no_place_for_one(seed: int, tmp_path: Path) -> None:
    _, model, _ = opened("LLaVA", tmp_path)
    assert model.prepare(QUESTION).texts == (PROMPT.replace("<image>\n", ""),)


def test_marks_around_the_image() -> None:
    assert template({}) == f"{SYSTEM} USER: <image>\n{{question}} ASSISTANT:"
    marked = template({"mm_use_im_start_end": True})
    assert marked == f"{SYSTEM} USER: <im_start><image><im_end>\n{{question}} ASSISTANT:"


def test_a_tokenizer_json_is_split_piece_by_piece_as_well(tmp_path: Path) -> None:
    """The tokenizers library's own file, as newer checkpoints have it."""
    untouched = llama_files(tmp_path)
    untouched.save_pretrained(tmp_path / "json")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "json")
    image_id = add_image_token(tokenizer)
    assert tokenizer(PROMPT)["input_ids"] == piece_by_piece(untouched, PROMPT, image_id, 1)


def test_a_folder_without_a_tokenizer(seed: int, tmp_path: Path) -> None:
    model = load(write(tmp_path, published.llava(parts("llama", "clip"))))
    assert model.tokenizer is None
    assert model.cfg.image_token_id == model.cfg.d_vocab
    with pytest.raises(ValueError, match="no tokenizer"):
        model.prepare(QUESTION)


def test_the_checkpoints_own_preprocessing(seed: int, tmp_path: Path) -> None:
    settings = {"image_mean": [0.1, 0.2, 0.3], "size": 15, "crop_size": 15, "resample": 2}
    for name in ("LLaVA", "LLaVA-Phi"):
        where = tmp_path / name / ("tower" if name == "LLaVA" else ".")
        _, _, _ = opened(name, tmp_path / name)
        (where / "preprocessor_config.json").write_text(json.dumps(settings))
        processor = load(tmp_path / name).image_processor
        assert list(processor.image_mean) == settings["image_mean"]
        assert processor.resample == 2 and processor.do_pad and processor.do_center_crop
        pixels = processor(images=[picture(9, 30)], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 15, 15)


@pytest.mark.parametrize("name", [*KNOWN, "/somewhere/else/siglip-so400m-patch14-384"])
def test_known_towers_need_no_network(name: str, seed: int, tmp_path: Path) -> None:
    tower = find_tower(name, tmp_path)
    cfg = tower.vision_config(-2, "full")
    is_clip, size = "clip" in name, tower.config.image_size
    assert cfg.n_layers == (23 if is_clip else 26)
    assert cfg.n_patches == {336: 576, 224: 256, 384: 729}[size]
    assert (cfg.act_fn, cfg.eps) == (
        ("quick_gelu", 1e-5) if is_clip else ("gelu_pytorch_tanh", 1e-6)
    )
    image = picture(50, 70)
    pixels = tower.image_processor()(images=[image], return_tensors="np")["pixel_values"]
    these = parts("phi", "clip" if is_clip else "siglip").tower
    these.config.image_size = size
    assert np.abs(pixels[0] - pixels_of(image, these, pad=False)).max() < 1e-6
