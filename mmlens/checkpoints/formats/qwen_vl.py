"""What the formats of Qwen2-VL, Qwen2.5-VL and Qwen3-VL share.

Decoder: Qwen2 or Qwen3 with M-RoPE (`checkpoints.decoders.qwen_vl`). Tower and patch merger:
`checkpoints.towers.qwen_vl`. Images: one view each, of as many squares of patches as its size asks
for (`mmlens.inputs.layouts.any_grid`). Videos are not taken.

Prompt: the checkpoint's own chat template. Names: as transformers writes them; those of the first
releases have `visual.` and the decoder's `model.` at the top.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmlens.checkpoints.decoders import decoder_fields_in, inner_names
from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.names import Names, under
from mmlens.checkpoints.towers.qwen_vl import merger_config, tower_config
from mmlens.config import MultimodalConfig

IMAGE = "<|image_pad|>"
IGNORED = (
    r".*\.rotary_(pos_)?emb\.inv_freq",
    r"lm_head\.weight",  # a copy of tied embeddings
)


def config(folder: Path, architecture: str) -> MultimodalConfig:
    """Return the configuration in our terms.

    Raises:
        CheckpointError: sizes or sections that do not fit together, or more deepstack layers than
            the decoder has layers.
    """
    hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    deepstack = list(getattr(hf.vision_config, "deepstack_visual_indexes", ()))
    if len(deepstack) > hf.text_config.num_hidden_layers:
        raise CheckpointError(
            f"deepstack_visual_indexes are {deepstack}, {len(deepstack)} layers of the tower, but "
            f"the decoder has {hf.text_config.num_hidden_layers} (num_hidden_layers): each is "
            "added in a layer of its own"
        )
    vision = tower_config(hf.vision_config)
    return MultimodalConfig(
        **decoder_fields_in(folder, hf.text_config, hf),
        image_token_id=hf.image_token_id,
        image_placeholder=IMAGE,
        image_layout="any_grid",
        vision=vision,
        projector=merger_config(vision, hf.vision_config, hf.text_config.hidden_size),
        original_architecture=architecture,
    )


def rename(name: str) -> str:
    """Bring the names of the first releases to those that transformers writes now."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)


def qwen_format(
    name: str,
    model_type: str,
    architecture: str,
    tower: Callable[[MultimodalConfig], Names],
) -> Format:
    """Return one of the three formats.

    Args:
        name: what messages call it.
        model_type: transformers'.
        architecture: the class that has written it.
        tower: gives the names of tower and merger, without what stands before them.
    """

    def recognises(config: Mapping[str, Any]) -> bool:
        """Whether config.json is of this class."""
        return config.get("model_type") == model_type and "vision_config" in config

    def names(cfg: MultimodalConfig) -> Names:
        """Return the name table."""
        decoder = inner_names(cfg, "model.language_model.", "lm_head")
        return decoder | under("model.visual.", tower(cfg))

    return Format(
        name,
        recognises,
        lambda folder, tower: config(folder, architecture),
        names,
        ignored=IGNORED,
        rename=rename,
    )
