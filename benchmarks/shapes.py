"""Models and prompts to measure with: the demo's, or a published model's shape with random weights.

What a model of random weights and its prompt are made of is in `random_case.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from random_case import Case, Tiled, random_case
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Idefics3ImageProcessor,
    LlamaConfig,
    LlavaOnevisionImageProcessor,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLImageProcessor,
    SiglipVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from mmlens import HookedMultimodalTransformer, demo_questions, swap_span
from mmlens.checkpoints.hf_configs import vision_config
from mmlens.checkpoints.towers.qwen_vl import merger_config, tower_config
from mmlens.config import AnyResConfig, VisionConfig
from mmlens.demo.language_model import language_model_folder
from mmlens.inputs.layouts.row_col import FENCE, WHOLE
from mmlens.inputs.spans import PLACEHOLDER


def demo(device: torch.device, dtype: torch.dtype, **_: Any) -> Case:
    """The embedded model, a flag, and a question about its capital."""
    model = HookedMultimodalTransformer.from_pretrained("demo", device=device, dtype=dtype)
    question = demo_questions(relation="capital")[0]
    clean = model.prepare(
        question.question, question.image, spans={"constraint": question.visual_constraint}
    )
    corrupted = swap_span(model, clean, "constraint", "Paris")
    constraint = tuple(clean.span("constraint").tolist())
    config = AutoConfig.from_pretrained(language_model_folder())
    return Case("demo", model, config, clean, corrupted, constraint)


def stand_in_tower(side: int, columns: int | None = None) -> VisionConfig:
    """A tower of one narrow layer: for a decoder's shape, where the tower is not what is measured.

    Args:
        side: rows of patches.
        columns: by default as many.
    """
    hf = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=(14 * side, 14 * (columns or side)),
        patch_size=14,
    )
    return vision_config(hf, -1, "default")


def smollm2(**options: Any) -> Case:
    """SmolLM2-135M's shape with 576 visual tokens."""
    return random_case("SmolLM2-135M shape", smollm2_config(), stand_in_tower(24), **options)


def smollm2_config(n_layers: int = 30) -> LlamaConfig:
    """SmolLM2-135M's sizes (its published config.json)."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=n_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


def llava_7b(**options: Any) -> Case:
    """LLaVA-1.5-7B's shape: Vicuna-7B, CLIP ViT-L/14 at 336 pixels, 576 visual tokens."""
    decoder = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, num_key_value_heads=32)
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        image_size=336,
        patch_size=14,
    )
    return random_case(
        "LLaVA-1.5-7B shape", decoder, vision_config(tower, -2, "default"), **options
    )


def bunny_3b(**options: Any) -> Case:
    """Bunny-v1.0-3B's shape: Phi-2, SigLIP so400m at 384 pixels, 729 visual tokens."""
    decoder = PhiConfig(
        vocab_size=50295,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.4,
        },
    )
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        num_hidden_layers=27,
        image_size=384,
        patch_size=14,
    )
    return random_case("Bunny-3B shape", decoder, vision_config(tower, -1, "full"), **options)


def onevision_05b(**options: Any) -> Case:
    """LLaVA-OneVision 0.5B's decoder with the most visual tokens: 10 x 729, and 81 line ends."""
    decoder = Qwen2Config(
        vocab_size=152000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    )
    tower = stand_in_tower(27)
    tiles = AnyResConfig(
        resolutions=((3 * 378, 3 * 378),), tile_size=378, tile_grid=tower.grid, max_tiles=9
    )
    processor = LlavaOnevisionImageProcessor(
        size={"height": 378, "width": 378}, image_grid_pinpoints=[[3 * 378, 3 * 378]]
    )
    tiled = Tiled("anyres", {"anyres": tiles}, processor, (3 * 378, 3 * 378))
    return random_case("OneVision-0.5B shape", decoder, tower, tiled=tiled, **options)


def smolvlm_256m(**options: Any) -> Case:
    """SmolVLM-256M's decoder (SmolLM2-135M) with its most tokens: 4 x 4 tiles and the whole.

    Each has 32 x 32 patches, of which 64 visual tokens are made, after two tokens of text.
    """
    tower = replace(
        stand_in_tower(32),
        class_token=False,
        pre_norm=False,
        final_norm=True,
        patch_bias=True,
        positions="nearest",
        select="full",
    )
    side, n_words = 14 * 32, 49152
    processor = Idefics3ImageProcessor(
        size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}
    )
    tiled = Tiled(
        "row_col",
        {"pixel_shuffle": 4, "n_layers": 1, "bias": False},
        processor,
        (4 * side, 4 * side),
        tokenizer_of_tags(n_words),
    )
    decoder = smollm2_config()
    decoder.vocab_size = n_words + 128
    decoder.max_position_embeddings = 8192
    return random_case("SmolVLM-256M shape", decoder, tower, tiled=tiled, **options)


def tokenizer_of_tags(n_words: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbered words that knows the tags of SmolVLM's tiles after them.

    The image token has the last id, as everywhere here.
    """
    tags = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    named = ["\n", FENCE, WHOLE, *tags]
    words = [f"<word {i}>" for i in range(n_words + 128)]
    words[n_words : n_words + len(named)] = named
    words[-1] = PLACEHOLDER
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_tokens([AddedToken(tag, special=True) for tag in [*named, PLACEHOLDER]])
    return fast


def qwen2_5_vl_3b(**options: Any) -> Case:
    """Qwen2.5-VL-3B's decoder and 1,200 visual tokens: an image of 840 x 1,120 pixels."""
    decoder = Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=128000,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    )
    hf = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=2048,
        fullatt_block_indexes=[1],
    )
    tower = tower_config(hf)
    merger = vars(merger_config(tower, hf, decoder.hidden_size))
    tiled = Tiled("any_grid", merger, Qwen2VLImageProcessor(), (840, 1120))
    sections = {"mrope_section": [16, 24, 24], "mrope_interleaved": False}
    return random_case("Qwen2.5-VL-3B shape", decoder, tower, tiled=tiled, rope=sections, **options)


SHAPES: dict[str, Callable[..., Case]] = {
    "demo": demo,
    "smollm2": partial(smollm2, before=13, suffix=22),
    "llava-7b": partial(llava_7b, before=14, suffix=30),
    "onevision-0.5b": partial(onevision_05b, before=14, suffix=30),
    "smolvlm-256m": partial(smolvlm_256m, before=14, suffix=30),
    "bunny-3b": partial(bunny_3b, before=14, suffix=30),
    "qwen2.5-vl-3b": partial(qwen2_5_vl_3b, before=14, suffix=30),
}


def build(name: str, **options: Any) -> Case:
    """A shape by its name, on the GPU (bfloat16) if there is one, else on the CPU (float32).

    Args:
        options: of the shape, such as `n_layers`.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda and name != "demo" else torch.float32
    return SHAPES[name](device=device, dtype=dtype, **options)
