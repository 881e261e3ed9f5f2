"""Random checkpoints of LLaVA-NeXT and LLaVA-OneVision, written with transformers' own processors.

`written` makes transformers' model and processor and opens the folder with mmlens. Tiles are small,
so that an image has a hundred visual tokens, and of an odd number of patches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_models import Prompts, Shape, enliven, llava_config
from small_tokenizers import tokenizer_with
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmlens.model.transformer import HookedMultimodalTransformer

PATCH, GRID = 4, 5
N_CTX = 4096
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} ASSISTANT:"
)
NEXT_TILES = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
ONEVISION_TILES = [(rows, cols) for rows in range(1, 5) for cols in range(1, 5)]
SHAPES = {
    "NeXT": Shape(),
    "NeXT, Mistral": Shape(decoder="mistral", n_heads=4, n_kv_heads=2, d_head=6, d_model=31),
    "NeXT, several layers of SigLIP": Shape(
        tower="siglip", select="full", feature_layer=[-4, 1, -1], tied=True
    ),
    "NeXT, Granite Vision": Shape(
        decoder="granite", n_heads=4, n_kv_heads=2, d_head=8, d_model=35, tied=True,
        tower="siglip", select="full", feature_layer=[-4, -3, 1, -1],
    ),
    "OneVision": Shape(
        decoder="qwen2", n_heads=5, n_kv_heads=1, d_head=8, d_model=35, tower="siglip",
        select="full", feature_layer=-1, tied=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A checkpoint as transformers has it, and as mmlens has opened it."""

    hf: Any
    processor: Any
    model: HookedMultimodalTransformer

    @property
    def one_tile_of_several(self) -> bool:
        """Whether an image of a prompt with several is seen in one tile."""
        return isinstance(self.processor, LlavaOnevisionProcessor)

    def batch(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        """What transformers' processor makes of prompts, each with its images."""
        given = [list(row) for row in images if row] or None
        return self.processor(text=list(texts), images=given, padding=True, return_tensors="pt")

    def n_tiles(self, images: Sequence[Sequence[Image.Image]]) -> list[int]:
        """How many tiles each image has, as transformers' model counts them."""
        config = self.hf.config
        return [
            1
            if self.one_tile_of_several and len(row) > 1
            else image_size_to_num_patches(
                (image.height, image.width),
                config.image_grid_pinpoints,
                config.vision_config.image_size,
            )
            for row in images
            for image in row
        ]


def random_anyres(name: str, **choices: Any) -> Any:
    """Transformers' model of one of `SHAPES`, in float32 with lively weights."""
    shape = replace(SHAPES[name], patch=PATCH, grid=GRID, **choices)
    plain = llava_config(shape)
    plain.text_config.max_position_embeddings = N_CTX
    side = plain.vision_config.image_size
    fields = {
        "vision_config": plain.vision_config,
        "text_config": plain.text_config,
        "image_token_index": shape.image_id,
        "vision_feature_layer": shape.feature_layer,
        "vision_feature_select_strategy": shape.select,
        "tie_word_embeddings": shape.tied,
    }
    model: Any
    if name.startswith("NeXT"):
        pinpoints = [[rows * side, cols * side] for rows, cols in NEXT_TILES]
        config = LlavaNextConfig(**fields, image_grid_pinpoints=pinpoints)
        model = LlavaNextForConditionalGeneration(config)
    else:
        pinpoints = [[rows * side, cols * side] for rows, cols in ONEVISION_TILES]
        ratio = f"anyres_max_{random.choice([2, 3, 5])}"
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                **fields, image_grid_pinpoints=pinpoints, vision_aspect_ratio=ratio
            )
        )
    return enliven(model)


def processor_of(hf: Any, tokenizer: Any) -> Any:
    """Transformers' processor for a model."""
    config = hf.config
    side = config.vision_config.image_size
    settings: dict[str, Any] = {
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "image_mean": [random.uniform(0.3, 0.6) for _ in range(3)],
        "image_std": [random.uniform(0.2, 0.4) for _ in range(3)],
    }
    square = {"height": side, "width": side}
    if isinstance(hf, LlavaOnevisionForConditionalGeneration):
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=square, **settings),
            tokenizer,
            LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=GRID**2,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            vision_aspect_ratio=config.vision_aspect_ratio,
            chat_template=TEMPLATE,
        )
    is_clip = config.vision_config.model_type == "clip_vision_model"
    size: Any = {"shortest_edge": side} if is_clip else square
    return LlavaNextProcessor(
        LlavaNextImageProcessor(size=size, crop_size=square, **settings),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(is_clip),
        chat_template=TEMPLATE,
    )


def written(name: str, folder: Path, dtype: torch.dtype | None = None, **choices: Any) -> Written:
    """Write one of `SHAPES` to a folder, with its processor, and open it."""
    tokenizer = tokenizer_with(random.choice(["bytes", "pieces"]), padding_side="left")
    tokenizer.add_tokens([AddedToken("<video>", special=True)], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    hf = random_anyres(name, vocabulary=len(tokenizer), image_id=image_id, **choices)
    processor = processor_of(hf, tokenizer)
    hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    model = HookedMultimodalTransformer.from_pretrained(folder, device="cpu", dtype=dtype)
    return Written(hf, processor, model)


def random_image(width: int, height: int) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


def odd_sizes(n: int) -> list[tuple[int, int]]:
    """Widths and heights of images: some of every kind, the rest drawn."""
    kinds = [
        *((1, 1), (2000, 10), (10, 2000), (3, 900), (700, 1), (64, 64), (41, 41), (40, 20)),
        *((20, 41), (120, 119), (60, 20), (44, 22), (22, 88), (501, 500), (96, 33)),
    ]
    drawn = [
        (random.randint(2, 300), random.randint(2, 300)) for _ in range(max(0, n - len(kinds)))
    ]
    return [*kinds, *drawn][:n]


def as_prompts(batch: Any) -> Prompts:
    """A batch of transformers' processor, for `hf_reference`."""
    visual: dict[str, Tensor] = {
        key: batch[key] for key in ("image_sizes", "batch_num_images") if key in batch
    }
    return Prompts(batch["input_ids"], batch["attention_mask"], batch.get("pixel_values"), visual)


def packed(batch: Any, counts: Sequence[int]) -> Tensor:
    """The tiles of a batch one after the other; what pads it must be zero."""
    pixels = batch["pixel_values"]
    for tiles, n in zip(pixels, counts, strict=True):
        assert not tiles[n:].any()
    return torch.cat([tiles[:n] for tiles, n in zip(pixels, counts, strict=True)])
