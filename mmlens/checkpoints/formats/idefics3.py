r"""Idefics3 and SmolVLM: `Idefics3ForConditionalGeneration` (HuggingFaceM4/Idefics3-8B-Llama3,
HuggingFaceTB/SmolVLM-Instruct) and `SmolVLMForConditionalGeneration` (HuggingFaceTB/SmolVLM2-*).

Decoder: Llama. Tower: SigLIP with the nearest of its learnt positions for an image of any size, and
with its last norm. Connector: squares of features put together, and one linear layer without bias.

Prompt: the checkpoint's own chat template; an image is written out in tiles, with text between them
(`mmlens.inputs.layouts.row_col`). Images: the checkpoint's own image processor. The processor of
SmolVLM in transformers is not made: it needs the package num2words, for videos, which mmlens does
not take.

Names: as transformers writes them. Source: transformers, `models/idefics3` and `models/smolvlm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.decoders import (
    decoder_fields_in,
    inner_names,
    visual_scale,
    without_its_head,
)
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.hf_configs import tower_fields
from mmlens.checkpoints.names import TOWER, under
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig

CLASSES = {
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
IGNORED = (
    r".*\.position_ids",
    r".*\.rotary_emb\.inv_freq",
    r"lm_head\.weight",  # a copy of tied embeddings
)


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is one of the two."""
    return config.get("model_type") in CLASSES and "vision_config" in config


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms.

    Raises:
        CheckpointError: a decoder that is not among the supported ones, or patches that cannot be
            put together.
    """
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, vision, factor = hf.text_config, hf.vision_config, hf.scale_factor
    side = vision.image_size // vision.patch_size
    if factor < 1 or side % factor:
        raise CheckpointError(
            f"scale_factor is {factor}, but a tile has {side} x {side} patches, which must be cut "
            "into squares of that side"
        )
    fields = without_its_head(decoder_fields_in(folder, text, hf))
    return MultimodalConfig(
        **fields,
        image_token_id=hf.image_token_id,
        image_layout="row_col",
        vision=VisionConfig(
            n_layers=vision.num_hidden_layers,
            **tower_fields(vision),
            patch_bias=True,
            class_token=False,
            pre_norm=False,
            final_norm=True,
            positions="nearest",
            feature_layers=(vision.num_hidden_layers,),
            select="full",
        ),
        projector=ProjectorConfig(
            d_in=vision.hidden_size,
            d_hidden=text.hidden_size,
            d_out=text.hidden_size,
            n_layers=1,
            bias=False,
            pixel_shuffle=factor,
            out_scale=visual_scale(fields),
        ),
        original_architecture=CLASSES[hf.model_type],
    )


def names(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the name table: the decoder's, the tower's and the connector's."""
    decoder = inner_names(cfg, "model.text_model.", "lm_head")
    tower = TOWER | {"post_layernorm": "vision.ln_final"}
    connector = {"model.connector.modality_projection.proj": "projector.linear_1"}
    return decoder | under("model.vision_model.", tower) | connector


FORMAT = Format("Idefics3 and SmolVLM", recognises, config, names, ignored=IGNORED)
