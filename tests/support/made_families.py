"""Random models of many families, in float64, as transformers and as mmlens have them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gemma_models
import qwen_models
import torch
from anyres_checkpoints import random_image, written
from random_models import SHAPES, Prompts, hooked, in_dtype, random_llava, random_prompts
from tiled_models import FAMILIES, random_batch, random_idefics, write
from transformers import GenerationConfig

from mmlens.model.transformer import HookedMultimodalTransformer

IMAGES = (1, 0, 2)
"""How many each row of a batch has."""


@dataclass(frozen=True)
class Made:
    """A model as transformers and as mmlens have it, and a batch with images (and padding)."""

    hf: Any
    model: HookedMultimodalTransformer
    batch: dict[str, Any]

    def decoder_layers(self) -> Any:
        """Transformers' blocks of the language model."""
        inner = self.hf.model
        for name in ("language_model", "text_model"):
            if hasattr(inner, name):
                return getattr(inner, name).layers
        raise AttributeError("no decoder")

    def inputs(self, batch: dict[str, Any] | None = None) -> Any:
        """A batch of transformers' processor as inputs."""
        given = self.batch if batch is None else batch
        return self.model.inputs_from_tokens(given["input_ids"], **without_ids(given))


Maker = Callable[..., Made]


def llava(name: str) -> Maker:
    def make(seed: int, folder: Path, images: Sequence[int] = (1, 2, 0)) -> Made:
        hf = random_llava(SHAPES[name]).double()
        prompts = random_prompts(hf.config, list(images), text_last=True)
        assert prompts.pixel_values is not None
        pixels = prompts.pixel_values.double()
        given = Prompts(prompts.tokens, prompts.attention_mask, pixels).for_hf()
        del given["position_ids"]
        return Made(hf, hooked(hf, folder), given)

    return make


def anyres(name: str) -> Maker:
    def make(seed: int, folder: Path, images: Sequence[int] = (1, 2)) -> Made:
        made = written(name, folder)
        rows = [[random_image(31, 52)], [random_image(40, 19), random_image(8, 8)]]
        texts = ["what is <image> this", "<image> is the capital of <image> this country here"]
        chosen = [(rows[n - 1], texts[n - 1]) for n in images]
        batch = made.batch([text for _, text in chosen], [row for row, _ in chosen])
        return Made(made.hf.double(), made.model.double(), double(batch))

    return make


def idefics(name: str) -> Maker:
    def make(seed: int, folder: Path, images: Sequence[int] = IMAGES) -> Made:
        family = FAMILIES[name]
        hf = random_idefics(family)
        batch = random_batch(write(family, folder, hf), list(images), random.Random(seed))
        return loaded(hf, folder, batch)

    return make


def qwen(family: str) -> Maker:
    def make(seed: int, folder: Path, images: Sequence[int] = IMAGES) -> Made:
        chance = random.Random(seed)
        hf = qwen_models.random_qwen(family, chance)
        processor = qwen_models.write(family, folder, hf)
        return loaded(hf, folder, qwen_models.random_batch(processor, list(images), chance))

    return make


def loaded(hf: Any, folder: Path, batch: Any) -> Made:
    """A checkpoint that is written, without its generation settings."""
    model = HookedMultimodalTransformer.from_pretrained(folder, device="cpu")
    hf.generation_config = model.generation_config = GenerationConfig()
    return Made(hf.double(), model.double(), double(batch))


def gemma(name: str) -> Maker:
    def make(seed: int, folder: Path, images: Sequence[int] = (1, 2)) -> Made:
        # Tied embeddings would let each token be followed by itself.
        family = replace(gemma_models.FAMILIES[name], tied=False)
        hf = gemma_models.random_gemma(family)
        processor = gemma_models.write(family, folder, hf)
        chance = random.Random(seed)
        batch = gemma_models.random_batch(family, processor, list(images), chance)
        model = HookedMultimodalTransformer.from_pretrained(folder, device="cpu").double()
        hf = in_dtype(hf, torch.float64)
        hf.set_attn_implementation("sdpa")  # eager attention of padding is NaN in float64
        batch = {key: value for key, value in batch.items() if key != "labels"}
        return Made(hf, model, double(batch))

    return make


def double(batch: Any) -> dict[str, Any]:
    """A batch whose pixels are in float64."""
    return {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}


def without_ids(batch: dict[str, Any]) -> dict[str, Any]:
    """What a batch holds besides token ids."""
    return {name: each for name, each in batch.items() if name != "input_ids"}


MADE = {
    "LLaVA": llava("grouped queries"),
    "LLaVA, Mistral with windows": llava("mistral, window"),
    "LLaVA-NeXT": anyres("NeXT"),
    "LLaVA-OneVision": anyres("OneVision"),
    "Idefics3": idefics("idefics3"),
    "SmolVLM": idefics("smolvlm"),
    "Qwen2-VL": qwen("qwen2"),
    "Qwen2.5-VL": qwen("qwen2.5"),
    "Gemma 3": gemma("gemma3"),
    "PaliGemma": gemma("paligemma"),
}
