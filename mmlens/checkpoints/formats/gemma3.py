r"""Gemma 3 that sees: `Gemma3ForConditionalGeneration` (google/gemma-3-4b-it, -12b-it, -27b-it).

Decoder: Gemma 3, in which the visual tokens of an image attend to each other in both directions.
Tower: SigLIP with its last norm. Connector: the mean of squares of features, a norm, and one linear
layer without bias, whose weights the checkpoint has transposed.

Prompt: the checkpoint's own chat template, which writes `<start_of_image>` for an image. Images:
the checkpoint's own image processor, without crops (pan and scan), which a ready batch may have.

Names: transformers has written this format in the layouts of LLaVA's (`hf_llava.py`). Source:
transformers, `modeling_gemma3.py` and `processing_gemma3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.decoders import decoder_fields_in, inner_names
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats import hf_llava
from mmlens.checkpoints.hf_configs import vision_config
from mmlens.checkpoints.names import TOWER, under
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import MultimodalConfig, ProjectorConfig

NORMED_TOWER = TOWER | {"post_layernorm": "vision.ln_final"}
BEGIN, END = "<start_of_image>", "<end_of_image>"
IGNORED = (*hf_llava.IGNORED, r"vision_tower\.head\..*")


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a `Gemma3ForConditionalGeneration`."""
    return config.get("model_type") == "gemma3" and "vision_config" in config


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms.

    Raises:
        CheckpointError: another tower or decoder, patches that cannot be divided, or capped logits,
            which transformers does not compute here.
    """
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, vision = hf.text_config, hf.vision_config
    side, tokens = vision.image_size // vision.patch_size, isqrt(hf.mm_tokens_per_image)
    if not tokens or tokens**2 != hf.mm_tokens_per_image or side % tokens:
        raise CheckpointError(
            f"mm_tokens_per_image is {hf.mm_tokens_per_image}, but an image has {side} x {side} "
            "patches, which must be cut into as many squares"
        )
    if text.final_logit_softcapping is not None:
        raise CheckpointError(
            f"final_logit_softcapping is {text.final_logit_softcapping}; transformers' Gemma 3 "
            "with images caps no logits"
        )
    return MultimodalConfig(
        **decoder_fields_in(folder, text, hf),
        attention_blocks="image",
        image_token_id=hf.image_token_id,
        image_placeholder=BEGIN,
        image_text=f"\n\n{BEGIN}<image>{END}\n\n",
        vision=normed_tower(vision),
        projector=ProjectorConfig(
            d_in=vision.hidden_size,
            d_hidden=text.hidden_size,
            d_out=text.hidden_size,
            n_layers=1,
            bias=False,
            average_pool=side // tokens,
            normalization_type="RMS",
            norm_offset=1.0,
            norm_merged=True,
            eps=vision.layer_norm_eps,
        ),
        original_architecture="Gemma3ForConditionalGeneration",
    )


def normed_tower(vision: Any) -> Any:
    """Return the configuration of a SigLIP whose last norm's output is taken."""
    taken = vision_config(vision, -1, "full")
    taken.final_norm = True
    return taken


def names(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the name table: the decoder's, the tower's and the connector's."""
    connector = {
        "mm_soft_emb_norm": "projector.ln",
        "mm_input_projection_weight": "projector.linear_1.weight[T]",
    }
    return (
        inner_names(cfg)
        | under("vision_tower.", NORMED_TOWER)
        | under("multi_modal_projector.", connector)
    )


FORMAT = Format("Gemma 3", recognises, config, names, ignored=IGNORED, rename=hf_llava.rename)
