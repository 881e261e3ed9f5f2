"""Gemma's checkpoints at their published sizes, without the weights.

Every published name has its place in the model or is left out on purpose, every parameter is
filled; and the lists are those of transformers' own modules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from published_names import SIGLIP_LAYERS, expand, put_under
from test_published_names import Listed
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mmlens.checkpoints.load import format_of
from mmlens.checkpoints.loader import Weights, check
from mmlens.checkpoints.weight_files import all_shapes
from mmlens.model.transformer import HookedMultimodalTransformer

GEMMA = """
model.embed_tokens.weight [{vocab}, {width}]
model.layers.{{0..{last}}}.self_attn.q_proj.weight [{queries}, {width}]
model.layers.{{0..{last}}}.self_attn.{{k,v}}_proj.weight [{keys}, {width}]
model.layers.{{0..{last}}}.self_attn.o_proj.weight [{width}, {queries}]
model.layers.{{0..{last}}}.mlp.{{gate,up}}_proj.weight [{mlp}, {width}]
model.layers.{{0..{last}}}.mlp.down_proj.weight [{width}, {mlp}]
model.layers.{{0..{last}}}.{{input,post_attention}}_layernorm.weight [{width}]
model.norm.weight [{width}]
"""
SANDWICH = "model.layers.{{0..{last}}}.{{pre,post}}_feedforward_layernorm.weight [{width}]\n"
QK_NORM = "model.layers.{{0..{last}}}.self_attn.{{q,k}}_norm.weight [{head}]\n"
TEXTS = {"gemma": GEMMA, "gemma2": GEMMA + SANDWICH, "gemma3_text": GEMMA + SANDWICH + QK_NORM}
CONNECTOR = {
    "gemma3": "mm_input_projection_weight [1152, {width}]\nmm_soft_emb_norm.weight [1152]\n",
    "paligemma": "linear.weight [{width}, 1152]\nlinear.bias [{width}]\n",
}


@dataclass(frozen=True)
class Case:
    """The sizes of a published checkpoint."""

    kind: str
    width: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp: int
    vocab: int
    n_parameters: float
    """In billions, embeddings once, the tower's unused head left out."""
    head: int = 256
    sees: str = ""
    side: int = 0
    others: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        text: dict[str, Any] = {
            "model_type": self.kind,
            "hidden_size": self.width,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            **self.others,
        }
        if not self.sees:
            return text
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": self.side,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        }
        config = {"model_type": self.sees, "text_config": text, "vision_config": vision}
        if self.sees == "paligemma":
            config |= {"projection_dim": self.width, "image_token_index": 257152}
        return config

    def names(self) -> str:
        lines = TEXTS[self.kind].format(
            vocab=self.vocab,
            width=self.width,
            last=self.n_layers - 1,
            queries=self.n_heads * self.head,
            keys=self.n_kv_heads * self.head,
            mlp=self.mlp,
            head=self.head,
        )
        if not self.sees:
            return lines
        positions = (self.side // 14) ** 2
        tower = SIGLIP_LAYERS.format(last=26).replace("[729, 1152]", f"[{positions}, 1152]")
        connector = CONNECTOR[self.sees].format(width=self.width)
        return (
            put_under("language_model.", lines)
            + put_under("vision_tower.", tower)
            + put_under("multi_modal_projector.", connector)
        )


CASES = {
    "Gemma 2B": Case("gemma", 2048, 18, 8, 1, 16384, 256000, 2.51),
    "Gemma 2 2B": Case("gemma2", 2304, 26, 8, 4, 9216, 256000, 2.61),
    "Gemma 3 270M": Case("gemma3_text", 640, 18, 4, 1, 2048, 262144, 0.27),
    "Gemma 3 1B": Case("gemma3_text", 1152, 26, 4, 1, 6912, 262144, 1.0),
    "Gemma 3 4B": Case(
        "gemma3_text", 2560, 34, 8, 4, 10240, 262208, 4.3, sees="gemma3", side=896
    ),
    "Gemma 3 12B": Case(
        "gemma3_text", 3840, 48, 16, 8, 15360, 262208, 12.19, sees="gemma3", side=896
    ),
    "Gemma 3 27B": Case(
        "gemma3_text", 5376, 62, 32, 16, 21504, 262208, 27.43,
        head=128, sees="gemma3", side=896, others={"query_pre_attn_scalar": 168},
    ),
    "PaliGemma 3B": Case("gemma", 2048, 18, 8, 1, 16384, 257216, 2.92, sees="paligemma", side=224),
    "PaliGemma 2 3B": Case(
        "gemma2", 2304, 26, 8, 4, 9216, 257216, 3.03, sees="paligemma", side=448
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_published_name_has_its_place(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(case.config()))
    form = format_of(tmp_path)
    cfg = form.config(tmp_path, None)
    weights = Weights([Listed(case.names())], form.table(cfg), form.ignored, form.rename)
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg)
        config = AutoConfig.from_pretrained(tmp_path)
        kind = AutoModelForImageTextToText if case.sees else AutoModelForCausalLM
        theirs = kind.from_config(config)
    check(model, dict(all_shapes(weights.files)), weights, name)
    assert cfg.tie_word_embeddings
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == case.n_parameters
    assert cfg.mm_tokens_per_image == {"": None, "gemma3": 256}.get(
        case.sees, (case.side // 14) ** 2
    )
    found = {
        form.rename(key): tuple(tensor.shape)
        for key, tensor in theirs.state_dict().items()
        if not key.endswith(("position_ids", "lm_head.weight"))
    }
    assert found == {form.rename(key): shape for key, shape in expand(case.names()).items()}
