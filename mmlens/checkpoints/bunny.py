r"""Bunny with Phi-2: `BunnyPhiForCausalLM` (BAAI/Bunny-v1_0-3B).

Decoder: Phi, with transformers' names, but without a bias in the output layer. Tower: SigLIP so400m
384, in the checkpoint (`model.vision_tower.vision_tower.vision_model.*`; the published one has left
out the last layer and the pooling) or in its own. Projector: `model.mm_projector`.

Features: the output of SigLIP's last layer but one, unnormalised, all 27 x 27 = 729 patches.

Prompt: as LLaVA's, without BOS. Pictures: padded to a square in the mean colour
(`image_aspect_ratio: pad`), then resized to 384 x 384.

Source: Bunny, `model/language_model/bunny_phi.py`, `model/multimodal_encoder/siglip/
siglip_encoder.py`, `conversation.py` (`conv_bunny`), `util/mm_utils.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmlens.checkpoints import llava_original
from mmlens.checkpoints.llava_code import multimodal_config, named_tower, read_config, tower_part
from mmlens.checkpoints.towers import Tower
from mmlens.config import MultimodalConfig

IGNORED = llava_original.IGNORED
vision_tower, rename, table = named_tower, llava_original.rename, llava_original.table

# Bunny's code says it, not its config.json.
FEATURES = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}


def recognises(config: dict[str, Any]) -> bool:
    """Whether this is a Bunny with a Phi decoder."""
    architectures = config.get("architectures") or []
    return "BunnyPhiForCausalLM" in architectures or config.get("model_type") == "bunny-phi"


def config(folder: Path, tower: Tower | None = None) -> MultimodalConfig:
    """The configuration in our terms.

    Raises:
        CheckpointError: a tower, projector or treatment of pictures that is not supported.
    """
    bunny = read_config(folder)
    return multimodal_config(
        folder,
        bunny,
        decoder="phi",
        vision=tower_part(FEATURES, tower or named_tower(folder, None)),
        projector=bunny.get("mm_projector_type", "mlp2x_gelu"),
        unembed_bias=False,
        original_architecture="BunnyPhiForCausalLM",
    )
