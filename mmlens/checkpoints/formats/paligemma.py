r"""PaliGemma 1 and 2: `PaliGemmaForConditionalGeneration` (google/paligemma-3b-mix-224,
google/paligemma2-3b-mix-448 and their like).

Decoder: Gemma or Gemma 2, in which the prompt with its images attends to itself in both directions,
and an answer to what is before it. Tower: SigLIP with its last norm. Connector: one linear layer.

Prompt: the images, BOS, the text and a line break, as the processor writes it; there is no chat
template. Rotary positions begin at 1. Images: the checkpoint's own image processor.

Names: transformers has written this format in the layouts of LLaVA's (`hf_llava.py`). Source:
transformers, `modeling_paligemma.py` and `processing_paligemma.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.decoders import decoder_fields_in, inner_names
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats import hf_llava
from mmlens.checkpoints.formats.gemma3 import IGNORED, NORMED_TOWER, normed_tower
from mmlens.checkpoints.names import under
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import MultimodalConfig, ProjectorConfig


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a `PaliGemmaForConditionalGeneration`."""
    return config.get("model_type") == "paligemma" and "vision_config" in config


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms.

    Raises:
        CheckpointError: another tower or decoder, or features of another width than the stream's.
    """
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, vision = copy.copy(hf.text_config), hf.vision_config
    text.use_bidirectional_attention = None  # what is so here is the prompt alone
    if vision.projection_dim != text.hidden_size:
        raise CheckpointError(
            f"projection_dim is {vision.projection_dim}, but the decoder's hidden_size is "
            f"{text.hidden_size}; visual tokens must be as wide"
        )
    return MultimodalConfig(
        **decoder_fields_in(folder, text, hf),
        attention_blocks="prompt",
        first_rope_position=1,
        image_token_id=hf.image_token_id,
        default_template="<image><bos>{question}\n",
        default_prepend_bos=False,
        vision=normed_tower(vision),
        projector=ProjectorConfig(
            d_in=vision.hidden_size,
            d_hidden=vision.projection_dim,
            d_out=vision.projection_dim,
            n_layers=1,
        ),
        original_architecture="PaliGemmaForConditionalGeneration",
    )


def names(cfg: MultimodalConfig) -> dict[str, str]:
    """Return the name table: the decoder's, the tower's and the connector's."""
    return (
        inner_names(cfg)
        | under("vision_tower.", NORMED_TOWER)
        | {"multi_modal_projector.linear": "projector.linear_1"}
    )


FORMAT = Format("PaliGemma", recognises, config, names, ignored=IGNORED, rename=hf_llava.rename)
