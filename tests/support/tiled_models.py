"""Random Idefics3 and SmolVLM checkpoints of odd sizes, as transformers and the hub have them."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_reference import (
    attention_activations,
    decoder_activations,
    recorded,
    recorded_attention,
    siglip_activations,
)
from PIL import Image
from random_models import enliven
from small_tokenizers import small_tokenizer
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.llama import modeling_llama
from transformers.models.smolvlm import modeling_smolvlm, processing_smolvlm

# As published with SmolVLM.
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SIZES = [
    *[(1, 1), (2, 1), (1, 3), (3, 2), (7, 7), (13, 14), (14, 13), (16, 9), (9, 16), (40, 40)],
    *[(41, 27), (27, 41), (56, 57), (100, 3), (3, 100), (64, 48), (199, 61), (61, 199), (224, 224)],
    *[(333, 500), (640, 427), (2000, 10), (10, 2000), (20000, 10)],
]
"""Widths and heights."""


@dataclass(frozen=True)
class Family:
    """What a checkpoint is made of."""

    kind: str
    patch: int
    grid: int
    """Patches of a tile's side, a multiple of `factor`."""
    factor: int
    strip: int
    """Pixels at the right and bottom of a tile that fill no patch."""
    row_tokens: bool
    """Whether `<row_1_col_1>` and `<global-img>` are tokens; in Idefics3-8B they are text."""

    @property
    def side(self) -> int:
        """Pixels of a tile."""
        return self.patch * self.grid + self.strip

    @property
    def n_tokens(self) -> int:
        """Visual tokens of a tile."""
        return (self.grid // self.factor) ** 2


FAMILIES = {
    "idefics3": Family("idefics3", 3, 6, 2, 1, False),
    "idefics3, row tokens": Family("idefics3", 5, 4, 2, 0, True),
    "smolvlm": Family("smolvlm", 2, 6, 3, 1, True),
    "smolvlm, large squares": Family("smolvlm", 4, 4, 4, 0, True),
}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with the family's special tokens."""
    backend = Tokenizer.from_str(small_tokenizer("bytes").backend_tokenizer.to_str())
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    if family.row_tokens:
        names += ["<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]
    added: list[Any] = [AddedToken(name, special=True, normalized=False) for name in names]
    fast.add_tokens(added, special_tokens=True)
    return fast


def processor_of(family: Family, **settings: Any) -> Any:
    """Transformers' processor; SmolVLM's is made as if num2words were there."""
    tokenizer = tokenizer_of(family)
    given = {
        "size": {"longest_edge": 4 * family.side},
        "max_image_size": {"longest_edge": family.side},
        **settings,
    }
    rest = {"image_seq_len": family.n_tokens, "chat_template": CHAT_TEMPLATE}
    if family.kind == "idefics3":
        return Idefics3Processor(Idefics3ImageProcessor(**given), tokenizer, **rest)
    had, processing_smolvlm.num2words = processing_smolvlm.num2words, str
    try:
        images, videos = SmolVLMImageProcessor(**given), SmolVLMVideoProcessor()
        return SmolVLMProcessor(images, tokenizer, videos, **rest)
    finally:
        processing_smolvlm.num2words = had


def random_idefics(family: Family, decoder_kind: Any = LlamaConfig, **text: Any) -> Any:
    """Transformers' model in float32 with lively weights, drawn from torch's generator."""
    tokenizer = tokenizer_of(family)
    sizes: dict[str, Any] = {
        "hidden_size": 21,
        "intermediate_size": 27,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "patch_size": family.patch,
        "image_size": family.side,
    }
    decoder = decoder_kind(
        vocab_size=len(tokenizer) + 3,
        hidden_size=30,
        intermediate_size=41,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **text,
    )
    config, kind = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    }[family.kind]
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    return enliven(
        kind(
            config(
                vision_config=sizes,
                text_config=decoder,
                image_token_id=image_token,
                scale_factor=family.factor,
                tie_word_embeddings=text.get("tie_word_embeddings", False),
            )
        )
    )


def write(family: Family, folder: Path, hf: Any = None, **settings: Any) -> Any:
    """Write a checkpoint with its processor as the hub has them, and return that processor."""
    folder.mkdir(parents=True, exist_ok=True)
    if hf is not None:
        hf.save_pretrained(folder)
    processor = processor_of(family, **settings)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    named = {
        "processor_config.json": {
            "image_seq_len": family.n_tokens,
            "processor_class": type(processor).__name__,
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    for name, content in named.items():
        (folder / name).write_text(json.dumps(content))
    return processor


def random_image(size: tuple[int, int], seed: int) -> Image.Image:
    """Random pixels of a width and height."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_texts(
    counts: list[int], word: str, chance: random.Random, sizes: list[tuple[int, int]] = SIZES
) -> tuple[list[str], list[list[Image.Image]]]:
    """A text for each count, with so many of an image's word somewhere in it, and its images."""
    texts, images = [], []
    for n_images in counts:
        words = chance.choice(["What is the capital", " of this country?", "The flag", "Paris\n"])
        pieces = [*[word] * n_images, words, " is red"]
        chance.shuffle(pieces)
        texts.append("".join(pieces) + " Answer:")
        chosen = [chance.choice(sizes) for _ in range(n_images)]
        images.append([random_image(size, chance.randrange(2**31)) for size in chosen])
    return texts, images


def random_batch(processor: Any, counts: list[int], chance: random.Random) -> dict[str, Any]:
    """Transformers' batch with this many images in each row, padded on the left."""
    texts, images = random_texts(counts, "<image>", chance)
    given = {"text": texts, "padding": True, "return_tensors": "pt"}
    return dict(processor(images=images, **given) if sum(counts) else processor(**given))


def tiled_activations(hf: nn.Module, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Transformers' output in eager attention, and its activations under our names."""
    hf.set_attn_implementation("eager")
    source = {"idefics3": modeling_idefics3, "smolvlm": modeling_smolvlm}[hf.config.model_type]
    seen: dict[str, Tensor] = {}
    in_decoder: list[tuple[Tensor, ...]] = []
    in_tower: list[tuple[Tensor, ...]] = []
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(recorded(dict(hf.named_modules()), seen))
        stack.enter_context(recorded_attention(modeling_llama, in_decoder))
        stack.enter_context(recorded_attention(source, in_tower))
        output = hf(**batch, position_ids=positions)
    found = decoder_activations(hf, "model.text_model", seen)
    for layer, attended in enumerate(in_decoder):
        found |= attention_activations(f"blocks.{layer}.attn", *attended, rotary=True)
    if "pixel_values" not in batch:
        return output, found
    prefix = "model.vision_model"
    found |= siglip_activations(hf, prefix, seen, in_tower) | {
        "vision.hook_pos_embed": seen[f"{prefix}.embeddings.position_embedding:out"],
        "projector.hook_in": seen["model.connector:in"],
        "projector.hook_out": seen["model.connector:out"].flatten(0, 1)[None],
    }
    return output, found
