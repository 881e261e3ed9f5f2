"""Random Hugging Face checkpoints of odd sizes, and random prompts for them.

`random_llava` and `random_llama` make transformers' own models; `hooked` writes one to a folder and
opens it with mmlens, so that every comparison goes the way a user's checkpoint goes.

Weights are scaled so that attention is far from uniform and every activation is of order 1: with
transformers' own initialisation (std 0.02) most mistakes would drown in the tolerance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer

BOS, EOS, PAD, IMAGE, N_SPECIAL = 1, 2, 0, 3, 4
VOCABULARY = 67
N_POSITIONS = 128

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
THETA = {"rope_type": "default", "rope_theta": 300.0}
PARTIAL = {"rope_type": "default", "rope_theta": 9000.0, "partial_rotary_factor": 0.4}


@dataclass(frozen=True)
class Shape:
    """The choices that a random model is made of; what is not said is small and odd."""

    decoder: str = "llama"
    tower: str = "clip"
    n_layers: int = 3
    n_heads: int = 6
    n_kv_heads: int = 3
    d_head: int = 10
    d_model: int = 30
    d_mlp: int = 41
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sequential: bool = False
    rope: dict[str, Any] | None = None
    caps: tuple[float | None, float | None] = (None, None)
    window: int | None = None
    feature_layer: int | list[int] = -2
    select: str = "default"
    projector_bias: bool = True
    projector_act: str = "gelu"
    vision_layers: int = 4
    vision_heads: int = 3
    vision_width: int = 21
    vision_act: str = "quick_gelu"
    patch: int = 5
    grid: int = 3
    vocabulary: int = VOCABULARY
    image_id: int = IMAGE
    extra: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "grouped queries": Shape(),
    "every head its own keys": Shape(n_heads=3, n_kv_heads=3, d_head=14, d_model=33),
    "one head": Shape(n_heads=1, n_kv_heads=1, d_head=22, vision_heads=1, d_model=17),
    "one key-value head": Shape(n_heads=5, n_kv_heads=1, d_head=8, d_model=35),
    "tied": Shape(tied=True),
    "biases": Shape(attention_bias=True, mlp_bias=True),
    "linear rotary": Shape(rope=LINEAR),
    "llama3 rotary": Shape(rope=LLAMA3),
    "yarn rotary": Shape(rope=YARN),
    "last feature layer": Shape(feature_layer=-1),
    "first feature layers": Shape(feature_layer=1, vision_act="gelu"),
    "several feature layers": Shape(feature_layer=[-3, 1, -1]),
    "class token kept": Shape(select="full"),
    "class token kept, several layers": Shape(select="full", feature_layer=[2, -2]),
    "projector without bias": Shape(projector_bias=False, projector_act="relu"),
    "mistral": Shape(decoder="mistral", n_heads=4, n_kv_heads=2, d_head=6, d_model=31),
    "mistral, window": Shape(decoder="mistral", window=6),
    "qwen2": Shape(decoder="qwen2", n_heads=5, n_kv_heads=1, d_head=8, d_model=35),
    "qwen2, some windows": Shape(decoder="qwen2", window=5, tied=True),
    "qwen3": Shape(decoder="qwen3", n_heads=5, n_kv_heads=1, d_head=12, d_model=35),
    "qwen3, biases": Shape(decoder="qwen3", attention_bias=True, tied=True, window=5),
    "granite": Shape(decoder="granite", n_heads=4, n_kv_heads=2, d_head=8, d_model=35, tied=True),
    "granite, biases": Shape(decoder="granite", d_model=60, attention_bias=True, mlp_bias=True),
    "phi": Shape(decoder="phi", n_heads=3, n_kv_heads=3, d_model=30, rope=PARTIAL),
    "phi, grouped queries": Shape(decoder="phi", d_model=60, rope=PARTIAL),
    "gpt_neox": Shape(decoder="gpt_neox", n_heads=3, n_kv_heads=3, rope=PARTIAL),
    "gpt_neox, one part after the other": Shape(
        decoder="gpt_neox", n_heads=5, n_kv_heads=5, d_head=6, rope=PARTIAL, sequential=True
    ),
    "gemma": Shape(decoder="gemma", n_heads=4, n_kv_heads=1, d_head=8, d_model=36, tied=True),
    "gemma2": Shape(decoder="gemma2", n_heads=4, n_kv_heads=2, d_model=36, window=5, caps=(1.5, 4)),
    "gemma2, nothing capped": Shape(decoder="gemma2", d_head=6, window=200, tied=True),
    "gemma3": Shape(decoder="gemma3_text", n_layers=4, window=4, tied=True),
    "gemma3, longer": Shape(
        decoder="gemma3_text", window=6, rope={"full_attention": LINEAR, "sliding_attention": THETA}
    ),
    "siglip": Shape(tower="siglip", select="full"),
    "siglip, first patch dropped": Shape(tower="siglip"),
    "siglip, several layers": Shape(tower="siglip", select="full", feature_layer=[-1, 0, 2]),
    "phi on siglip": Shape(
        decoder="phi", n_heads=3, n_kv_heads=3, rope=PARTIAL, tower="siglip", select="full"
    ),
    "deep and narrow": Shape(n_layers=5, n_heads=2, n_kv_heads=1, d_head=4, d_model=10, d_mlp=11),
}


DECODERS = [name for name, shape in SHAPES.items() if shape.decoder != "llama"]


def text_config(shape: Shape) -> PreTrainedConfig:
    """The decoder of a shape."""
    makers: dict[str, Any] = {
        "llama": partial(LlamaConfig, attention_bias=shape.attention_bias, mlp_bias=shape.mlp_bias),
        "mistral": partial(MistralConfig, sliding_window=shape.window),
        "qwen2": partial(
            Qwen2Config,
            use_sliding_window=shape.window is not None,
            sliding_window=shape.window,
            max_window_layers=1,
        ),
        "qwen3": partial(
            Qwen3Config,
            attention_bias=shape.attention_bias,
            use_sliding_window=shape.window is not None,
            sliding_window=shape.window,
            max_window_layers=1,
        ),
        "granite": partial(
            GraniteConfig,
            attention_bias=shape.attention_bias,
            mlp_bias=shape.mlp_bias,
            embedding_multiplier=1.7,
            residual_multiplier=0.6,
            attention_multiplier=0.4,
            logits_scaling=2.3,
        ),
        "phi": PhiConfig,
        "gpt_neox": partial(GPTNeoXConfig, use_parallel_residual=not shape.sequential),
        "gemma": GemmaConfig,
        "gemma2": partial(
            Gemma2Config,
            sliding_window=shape.window,
            query_pre_attn_scalar=5,
            attn_logit_softcapping=shape.caps[0],
            final_logit_softcapping=shape.caps[1],
        ),
        "gemma3_text": partial(
            Gemma3TextConfig,
            sliding_window=shape.window,
            query_pre_attn_scalar=5,
            sliding_window_pattern=2,
            final_logit_softcapping=shape.caps[1],
        ),
    }
    rope: Any = shape.rope or {"rope_type": "default", "rope_theta": 7000.0}
    if shape.decoder == "gemma3_text" and shape.rope is None:
        rope = {"full_attention": rope, "sliding_attention": THETA}
    return makers[shape.decoder](
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.d_head,
        max_position_embeddings=N_POSITIONS,
        tie_word_embeddings=shape.tied,
        rope_parameters=rope,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def llava_config(shape: Shape) -> LlavaConfig:
    """The whole of a shape."""
    sizes: dict[str, Any] = {
        "hidden_size": shape.vision_width,
        "intermediate_size": 27,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "patch_size": shape.patch,
    }
    side = shape.patch * shape.grid
    vision: PreTrainedConfig
    if shape.tower == "siglip":  # with a strip at the right and bottom that fills no patch
        vision = SiglipVisionConfig(image_size=side + shape.patch - 1, **sizes)
    else:
        vision = CLIPVisionConfig(
            image_size=side, hidden_act=shape.vision_act, projection_dim=13, **sizes
        )
    return LlavaConfig(
        vision_config=vision,
        text_config=text_config(shape),
        image_token_index=shape.image_id,
        image_seq_length=shape.grid**2 + (shape.tower == "clip") - (shape.select == "default"),
        vision_feature_layer=shape.feature_layer,
        vision_feature_select_strategy=shape.select,
        projector_hidden_act=shape.projector_act,
        multimodal_projector_bias=shape.projector_bias,
        tie_word_embeddings=shape.tied,
        **shape.extra,
    )


def random_llava(shape: Shape | None = None, **choices: Any) -> LlavaForConditionalGeneration:
    """Transformers' LLaVA in float32 with lively weights, drawn from torch's generator."""
    config = llava_config(replace(shape or Shape(), **choices))
    return enliven(LlavaForConditionalGeneration(config))


def random_llama(shape: Shape | None = None, **choices: Any) -> LlamaForCausalLM:
    """Transformers' Llama in float32 with lively weights, drawn from torch's generator."""
    return enliven(LlamaForCausalLM(text_config(replace(shape or Shape(), **choices))))


def random_language_model(shape: Shape) -> PreTrainedModel:
    """The decoder of any family alone."""
    return enliven(AutoModelForCausalLM.from_config(text_config(shape), dtype=torch.float32))


def in_dtype(hf: Any, dtype: torch.dtype) -> Any:
    """Bring transformers' model to a dtype, as its `from_pretrained(dtype=...)` does.

    The rotary frequencies stay in float32. `Module.to` rounds them, too; in bfloat16 by up to
    2^-9, so that a frequency of 0.2 is off by 0.2 radians at position 500. `to(float64)` does not
    bring them back: that is another model than the checkpoint's.
    """
    kept = {name: each for name, each in hf.named_buffers() if name.endswith("inv_freq")}
    hf = hf.to(dtype)
    for name, frequencies in kept.items():
        module, _, buffer = name.rpartition(".")
        setattr(hf.get_submodule(module), buffer, frequencies)
    return hf


@torch.no_grad()
def enliven(model: Any) -> Any:
    """Redraw every weight, so that activations stay of order 1 and attention picks its keys."""
    config = getattr(model, "config", None)  # parts of a model have none
    is_gemma = config is not None and config.get_text_config().model_type.startswith("gemma")
    offset = 1.0 if is_gemma else 0.0
    for name, weight in model.named_parameters():
        if "norm" in name or "layrnorm" in name:
            in_tower = "vision" in name
            mean = 0.0 if name.endswith("bias") else 1.0 - (0.0 if in_tower else offset)
            weight.normal_(mean=mean, std=0.3)
        elif weight.ndim == 1:
            weight.normal_(std=0.3)
        elif "embed" in name:
            weight.normal_(std=0.5)
        else:  # larger queries and keys: scores of standard deviation 2
            gain = 1.5 if any(kind in name for kind in ("q_proj", "k_proj", "query_key")) else 1.0
            weight.normal_(std=gain / weight[0].numel() ** 0.5)
    return model.eval()


def hooked(model: Any, folder: Path, **options: Any) -> HookedMultimodalTransformer:
    """The model written to `folder` by transformers, and opened with mmlens."""
    model.save_pretrained(folder)
    options = {"device": "cpu", **options}
    return HookedMultimodalTransformer.from_pretrained(folder, **options)


@dataclass(frozen=True)
class Prompts:
    """A batch of token ids with images, as Hugging Face's processors give them."""

    tokens: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    visual: dict[str, Tensor] = field(default_factory=dict)
    """What else a processor returns of the images."""

    @property
    def position_ids(self) -> Tensor:
        """Counted from the first real token, 0 in the padding."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    @property
    def real(self) -> Tensor:
        """True where there is no padding."""
        return self.attention_mask.bool()

    def for_hf(self) -> dict[str, Any]:
        """The arguments of transformers' models."""
        given = {
            "input_ids": self.tokens,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        if self.pixel_values is not None:
            given["pixel_values"] = self.pixel_values
        return given | self.visual

    def for_mmlens(self, model: HookedMultimodalTransformer) -> MultimodalInputs:
        """The same as inputs of ours."""
        return model.inputs_from_tokens(
            self.tokens, self.pixel_values, attention_mask=self.attention_mask, **self.visual
        )


def random_prompts(
    config: Any, images: list[int], words: list[int] | None = None, text_last: bool = False
) -> Prompts:
    """One row for each entry of `images`, the number of images in it; padded on the left.

    `words` gives the number of text tokens of each row (by default drawn between 3 and 9). A
    image may be anywhere; with `text_last` there is text after it.
    """
    vision = getattr(config, "vision_config", None)
    rows = []
    for index, n_images in enumerate(images):
        n_words = random.randint(3, 9) if words is None else words[index]
        text = torch.randint(N_SPECIAL, VOCABULARY, (n_words,)).tolist()
        pieces: list[list[int]] = [[word] for word in text]
        for _ in range(n_images):
            pieces.insert(
                random.randint(0, len(pieces) - text_last), [IMAGE] * config.image_seq_length
            )
        rows.append([BOS, *(token for piece in pieces for token in piece)])
    longest = max(map(len, rows))
    pixels = None
    if sum(images):
        size = vision.image_size
        pixels = torch.randn(sum(images), vision.num_channels, size, size)
    return Prompts(
        tokens=torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        pixel_values=pixels,
    )
