"""LLaVA-OneVision: `LlavaOnevisionForConditionalGeneration`.

For example llava-hf/llava-onevision-qwen2-0.5b-ov-hf and -7b-ov-hf.

Decoder (Qwen2), tower (SigLIP), projector, prompt and names are those of `hf_llava.py`, tiles those
of LLaVA-NeXT, but for two things: the visual tokens of the tiles are shrunk to about as many as
`vision_aspect_ratio` says ("anyres_max_9"), and of a prompt with several images each is padded to a
square and seen in one tile. Videos are not taken.

Source: transformers, `models/llava_onevision/modeling_llava_onevision.py`,
`processing_llava_onevision.py`, `image_processing_llava_onevision.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlens.checkpoints.errors import CheckpointError
from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats import hf_llava
from mmlens.checkpoints.hf_configs import anyres_config
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import AnyResConfig, MultimodalConfig, VisionConfig


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a `LlavaOnevisionForConditionalGeneration`."""
    return config.get("model_type") == "llava_onevision" and "vision_config" in config


def tiles(hf: Any, vision: VisionConfig) -> AnyResConfig:
    """Return how an image is cut into tiles.

    Raises:
        CheckpointError: another `vision_aspect_ratio` than "anyres_max_" and a number.
    """
    most = re.fullmatch(r"anyres_max_(\d{1,4})", str(hf.vision_aspect_ratio))
    if most is None:
        raise CheckpointError(
            f"vision_aspect_ratio is {hf.vision_aspect_ratio!r}; it must be 'anyres_max_9', or "
            "another number of tiles"
        )
    return anyres_config(
        hf.image_grid_pinpoints, vision, max_tiles=int(most[1]), one_tile_of_several=True
    )


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms; see `hf_llava.model_config`."""
    return hf_llava.model_config(folder, "LlavaOnevisionForConditionalGeneration", tiles)


FORMAT = Format(
    "LLaVA-OneVision",
    recognises,
    config,
    hf_llava.names,
    ignored=hf_llava.IGNORED,
    rename=hf_llava.rename,
)
