"""Random InternVL checkpoints of odd sizes, as transformers and the hub have them."""

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
    heads,
    norm_activations,
    recorded,
    recorded_attention,
)
from random_models import Shape, enliven, text_config
from small_tokenizers import small_tokenizer
from tiled_models import random_texts
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.internvl import modeling_internvl

# As published with InternVL3-1B-hf.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


@dataclass(frozen=True)
class Family:
    """What a checkpoint is made of."""

    text: Shape
    patch: int = 3
    grid: int = 6
    """Patches of a tile's side, a multiple of `factor`."""
    factor: int = 2
    strip: int = 0
    """Pixels at the right and bottom of a tile that fill no patch."""
    norm: str = "layer_norm"
    qk_norm: bool = False
    bias: bool = True
    mean_pooling: bool = True
    feature_layer: int = -1
    limits: tuple[int, int] = (1, 12)
    """The least and the most tiles of an image."""

    @property
    def side(self) -> int:
        """Pixels of a tile."""
        return self.patch * self.grid + self.strip

    @property
    def n_tokens(self) -> int:
        """Visual tokens of a tile."""
        return (self.grid // self.factor) ** 2


QWEN2 = Shape(decoder="qwen2", n_heads=5, n_kv_heads=1, d_head=8, d_model=40)
QWEN3 = Shape(decoder="qwen3", n_heads=4, n_kv_heads=2, d_head=12, d_model=35, tied=True)
FAMILIES = {
    "Qwen2": Family(QWEN2),
    "Qwen3, the large tower": Family(QWEN3, norm="rms_norm", qk_norm=True, bias=False, grid=4),
    "an earlier layer, no squares": Family(
        QWEN2, patch=2, grid=3, factor=1, strip=1, qk_norm=True, feature_layer=-2, limits=(1, 6)
    ),
    "a last norm, large squares": Family(
        QWEN3, patch=2, grid=8, factor=4, mean_pooling=False, limits=(2, 4)
    ),
}


def tokenizer_of() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with the family's special tokens, and without `<image>`."""
    backend = json.loads(small_tokenizer("bytes").backend_tokenizer.to_str())
    backend["added_tokens"] = [
        token for token in backend["added_tokens"] if token["content"] != "<image>"
    ]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        padding_side="left",
        extra_special_tokens=TOKENS,
        **special,
    )
    names = [*TOKENS.values(), "<|im_start|>", "<|im_end|>"]
    added: list[Any] = [AddedToken(name, special=True, normalized=False) for name in names]
    fast.add_tokens(added, special_tokens=True)
    return fast


def processor_of(family: Family) -> InternVLProcessor:
    """Transformers' processor."""
    least, most = family.limits
    images = GotOcr2ImageProcessor(
        size={"height": family.side, "width": family.side},
        min_patches=least,
        max_patches=most,
        image_mean=[random.uniform(0.3, 0.6) for _ in range(3)],
        image_std=[random.uniform(0.2, 0.4) for _ in range(3)],
    )
    return InternVLProcessor(
        images,
        tokenizer_of(),
        InternVLVideoProcessor(),
        image_seq_length=family.n_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def random_internvl(family: Family) -> Any:
    """Transformers' model in float32 with lively weights, drawn from torch's generator."""
    tokenizer = tokenizer_of()
    text: Any = text_config(family.text)
    text.vocab_size = len(tokenizer) + 3
    text.max_position_embeddings = 4096
    vision = {
        "hidden_size": 21,
        "intermediate_size": 27,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "patch_size": family.patch,
        "image_size": family.side,
        "norm_type": family.norm,
        "use_qk_norm": family.qk_norm,
        "attention_bias": family.bias,
        "use_mean_pooling": family.mean_pooling,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=family.n_tokens,
        downsample_ratio=1 / family.factor,
        vision_feature_layer=family.feature_layer,
        tie_word_embeddings=family.text.tied,
    )
    return enliven(InternVLForConditionalGeneration(config))


def write(family: Family, folder: Path, hf: Any = None) -> InternVLProcessor:
    """Write a checkpoint with its processor as the hub has them, and return that processor."""
    folder.mkdir(parents=True, exist_ok=True)
    if hf is not None:
        hf.save_pretrained(folder)
    processor = processor_of(family)
    processor.save_pretrained(folder)
    return processor


def random_batch(
    processor: InternVLProcessor, counts: list[int], chance: random.Random
) -> dict[str, Any]:
    """Transformers' batch with this many images in each row, padded on the left."""
    texts, images = random_texts(counts, "<IMG_CONTEXT>", chance)
    given = {"text": texts, "padding": True, "return_tensors": "pt"}
    flat = [image for row in images for image in row]
    return dict(processor(images=flat, **given) if flat else processor(**given))


def internvl_activations(hf: nn.Module, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Transformers' output in eager attention, and its activations under our names."""
    hf.set_attn_implementation("eager")
    seen: dict[str, Tensor] = {}
    in_decoder: list[tuple[Tensor, ...]] = []
    in_tower: list[tuple[Tensor, ...]] = []
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    source = SOURCES[hf.config.text_config.model_type]
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(recorded(dict(hf.named_modules()), seen))
        stack.enter_context(recorded_attention(source, in_decoder))
        stack.enter_context(recorded_attention(modeling_internvl, in_tower))
        output = hf(**batch, position_ids=positions)
    found = decoder_activations(hf, "model.language_model", seen)
    for layer, attended in enumerate(in_decoder):
        found |= attention_activations(f"blocks.{layer}.attn", *attended, rotary=True)
    if "pixel_values" in batch:
        found |= image_activations(hf, seen, in_tower)
    return output, found


def image_activations(
    hf: Any, seen: dict[str, Tensor], attended: list[tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """Those of the tower, up to its last feature layer, and of the connector."""
    prefix, projector = "model.vision_tower", "model.multi_modal_projector"
    tower, layer = hf.get_submodule(prefix), hf.config.vision_feature_layer
    n_layers = len(tower.encoder.layer) + 1 + layer
    last = seen[f"{prefix}.encoder.layer.{n_layers - 1}:out"]
    by_head = heads(tower.config.hidden_size // tower.config.num_attention_heads)
    normed = f"{projector}.layer_norm"
    found = {
        "vision.hook_patch_embed": seen[f"{prefix}.embeddings.patch_embeddings:out"],
        "vision.hook_pos_embed": tower.embeddings.position_embeddings,
        "vision.hook_embed": seen[f"{prefix}.embeddings:out"],
        "projector.hook_pre": seen[f"{projector}.linear_1:out"],
        "projector.hook_post": seen[f"{projector}.linear_2:in"],
        "projector.hook_out": seen[f"{projector}:out"].flatten(0, 1)[None],
        **norm_activations("projector.ln", hf.get_submodule(normed), seen[f"{normed}:in"]),
    }
    if layer == -1 and not tower.config.use_mean_pooling:
        found |= norm_activations("vision.ln_final", tower.layernorm, last)
        last = tower.layernorm(last)
    found["vision.hook_out"] = found["projector.hook_in"] = last[:, 1:]
    for number, block in enumerate(tower.encoder.layer[:n_layers]):
        there, here = f"{prefix}.encoder.layer.{number}", f"vision.blocks.{number}"
        mid = seen[f"{there}.layernorm_after:in"]
        parts = {which: seen[f"{there}.attention.{which}_proj:out"] for which in "qkv"}
        found |= {f"{here}.attn.hook_{which}": by_head(x) for which, x in parts.items()}
        if tower.config.use_qk_norm:
            for which in "qk":
                norm, name = getattr(block.attention, f"{which}_norm"), f"attn.{which}_norm"
                joint = norm_activations(f"{here}.{name}", norm, parts[which])
                scale = joint[f"{here}.{name}.hook_scale"][..., None]
                found[f"{here}.{name}.hook_scale"] = scale.expand(
                    *by_head(parts[which]).shape[:-1], 1
                )
                found[f"{here}.{name}.hook_normalized"] = by_head(
                    joint[f"{here}.{name}.hook_normalized"]
                )
        found |= {
            f"{here}.hook_resid_pre": seen[f"{there}:in"],
            f"{here}.hook_resid_mid": mid,
            f"{here}.hook_resid_post": seen[f"{there}:out"],
            f"{here}.hook_attn_out": block.lambda_1 * seen[f"{there}.attention:out"],
            f"{here}.hook_mlp_out": block.lambda_2 * seen[f"{there}.mlp:out"],
            f"{here}.attn.hook_z": by_head(seen[f"{there}.attention.projection_layer:in"]),
            f"{here}.mlp.hook_pre": seen[f"{there}.mlp.fc1:out"],
            f"{here}.mlp.hook_post": seen[f"{there}.mlp.fc2:in"],
            **norm_activations(f"{here}.ln1", block.layernorm_before, seen[f"{there}:in"]),
            **norm_activations(f"{here}.ln2", block.layernorm_after, mid),
            **attention_activations(f"{here}.attn", *attended[number], rotary=False),
        }
    return found
