"""LLaVA-NeXT: `LlavaNextForConditionalGeneration` (llava-hf/llava-v1.6-mistral-7b-hf and its like).

Decoder, tower, projector, prompt and names are those of `hf_llava.py`. An image is seen whole and
in tiles of the tower's size, with a learnt embedding (`image_newline`) at the end of every line;
see `mmlens.inputs.layouts.anyres`. The tower may be SigLIP, and several of its layers be taken, as
in Granite Vision.

Source: transformers, `models/llava_next/modeling_llava_next.py`, `processing_llava_next.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlens.checkpoints.format import Format
from mmlens.checkpoints.formats import hf_llava
from mmlens.checkpoints.hf_configs import anyres_config
from mmlens.checkpoints.towers.named_towers import Tower
from mmlens.config import AnyResConfig, MultimodalConfig, VisionConfig


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether this is a `LlavaNextForConditionalGeneration`."""
    return config.get("model_type") == "llava_next" and "vision_config" in config


def tiles(hf: Any, vision: VisionConfig) -> AnyResConfig:
    """Return how an image is cut into tiles."""
    return anyres_config(hf.image_grid_pinpoints, vision)


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """Return the configuration in our terms; see `hf_llava.model_config`."""
    return hf_llava.model_config(folder, "LlavaNextForConditionalGeneration", tiles)


FORMAT = Format(
    "LLaVA-NeXT",
    recognises,
    config,
    hf_llava.names,
    ignored=hf_llava.IGNORED,
    rename=hf_llava.rename,
)
