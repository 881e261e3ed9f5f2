"""InternVL3 and InternVL3.5: `InternVLForConditionalGeneration` (OpenGVLab/InternVL3-8B-hf).

Decoder: Qwen2 or Qwen3. Tower: InternViT, like CLIP's with learnt factors of what attention and MLP
add ("layer scale"), and with norms of queries and keys in the large one. Connector: squares of
features put together, their norm, and two linear layers.

Prompt: the checkpoint's own chat template. Images: the checkpoint's own image processor, in tiles
(`mmlens.inputs.layouts.thumbnail`). Videos are not taken.

Names: as transformers writes them, in the layouts of `hf_llava.py`. OpenGVLab's first checkpoints
(`InternVLChatModel`, without "-hf" in their names) are code of their own, and are refused. Source:
transformers, `models/internvl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mmlens.checkpoints.decoders import (
    decoder_fields_in,
    inner_names,
    visual_scale,
    without_its_head,
)
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats import hf_llava
from mmlens.checkpoints.hf_configs import feature_layers, known_activation
from mmlens.checkpoints.json_files import read_json
from mmlens.checkpoints.names import HF_PROJECTOR, under
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig

REMOTE_CODE = "internvl_chat"
QK_EPS = 1e-6
"""Of the norms of queries and keys, which no configuration says."""
PROJECTOR_EPS = 1e-5
"""torch's default, as transformers leaves it."""
IGNORED = (
    r"vision_tower\.encoder\.layer\.\d+\..*",  # after the last feature layer
    r"vision_tower\.(layernorm\.(weight|bias)|embeddings\.mask_token)",
    r".*\.rotary_emb\.inv_freq",
    r"language_model\.lm_head\.weight",  # a copy of tied embeddings
)

TOWER = {
    "embeddings.cls_token": "vision.class_embed[None, None]",
    "embeddings.position_embeddings": "vision.W_pos[None]",
    "embeddings.patch_embeddings.projection": "vision.patch_embed",
    "encoder.layer.{}.layernorm_before": "vision.blocks.{}.ln1",
    "encoder.layer.{}.attention.q_proj": "vision.blocks.{}.attn.qkv[q]",
    "encoder.layer.{}.attention.k_proj": "vision.blocks.{}.attn.qkv[k]",
    "encoder.layer.{}.attention.v_proj": "vision.blocks.{}.attn.qkv[v]",
    "encoder.layer.{}.attention.q_norm": "vision.blocks.{}.attn.q_norm",
    "encoder.layer.{}.attention.k_norm": "vision.blocks.{}.attn.k_norm",
    "encoder.layer.{}.attention.projection_layer": "vision.blocks.{}.attn.o",
    "encoder.layer.{}.lambda_1": "vision.blocks.{}.ls_1",
    "encoder.layer.{}.layernorm_after": "vision.blocks.{}.ln2",
    "encoder.layer.{}.mlp.fc1": "vision.blocks.{}.mlp.up",
    "encoder.layer.{}.mlp.fc2": "vision.blocks.{}.mlp.down",
    "encoder.layer.{}.lambda_2": "vision.blocks.{}.ls_2",
    "layernorm": "vision.ln_final",
}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is an InternVL, of transformers' or of OpenGVLab's own code."""
    kind = config.get("model_type")
    return kind == REMOTE_CODE or (kind == "internvl" and "vision_config" in config)


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms.

    Raises:
        CheckpointError: OpenGVLab's own code, or a decoder, a tower or a connector that is not
            built here.
    """
    if read_json(folder / "config.json", folder).get("model_type") == REMOTE_CODE:
        raise CheckpointError(
            "this InternVL (InternVLChatModel) is code of its own, which mmlens does not run; take "
            "the same model in transformers' format, whose name ends in -hf, such as "
            "OpenGVLab/InternVL3-8B-hf"
        )
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, vision = hf.text_config, tower_config(hf)
    factor = round(1 / hf.downsample_ratio) if hf.downsample_ratio else 0
    if factor < 1 or hf.downsample_ratio != 1 / factor or vision.grid[0] % factor:
        raise CheckpointError(
            f"downsample_ratio is {hf.downsample_ratio}, but a tile has {vision.grid[0]} x "
            f"{vision.grid[1]} patches, which must be cut into squares of 1 / downsample_ratio"
        )
    fields = without_its_head(decoder_fields_in(folder, text, hf))
    return MultimodalConfig(
        **fields,
        image_token_id=hf.image_token_id,
        image_layout="thumbnail",
        image_placeholder="<IMG_CONTEXT>",
        image_text="<img><image></img>",
        vision=vision,
        projector=ProjectorConfig(
            d_in=vision.d_model,
            d_hidden=text.hidden_size,
            d_out=text.hidden_size,
            act_fn=known_activation(hf.projector_hidden_act, "projector_hidden_act"),
            pixel_shuffle=factor,
            out_scale=visual_scale(fields),
            normalization_type="LN",
            eps=PROJECTOR_EPS,
            norm_merged=True,
        ),
        original_architecture="InternVLForConditionalGeneration",
    )


def tower_config(hf: PreTrainedConfig) -> VisionConfig:
    """Return the tower's configuration in our terms.

    Args:
        hf: of the whole model.

    Raises:
        CheckpointError: a tower that is not built here.
    """
    vision, layer = hf.vision_config, hf.vision_feature_layer
    kinds = {"layer_norm": "LN", "rms_norm": "RMS"}
    patch, image = tuple(vision.patch_size), tuple(vision.image_size)
    last_norm = layer == -1 and not vision.use_mean_pooling
    wrong = {
        f"model_type {vision.model_type!r}": vision.model_type != "internvl_vision",
        f"norm_type {vision.norm_type!r}": vision.norm_type not in kinds,
        f"patches of {patch} in tiles of {image} pixels": len({*patch}) > 1 or len({*image}) > 1,
        f"vision_feature_layer {layer!r}, which is no number": not isinstance(layer, int),
        f"vision_feature_select_strategy {hf.vision_feature_select_strategy!r}, which leaves the "
        "class token among the patches": hf.vision_feature_select_strategy != "default",
        "use_mean_pooling false with norm_type 'rms_norm'": (
            last_norm and vision.norm_type == "rms_norm"
        ),
        f"use_qk_norm with layer_norm_eps {vision.layer_norm_eps} (transformers' norms of queries "
        f"have {QK_EPS})": vision.use_qk_norm and vision.layer_norm_eps != QK_EPS,
    }
    if found := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise CheckpointError(f"a tower that is not built here: {'; '.join(found)}")
    layers = feature_layers(vision.num_hidden_layers, layer, "default")
    return VisionConfig(
        n_layers=max(layers),
        d_model=vision.hidden_size,
        n_heads=vision.num_attention_heads,
        d_head=vision.hidden_size // vision.num_attention_heads,
        d_mlp=vision.intermediate_size,
        act_fn=known_activation(vision.hidden_act, "vision_config.hidden_act"),
        normalization_type="RMS" if vision.norm_type == "rms_norm" else "LN",
        eps=vision.layer_norm_eps,
        qkv_bias=vision.attention_bias,
        o_bias=True,
        mlp_bias=True,
        qk_norm=vision.use_qk_norm,
        joint_qk_norm=vision.use_qk_norm,
        layer_scale=True,
        image_size=(image[0], image[0]),
        patch_size=patch[0],
        n_channels=vision.num_channels,
        patch_bias=True,
        pre_norm=False,
        final_norm=last_norm,
        positions="bicubic" if vision.use_absolute_position_embeddings else "none",
        feature_layers=layers,
        select="default",
    )


def names(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the name table: the decoder's, the tower's and the connector's."""
    norm = {"multi_modal_projector.layer_norm": "projector.ln"}
    return inner_names(cfg) | under("vision_tower.", TOWER) | HF_PROJECTOR | norm


FORMAT = Format("InternVL", recognises, config, names, ignored=IGNORED, rename=hf_llava.rename)
