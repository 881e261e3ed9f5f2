"""Random checkpoints of Gemma 3 with images and of PaliGemma, as the hub has them."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hf_reference import (
    SOURCES,
    attention_activations,
    decoder_activations,
    norm_activations,
    recorded,
    recorded_attention,
    siglip_activations,
)
from random_models import THETA, enliven
from small_tokenizers import small_tokenizer
from tiled_models import random_image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip import modeling_siglip

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for line in messages %}<start_of_turn>{{ line['role'] }}\n"
    "{% for part in line['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What a checkpoint is made of."""

    kind: str
    patch: int
    grid: int
    """Patches of an image's side."""
    pool: int = 1
    window: int | None = None
    caps: tuple[float | None, float | None] = (None, None)
    tied: bool = True

    @property
    def n_tokens(self) -> int:
        """Visual tokens of an image."""
        return (self.grid // self.pool) ** 2

    @property
    def word(self) -> str:
        """What stands for an image in a text for transformers' processor."""
        return "<start_of_image>" if self.kind == "gemma3" else "<image>"


FAMILIES = {
    "gemma3": Family("gemma3", patch=3, grid=6, pool=2, window=5),
    "gemma3, wide windows": Family("gemma3", patch=5, grid=4, pool=4, window=30, tied=False),
    "paligemma": Family("paligemma", patch=4, grid=3),
    "paligemma2": Family("paligemma2", patch=3, grid=3, window=4, caps=(1.5, 4.0)),
}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with the family's special tokens."""
    backend = Tokenizer.from_str(small_tokenizer("bytes").backend_tokenizer.to_str())
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    if family.kind == "gemma3":
        image = {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        }
    else:
        image = {"image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", extra_special_tokens=image, **special
    )
    names = [*special.values(), *image.values(), "<start_of_turn>", "<end_of_turn>"]
    added: list[Any] = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def processor_of(family: Family) -> Any:
    """Transformers' processor."""
    tokenizer, side = tokenizer_of(family), family.patch * family.grid
    size = {"height": side, "width": side}
    if family.kind == "gemma3":
        images = Gemma3ImageProcessor(size=size)
        return Gemma3Processor(images, tokenizer, CHAT_TEMPLATE, image_seq_length=family.n_tokens)
    return PaliGemmaProcessor(
        SiglipImageProcessor(size=size, image_seq_length=family.n_tokens), tokenizer
    )


def random_gemma(family: Family, tokenizer: Any = None) -> Any:
    """Transformers' model in float32 with lively weights, drawn from torch's generator."""
    tokenizer = tokenizer or tokenizer_of(family)
    vision = SiglipVisionConfig(
        hidden_size=21,
        intermediate_size=27,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=family.patch,
        image_size=family.patch * family.grid,
        projection_dim=36,
        vision_use_head=random.random() < 0.5,
    )
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 36,
        "intermediate_size": 41,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": family.tied,
    }
    image = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    given = {"image_token_index": image, "tie_word_embeddings": family.tied}
    if family.kind == "gemma3":
        ropes = {"full_attention": {**THETA, "rope_theta": 7000.0}, "sliding_attention": THETA}
        decoder: Any = Gemma3TextConfig(
            **text,
            sliding_window=family.window,
            sliding_window_pattern=2,
            query_pre_attn_scalar=5,
            rope_parameters=ropes,
        )
        config: Any = Gemma3Config(
            text_config=decoder, vision_config=vision, mm_tokens_per_image=family.n_tokens, **given
        )
        return enliven(Gemma3ForConditionalGeneration(config))
    if family.kind == "paligemma":
        decoder = GemmaConfig(**text)
    else:
        decoder = Gemma2Config(
            **text,
            sliding_window=family.window,
            query_pre_attn_scalar=5,
            attn_logit_softcapping=family.caps[0],
            final_logit_softcapping=family.caps[1],
        )
    config = PaliGemmaConfig(
        text_config=decoder, vision_config=vision, projection_dim=36, hidden_size=36, **given
    )
    return enliven(PaliGemmaForConditionalGeneration(config))


def write(family: Family, folder: Path, hf: Any = None) -> Any:
    """Write a checkpoint with its processor as the hub has them, and return that processor."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = processor_of(family)
    (hf or random_gemma(family, processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    if family.kind == "gemma3":
        template = {"chat_template": CHAT_TEMPLATE}
        (folder / "chat_template.json").write_text(json.dumps(template))
    return processor


def random_batch(
    family: Family, processor: Any, images: list[int], chance: random.Random
) -> dict[str, Any]:
    """Transformers' batch with this many images in each row, padded on the left."""
    texts, pictures = [], []
    for n_images in images:
        words = chance.choice(["What is the capital", " of this country?", "The flag", "Paris\n"])
        pieces = [words, " is red"]
        for _ in range(n_images):  # PaliGemma's come first
            at = chance.randrange(len(pieces) + 1) if family.kind == "gemma3" else 0
            pieces.insert(at, family.word)
        texts.append("".join(pieces) + " Answer:")
        sizes = [(chance.randint(1, 60), chance.randint(1, 60)) for _ in range(n_images)]
        pictures.append([random_image(size, chance.randrange(2**31)) for size in sizes])
    given = {"text": texts, "padding": True, "return_tensors": "pt"}
    return dict(processor(images=pictures, **given))


def positions_of(family: Family, batch: dict[str, Any]) -> Tensor:
    """Rotary positions, padding left out; PaliGemma's begin at 1."""
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return counted if family.kind == "gemma3" else counted + 1


def gemma_activations(
    family: Family, hf: nn.Module, batch: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Transformers' output in eager attention, and its activations under our names."""
    hf.set_attn_implementation("eager")
    text = hf.config.text_config.model_type
    seen: dict[str, Tensor] = {}
    in_decoder: list[tuple[Tensor, ...]] = []
    in_tower: list[tuple[Tensor, ...]] = []
    how: list[Any] = []
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(recorded(dict(hf.named_modules()), seen))
        stack.enter_context(recorded_attention(SOURCES[text], in_decoder, how))
        stack.enter_context(recorded_attention(modeling_siglip, in_tower))
        output = hf(**batch, position_ids=positions_of(family, batch))
    found = decoder_activations(hf, "model.language_model", seen)
    for layer, attended in enumerate(in_decoder):
        prefix = f"blocks.{layer}.attn"
        found |= attention_activations(prefix, *attended, rotary=True, how=how[layer])
    return output, found | tower_and_connector(hf, seen, in_tower)


def tower_and_connector(
    hf: Any, seen: dict[str, Tensor], attended: list[tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """Activations of the vision tower and the connector."""
    prefix, connector = "model.vision_tower", "model.multi_modal_projector"
    positions = hf.get_submodule(f"{prefix}.embeddings.position_embedding")
    found = siglip_activations(hf, prefix, seen, attended) | {
        "vision.hook_pos_embed": positions.weight[None],
        "projector.hook_in": seen[f"{connector}:in"],
        "projector.hook_out": seen[f"{connector}:out"].flatten(0, 1)[None],
    }
    if f"{connector}.mm_soft_emb_norm:in" in seen:
        norm = hf.get_submodule(connector).mm_soft_emb_norm
        found |= norm_activations("projector.ln", norm, seen[f"{connector}.mm_soft_emb_norm:in"])
    return found
