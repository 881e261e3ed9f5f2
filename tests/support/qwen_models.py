"""Random checkpoints of Qwen2-VL, Qwen2.5-VL and Qwen3-VL with their processors, as transformers
writes them, and what its models compute, under our names."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from hf_reference import (
    attention_activations,
    decoder_activations,
    recorded,
    recorded_attention,
)
from qwen_towers import SOURCES, hf_tower_activations, random_tower
from random_models import enliven
from small_tokenizers import small_tokenizer
from tiled_models import random_texts
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

FAMILIES = ("qwen2", "qwen2.5", "qwen3")
CLASSES: dict[str, tuple[Any, ...]] = {
    "qwen2": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    ),
    "qwen2.5": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    ),
    "qwen3": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    ),
}
# As published with Qwen2-VL, without its videos and its sentence of a system.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def tokenizer_of() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with Qwen's special tokens, and no BOS."""
    backend = Tokenizer.from_str(small_tokenizer("bytes").backend_tokenizer.to_str())
    backend.post_processor = None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", eos_token="</s>", pad_token="<pad>"
    )
    names = [*SPECIAL, "<|image_pad|>", "<|video_pad|>"]
    added: list[Any] = [AddedToken(name, special=True, normalized=False) for name in names]
    fast.add_tokens(added, special_tokens=True)
    return fast


def sections(chance: random.Random, n_pairs: int) -> list[int]:
    """Three numbers of pairs, odd and even, one of which may be the largest by far."""
    ends = sorted(chance.sample(range(1, n_pairs), 2))
    return [ends[0], ends[1] - ends[0], n_pairs - ends[1]]


def random_qwen(family: str, chance: random.Random, **choices: Any) -> Any:
    """Transformers' model in float32 with lively weights, small and odd."""
    tokenizer = tokenizer_of()
    d_head = chance.choice([12, 14, 20])
    n_kv, groups = chance.choice([(1, 3), (2, 2), (2, 1)])
    d_model = 30 if family == "qwen3" else n_kv * groups * d_head
    tower = random_tower(family, chance, d_model)
    config, kind, *_ = CLASSES[family]
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": d_model,
        "intermediate_size": 41,
        "num_hidden_layers": 4 if family == "qwen3" else 3,
        "num_attention_heads": n_kv * groups,
        "num_key_value_heads": n_kv,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 7000.0,
            "mrope_section": sections(chance, d_head // 2),
        },
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen3":
        fields |= {"head_dim": d_head, "attention_bias": chance.random() < 0.3}
    fields |= choices
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in [
            *[("image", "image_pad"), ("video", "video_pad")],
            *[("vision_start", "vision_start"), ("vision_end", "vision_end")],
        ]
    }
    tied = chance.random() < 0.3
    hf = kind(
        config(
            text_config=fields,
            vision_config=tower.config.to_dict(),
            tie_word_embeddings=tied,
            **ids,
        )
    )
    enliven(hf)
    hf.model.visual.load_state_dict(tower.state_dict())
    return hf.eval()


def processor_of(family: str, hf: Any, least: int = 1, most: int = 24) -> Any:
    """Transformers' processor, whose images have from `least` to `most` visual tokens."""
    vision, tokenizer = hf.config.vision_config, tokenizer_of()
    side = vision.patch_size * vision.spatial_merge_size
    *_, kind, videos = CLASSES[family]
    images = Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        min_pixels=least * side**2,
        max_pixels=most * side**2,
    )
    return kind(images, tokenizer, videos(), chat_template=CHAT_TEMPLATE)


def write(family: str, folder: Path, hf: Any, **bounds: int) -> Any:
    """Write a checkpoint with its processor, and return that processor."""
    hf.save_pretrained(folder)
    processor = processor_of(family, hf, **bounds)
    processor.save_pretrained(folder)
    return processor


SIZES = [
    *[(1, 1), (2, 1), (3, 2), (7, 7), (13, 14), (14, 13), (16, 9), (9, 16), (40, 40), (41, 27)],
    *[(27, 41), (56, 57), (150, 1), (1, 150), (100, 3), (3, 100), (64, 48), (199, 61), (61, 199)],
    *[(224, 224), (333, 500), (640, 427)],
]
"""Widths and heights."""


def random_batch(processor: Any, counts: list[int], chance: random.Random) -> dict[str, Any]:
    """Transformers' batch with this many images in each row, padded on the left."""
    texts, images = random_texts(counts, IMAGE, chance, SIZES)
    given = {"text": texts, "padding": True, "return_tensors": "pt"}
    flat = [image for row in images for image in row]
    return dict(processor(images=flat, **given) if flat else processor(**given))


def positioned(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch; without images with positions, since transformers would count padding there."""
    if "pixel_values" in batch:
        return batch
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, "position_ids": counted.expand(3, -1, -1)}


def qwen_activations(family: str, hf: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Transformers' output in eager attention, and its activations under our names."""
    hf.set_attn_implementation("eager")
    seen: dict[str, Tensor] = {}
    attended: list[tuple[Tensor, ...]] = []
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(recorded(dict(hf.named_modules()), seen))
        # The tower's attention goes through the same function.
        stack.enter_context(recorded_attention(SOURCES[family], attended))
        output = hf(**positioned(batch))
    found = decoder_activations(hf, "model.language_model", seen)
    n_layers = hf.config.text_config.num_hidden_layers
    for layer, parts in enumerate(attended[len(attended) - n_layers :]):
        found |= attention_activations(f"blocks.{layer}.attn", *parts, rotary=True)
    for layer in range(len(getattr(hf.config.vision_config, "deepstack_visual_indexes", ()))):
        # Transformers adds after a block, and not in it.
        here, there = f"blocks.{layer}", f"model.language_model.layers.{layer}"
        is_last = layer == n_layers - 1
        after = "norm" if is_last else f"layers.{layer + 1}"
        found[f"{here}.hook_resid_post"] = seen[f"model.language_model.{after}:in"]
        added = seen[f"model.language_model.{after}:in"] - seen[f"{there}:out"]
        found[f"{here}.hook_deepstack"] = added
    if "pixel_values" in batch:
        seeing = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        found |= hf_tower_activations(family, hf.model.visual, seeing)
    return output, found
