"""Checkpoints at their published sizes, without the weights: every published name has its place in
the model, or is left out on purpose, and every parameter of the model is filled.

The lists are those of `published_names.py`; that they are right is tested against transformers'
own modules, and Bunny's against the size of its files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published_names as published
import pytest
import torch
from published_names import expand, put_under
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmlens.checkpoints.load import format_of, tower_of
from mmlens.checkpoints.loader import Weights, check
from mmlens.checkpoints.towers.named_towers import KNOWN, OWN, VisionTower, with_tower
from mmlens.checkpoints.weight_files import WeightFile, all_shapes
from mmlens.model.transformer import HookedMultimodalTransformer

CLIP_NAME, SIGLIP_NAME = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"

# config.json as published, without what does not concern the model.
VICUNA: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
SIZES: dict[str, dict[str, int]] = {
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}
PHI_2: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}


def llava_1_5(size: str) -> dict[str, Any]:
    return {
        **VICUNA,
        **SIZES[size],
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": CLIP_NAME,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
        "vocab_size": 32000,
    }


def llava_1_5_hf(size: str) -> dict[str, Any]:
    sizes = {} if size == "7B" else SIZES[size]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {**VICUNA, **sizes, "model_type": "llama", "vocab_size": 32064},
        "vision_config": {**KNOWN[CLIP_NAME], "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
LLAVA_NEXT = {
    **llava_1_5_hf("7B"),
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": PINPOINTS,
    "use_image_newline_parameter": True,
}
MISTRAL: dict[str, Any] = {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
ONEVISION: dict[str, Any] = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "model_type": "llava_onevision",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "image_token_index": 151646,
    "projector_hidden_act": "gelu",
    "text_config": {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 152000,
    },
    "tie_word_embeddings": False,
    "video_token_index": 151647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": KNOWN[SIGLIP_NAME] | {"num_hidden_layers": 26, "vision_use_head": False},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
GRANITE_VISION: dict[str, Any] = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": [[384, 384 * n] for n in range(1, 11)] + [[768, 384], [768, 768]],
    "image_token_index": 49155,
    "projector_hidden_act": "gelu",
    "text_config": {
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_theta": 300000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49156,
    },
    "tie_word_embeddings": True,
    "vision_config": KNOWN[SIGLIP_NAME],
    "vision_feature_layer": [-24, -20, -12, -1],
    "vision_feature_select_strategy": "full",
}
LLAVA_1_6 = llava_1_5("7B") | {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": PINPOINTS,
    "mm_patch_merge_type": "spatial_unpad",
    "unfreeze_mm_vision_tower": True,
}
PYTHIA_70M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
BUNNY = PHI_2 | {
    "architectures": ["BunnyPhiForCausalLM"],
    "model_type": "bunny-phi",
    "auto_map": {"AutoConfig": "configuration_bunny_phi.BunnyPhiConfig"},
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": SIGLIP_NAME,
    "pad_token_id": 50256,
    "use_mm_proj": True,
    "vocab_size": 50295,
}
TINYLLAVA = {
    "architectures": ["TinyLlavaForConditionalGeneration"],
    "connector_type": "mlp2x_gelu",
    "hidden_size": 2560,
    "image_aspect_ratio": "square",
    "image_token_index": -200,
    "llm_model_name_or_path": "microsoft/phi-2",
    "model_type": "tinyllava",
    "text_config": PHI_2,
    "tokenizer_model_max_length": 3072,
    "vision_config": KNOWN[SIGLIP_NAME] | {"model_name_or_path": SIGLIP_NAME},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch",
    "vision_model_name_or_path": SIGLIP_NAME,
    "vocab_size": 51200,
}


def idefics3(
    model_type: str, sizes: dict[str, int], tower: dict[str, int], factor: int, image_token: int
) -> dict[str, Any]:
    """With the numbers that are not what transformers takes by default."""
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[model_type]
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": model_type,
        "image_token_id": image_token,
        "scale_factor": factor,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "text_config": {
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "pad_token_id": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": False,
            **sizes,
        },
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "model_type": f"{model_type}_vision",
            "num_channels": 3,
            **tower,
        },
    }


def internvl(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, *, qwen3: bool = False
) -> dict[str, Any]:
    """With the numbers that are not what transformers takes by default."""
    large = width in (5120, 8192) and layers > 48  # 38B and 78B
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
             "num_hidden_layers": 24, "attention_bias": True}  # fmt: skip
    if large:
        tower = {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25,
                 "num_hidden_layers": 45, "norm_type": "rms_norm", "use_qk_norm": True}  # fmt: skip
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": 151671 if qwen3 else 151667,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "text_config": {
            **({"head_dim": 128} if qwen3 else {}),
            "hidden_size": width,
            "intermediate_size": mlp,
            "max_position_embeddings": 40960 if qwen3 else 32768,
            "model_type": "qwen3" if qwen3 else "qwen2",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "vocab_size": 151936 if qwen3 else 151674,
        },
        "vision_config": {"model_type": "internvl_vision", **tower},
    }


def text_sizes(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, int]:
    return {
        "head_dim": width // heads,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


SIGLIP_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "image_size": 512,
    "intermediate_size": 3072,
    "model_type": "siglip_vision_model",  # as published
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}
SO400M = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
SMOL_135M = text_sizes(576, 1536, 30, 9, 3, 49280)
SMOL_360M = text_sizes(960, 2560, 32, 15, 5, 49280)
SMOL_1_7B = text_sizes(2048, 8192, 24, 32, 32, 49155)
LLAMA_3 = text_sizes(4096, 14336, 32, 32, 8, 128259)


CLIP_LEFT_OUT = [r"{}encoder\.layers\.23\..*", r"{}post_layernorm\..*"]
SIGLIP_LEFT_OUT = [r"{}encoder\.layers\.26\..*", r"{}post_layernorm\..*", r"{}head\..*"]
WHOLE_CLIP = published.CLIP_L + published.CLIP_L_TEXT + published.CLIP_L_BUFFERS


@dataclass(frozen=True)
class Case:
    """A published checkpoint: its config.json, its tensors and those of its tower's own."""

    config: dict[str, Any]
    names: str
    left_out: list[str]
    n_visual: int | None
    n_parameters: float
    """Of the model that is built, in billions."""
    tower: str = ""


def internvl_case(n_parameters: float, *sizes: int, qwen3: bool = False) -> Case:
    """One of InternVL3 (or 3.5): width, MLP, layers, heads, heads of keys."""
    config = internvl(*sizes, qwen3=qwen3)
    width, mlp, layers, heads, kv_heads = sizes
    large = config["vision_config"]["hidden_size"] == 3200
    d_head = 128 if qwen3 else width // heads
    text = {
        "vocab": config["text_config"]["vocab_size"],
        "width": width,
        "mlp": mlp,
        "last": layers - 1,
        "queries": heads * d_head,
        "keys": kv_heads * d_head,
    }
    more = published.QWEN3_NORMS if qwen3 else published.QWEN2_BIASES
    tower = published.INTERNVIT_6B if large else published.INTERNVIT_300M
    names = published.internvl(text, more, tower, 12800 if large else 4096)
    return Case(config, names, [], 256, n_parameters)


OWN_LEFT_OUT = [p.format("vision tower: ") for p in CLIP_LEFT_OUT] + [
    r"vision tower: (text_model\..*|\w+_projection\.weight|logit_scale|embeddings\.position_ids)"
]
IN_BUNNY = r"model\.vision_tower\.vision_tower\.vision_model\."
IN_TINYLLAVA = r"vision_tower\._vision_tower\.vision_model\."
CASES = {
    "LLaVA-1.5 7B": Case(
        llava_1_5("7B"),
        published.llava_1_5(published.SIZE_7B),
        [*OWN_LEFT_OUT, r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
        576, 7.05, WHOLE_CLIP,
    ),
    "LLaVA-1.5 13B": Case(
        llava_1_5("13B"),
        published.llava_1_5(published.SIZE_13B),
        [*OWN_LEFT_OUT, r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
        576, 13.34, WHOLE_CLIP,
    ),
    "LLaVA-1.5 7B, Hugging Face": Case(
        llava_1_5_hf("7B"),
        published.llava_1_5_hf(published.SIZE_7B),
        [p.format(r"vision_tower\.") for p in CLIP_LEFT_OUT],
        576, 7.05,
    ),
    "LLaVA-1.5 13B, Hugging Face": Case(
        llava_1_5_hf("13B"),
        published.llava_1_5_hf(published.SIZE_13B),
        [p.format(r"vision_tower\.") for p in CLIP_LEFT_OUT],
        576, 13.34,
    ),
    "LLaVA 1.6 7B": Case(
        LLAVA_1_6,
        published.LLAVA_1_6,
        [p.format(r"model\.vision_tower\.vision_tower\.vision_model\.") for p in CLIP_LEFT_OUT],
        576, 7.05, WHOLE_CLIP,
    ),
    "LLaVA-NeXT, Vicuna": Case(
        LLAVA_NEXT,
        published.LLAVA_NEXT_VICUNA,
        [p.format(r"vision_tower\.") for p in CLIP_LEFT_OUT],
        576, 7.05,
    ),
    "LLaVA-NeXT, Mistral": Case(
        LLAVA_NEXT | {"text_config": MISTRAL},
        published.LLAVA_NEXT_MISTRAL,
        [p.format(r"vision_tower\.") for p in CLIP_LEFT_OUT],
        576, 7.55,
    ),
    "LLaVA-NeXT, Granite Vision 2B": Case(
        GRANITE_VISION, published.GRANITE_VISION_2B,
        [p.format(r"vision_tower\.") for p in SIGLIP_LEFT_OUT[1:]],
        729, 2.96,
    ),
    "OneVision 0.5B": Case(
        ONEVISION, published.ONEVISION_05B, [r"vision_tower\.post_layernorm\..*"], 729, 0.89
    ),
    "Bunny-3B": Case(
        BUNNY, published.BUNNY_3B, [rf"{IN_BUNNY}post_layernorm\..*"], 729, 3.18
    ),
    "Bunny, the tower elsewhere": Case(
        BUNNY,
        "".join(line + "\n" for line in published.BUNNY_3B.splitlines() if "tower" not in line),
        [p.format("vision tower: ") for p in SIGLIP_LEFT_OUT],
        729, 3.18, published.SIGLIP,
    ),
    "TinyLLaVA-3.1B": Case(
        TINYLLAVA, published.TINYLLAVA_3B, [p.format(IN_TINYLLAVA) for p in SIGLIP_LEFT_OUT],
        728, 3.19,
    ),
    "SmolVLM 256M": Case(
        idefics3("idefics3", SMOL_135M, SIGLIP_BASE, 4, 49190),
        published.SMOLVLM_256M, [], 64, 0.26,
    ),
    "SmolVLM2 256M": Case(
        idefics3("smolvlm", SMOL_135M, SIGLIP_BASE, 4, 49190),
        published.SMOLVLM_256M, [], 64, 0.26,
    ),
    "SmolVLM2 500M": Case(
        idefics3("smolvlm", SMOL_360M, SIGLIP_BASE, 4, 49190),
        published.SMOLVLM_500M, [], 64, 0.51,
    ),
    "SmolVLM 2.2B": Case(
        idefics3("idefics3", SMOL_1_7B, SO400M, 3, 49153), published.SMOLVLM_2B, [], 81, 2.25
    ),
    "SmolVLM2 2.2B": Case(
        idefics3("smolvlm", SMOL_1_7B | {"vocab_size": 49280}, SO400M, 3, 49190),
        published.SMOLVLM2_2B, [], 81, 2.25,
    ),
    "Idefics3 8B": Case(
        idefics3("idefics3", LLAMA_3, SO400M | {"image_size": 364}, 2, 128257),
        published.IDEFICS3_8B, [], 169, 8.46,
    ),
    "InternVL3 1B": internvl_case(0.94, 896, 4864, 24, 14, 2),
    "InternVL3 2B": internvl_case(2.09, 1536, 8960, 28, 12, 2),
    "InternVL3 8B": internvl_case(7.94, 3584, 18944, 28, 28, 4),
    "InternVL3 14B": internvl_case(15.12, 5120, 13824, 48, 40, 8),
    "InternVL3 38B": internvl_case(38.39, 5120, 27648, 64, 40, 8),
    "InternVL3 78B": internvl_case(78.41, 8192, 29568, 80, 64, 8),
    "InternVL3.5 1B": internvl_case(1.06, 1024, 3072, 28, 16, 8, qwen3=True),
    "InternVL3.5 8B": internvl_case(8.53, 4096, 12288, 36, 32, 8, qwen3=True),
    "Phi-2": Case(PHI_2, published.PHI_2, [], None, 2.78),
    "Qwen3-0.6B": Case(QWEN3_06B, published.QWEN3_06B, [r"lm_head\.weight"], None, 0.6),
    "Pythia-70M": Case(
        PYTHIA_70M,
        published.PYTHIA_70M,
        [
            r"gpt_neox\.layers\.\d\.attention\.(masked_)?bias",
            r"gpt_neox\.layers\.\d\.attention\.rotary_emb\.inv_freq",
        ],
        None, 0.07,
    ),
}  # fmt: skip


class Listed(WeightFile):
    """A weight file of which only the names and shapes are known."""

    def __init__(self, lines: str, prefix: str = "") -> None:
        super().__init__(Path("listed"), prefix)
        object.__setattr__(self, "lines", lines)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return expand(put_under(self.prefix, self.lines))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_every_published_name_has_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    form = format_of(tmp_path)
    tower = tower_of(form, tmp_path, None)
    cfg = form.config(tmp_path, tower)
    weights = Weights([Listed(case.names)], form.table(cfg), form.ignored, form.rename)
    if tower is not None and cfg.vision is not None:
        monkeypatch.setattr(VisionTower, "files", lambda self: [Listed(case.tower, OWN)])
        weights = with_tower(weights, tower, cfg.vision)
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg)
    shapes = dict(all_shapes(weights.files))
    # The loader's own check: nothing unknown, nothing missing, every shape, every parameter.
    check(model, shapes, weights, name)
    renamed = [weights.rename(key) for key in shapes]
    assert len(set(renamed)) == len(renamed)
    assert set(weights.table) <= set(renamed)
    check_left_out([key for key in renamed if key not in weights.table], case.left_out)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == case.n_parameters
    assert cfg.mm_tokens_per_image == case.n_visual


def check_left_out(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Each name matches a pattern, and each pattern a name."""
    matches = {name: [p for p in patterns if re.fullmatch(p, name)] for name in names}
    assert [name for name, found in matches.items() if not found] == []
    assert {p for found in matches.values() for p in found} == set(patterns)


# The lists


def of_transformers(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names without the prefix that transformers is losing."""
    return {
        re.sub(r"^(vision_model|text_model)\.", "", key): tuple(tensor.shape)
        for key, tensor in module.state_dict().items()
        if not key.endswith("position_ids")
    }


def without_prefix(lines: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix("vision_model."): shape for key, shape in expand(lines).items()}


def test_the_lists_are_what_transformers_has() -> None:
    with torch.device("meta"):
        for size, width in [("7B", published.SIZE_7B), ("13B", published.SIZE_13B)]:
            llama = LlamaForCausalLM(LlamaConfig(**VICUNA, **SIZES[size], vocab_size=32000))
            assert of_transformers(llama) == expand(published.LLAMA.format(vocab=32000, **width))
        phi = PhiForCausalLM(PhiConfig(**PHI_2))
        assert of_transformers(phi) == expand(published.PHI_2)
        siglip = SiglipVisionModel(SiglipVisionConfig(**KNOWN[SIGLIP_NAME]))
        assert of_transformers(siglip) == without_prefix(published.SIGLIP)
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                "num_hidden_layers": 12, "projection_dim": 768}  # fmt: skip
        both = CLIPConfig(text_config=text, vision_config=KNOWN[CLIP_NAME], projection_dim=768)
        clip = CLIPModel(both)
    theirs = {
        re.sub(r"^vision_model\.(vision_model\.)?|^text_model\.(?=text_model\.)", "", key): shape
        for key, shape in ((k, tuple(t.shape)) for k, t in clip.state_dict().items())
        if not key.endswith("position_ids")
    }
    assert theirs == without_prefix(published.CLIP_L + published.CLIP_L_TEXT)


def test_bunny_has_the_bytes_of_its_files() -> None:
    """Beyond two bytes for every number, its two files hold their headers: a line for a tensor."""
    shapes = expand(published.BUNNY_3B)
    header = sum(
        len(json.dumps({key: {"dtype": "F16", "shape": shape, "data_offsets": [10**9, 10**9]}}))
        for key, shape in shapes.items()
    )
    beyond = published.BUNNY_3B_FILES - 2 * sum(map(math.prod, shapes.values()))
    assert 0.8 * header < beyond < header


def test_smolvlm_has_the_bytes_of_its_file() -> None:
    shapes = expand(published.SMOLVLM_256M)
    assert sum(map(math.prod, shapes.values())) == 256_484_928  # as its page says
    header = sum(
        len(json.dumps({key: {"dtype": "BF16", "shape": shape, "data_offsets": [10**9, 10**9]}}))
        for key, shape in shapes.items()
    )
    beyond = published.SMOLVLM_256M_FILE - 2 * 256_484_928
    assert 0.8 * header < beyond < header


def test_what_braces_mean() -> None:
    lines = "a.{0..2}.{x,y}.b [3, 4]\nc []\n"
    names = [f"a.{i}.{w}.b" for i in range(3) for w in "xy"]
    assert expand(lines) == dict.fromkeys(names, (3, 4)) | {"c": ()}


TILED = ("NeXT", "OneVision", "InternVL")


@pytest.mark.parametrize("name", [name for name in CASES if any(kind in name for kind in TILED)])
def test_tiled_models_are_what_transformers_has(name: str, tmp_path: Path) -> None:
    """But for the place of the tower's prefix, and where names begin."""
    case = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    rename = format_of(tmp_path).rename
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(tmp_path)
        model = AutoModelForImageTextToText.from_config(config)
    theirs = {
        rename(key): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if not key.endswith("position_ids")
    }
    if config.tie_word_embeddings:
        theirs.pop("language_model.lm_head.weight")
    assert theirs == {rename(key): shape for key, shape in expand(case.names).items()}
