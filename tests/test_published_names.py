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
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmlens.checkpoints import format_of, tower_of
from mmlens.checkpoints.loader import check
from mmlens.checkpoints.towers import KNOWN, OWN, VisionTower, Weights, with_tower
from mmlens.checkpoints.weight_files import WeightFile
from mmlens.model import HookedMultimodalTransformer

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
    "Phi-2": Case(PHI_2, published.PHI_2, [], None, 2.78),
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
    cfg = form.config(tmp_path)
    weights = Weights([Listed(case.names)], form.table(cfg), tuple(form.IGNORED), form.rename)
    if tower is not None and cfg.vision is not None:
        monkeypatch.setattr(VisionTower, "files", lambda self: [Listed(case.tower, OWN)])
        weights = with_tower(weights, tower, cfg.vision)
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg)
    shapes = {key: shape for file in weights.files for key, shape in file.shapes().items()}
    # The loader's own check: nothing unknown, nothing missing, every shape, every parameter.
    check(model, shapes, weights.table, ignored=weights.ignored, rename=weights.rename, where=name)
    renamed = [weights.rename(key) for key in shapes]
    assert len(set(renamed)) == len(renamed)
    assert set(weights.table) <= set(renamed)
    check_left_out([key for key in renamed if key not in weights.table], case.left_out)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == case.n_parameters
    assert (cfg.vision.n_visual_tokens if cfg.vision else None) == case.n_visual


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


def test_what_braces_mean() -> None:
    lines = "a.{0..2}.{x,y}.b [3, 4]\nc []\n"
    names = [f"a.{i}.{w}.b" for i in range(3) for w in "xy"]
    assert expand(lines) == dict.fromkeys(names, (3, 4)) | {"c": ()}
