"""Idefics3 and SmolVLM: prompts, pixels, logits, hooks and branches equal transformers'."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_checks import check_logits_and_hooks, check_same_images
from checkpoint_folders import load
from tiled_models import (
    CHAT_TEMPLATE,
    FAMILIES,
    SIZES,
    Family,
    random_batch,
    random_idefics,
    random_image,
    tiled_activations,
    write,
)

from mmlens.inputs.processor import Processor

EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def same_batch(inputs: Any, batch: Any) -> None:
    """Ids, mask, pixels and pixel masks, without the tiles that pad a batch."""
    assert torch.equal(inputs.tokens, batch["input_ids"])
    assert torch.equal(inputs.attention_mask, batch["attention_mask"].bool())
    real = (batch["pixel_values"] != 0).flatten(2).any(dim=2)
    assert torch.equal(inputs.visual["pixel_values"], batch["pixel_values"][real])
    masks = batch["pixel_attention_mask"][real]
    assert torch.equal(inputs.visual["pixel_attention_mask"], masks.bool())


@pytest.mark.parametrize("splitting", [True, False], ids=["tiles", "whole"])
@EVERY
def test_prompts_of_one_image_equal_transformers(
    family: Family, splitting: bool, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    theirs = write(family, tmp_path, random_idefics(family), do_image_splitting=splitting)
    ours = Processor.from_pretrained(tmp_path)
    for size in SIZES:
        image = random_image(size, chance.randrange(2**31))
        text = chance.choice(["<image>Which country?", "The flag <image>", "In\n<image>\n red "])
        batch = theirs(text=text, images=image, return_tensors="pt")
        inputs = ours(text, image, template=None)
        same_batch(inputs, batch)
        ids = batch.pop("input_ids")
        check_same_images(inputs, ours.from_tokens(ids, **batch))
        assert (len(inputs.images[0].grids) > 1) <= splitting


@EVERY
def test_batches_of_several_images_equal_transformers(
    family: Family, seed: int, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    theirs = write(family, tmp_path, random_idefics(family))
    ours = Processor.from_pretrained(tmp_path)
    for counts in ([2], [3], [1, 3, 2], [1, 0, 2], [0, 1]):
        texts, images = [], []
        for n in counts:
            pieces = [*["<image>"] * n, "What is", " the capital?"]
            chance.shuffle(pieces)
            texts.append("".join(pieces))
            sizes = [chance.choice(SIZES) for _ in range(n)]
            images.append([random_image(size, chance.randrange(2**31)) for size in sizes])
        batch = theirs(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = ours(texts, images, template=None)
        same_batch(inputs, batch)
        assert inputs.n_images == tuple(counts)
        ids = batch.pop("input_ids")
        check_same_images(inputs, ours.from_tokens(ids, **batch))


@EVERY
def test_the_chat_template_is_that_of_transformers(
    family: Family, seed: int, tmp_path: Path
) -> None:
    theirs = write(family, tmp_path, random_idefics(family))
    ours = Processor.from_pretrained(tmp_path)
    images = [random_image((30, 20), seed), random_image((20, 60), seed + 1)]
    parts = [*[{"type": "image"}] * 2, {"type": "text", "text": "Which country?"}]
    turn = [{"role": "user", "content": parts}]
    text = theirs.apply_chat_template(turn, add_generation_prompt=True)
    assert text == "<s>User:<image><image>Which country?<end_of_utterance>\nAssistant:"
    batch = theirs(text=text, images=images, add_special_tokens=False, return_tensors="pt")
    same_batch(ours("Which country?", images), batch)
    assert CHAT_TEMPLATE.startswith("<s>")


@EVERY
@pytest.mark.parametrize("images", [[1], [1, 0, 2], [0, 0]], ids=str)
def test_logits_and_every_hook_equal_hugging_face(
    family: Family, images: list[int], seed: int, tmp_path: Path
) -> None:
    hf = random_idefics(family, tie_word_embeddings=random.Random(seed).random() < 0.3)
    batch = random_batch(write(family, tmp_path, hf), images, random.Random(seed))

    def of_images(name: str, x: torch.Tensor) -> torch.Tensor:
        """One row of positions for all tiles."""
        return x[:1] if name == "vision.hook_pos_embed" else x

    check_logits_and_hooks(
        load(tmp_path), hf, batch, lambda hf: tiled_activations(hf, batch), of_images=of_images
    )
