r"""Bunny with Phi-2: `BunnyPhiForCausalLM` (BAAI/Bunny-v1_0-3B).

Decoder: Phi, with transformers' names, but without a bias in the output layer. Tower: SigLIP so400m
384, in the checkpoint (`model.vision_tower.vision_tower.vision_model.*`; the published one has left
out the last layer and the pooling) or in its own. Projector: `model.mm_projector`.

Features: the output of SigLIP's last layer but one, unnormalised, all 27 x 27 = 729 patches.

Prompt: as LLaVA's, without BOS. Images: padded to a square in the mean colour
(`image_aspect_ratio: pad`), then resized to 384 x 384.

Source: Bunny, `model/language_model/bunny_phi.py`, `model/multimodal_encoder/siglip/
siglip_encoder.py`, `conversation.py` (`conv_bunny`), `util/mm_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmlens.checkpoints.decoders import phi
from mmlens.checkpoints.format import Format, written_by
from mmlens.checkpoints.formats import llava_original
from mmlens.checkpoints.formats.llava_code import llava_config, llava_names, named_tower


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with what Bunny's code says, and not its config.json."""
    features = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    return {"mm_projector_type": "mlp2x_gelu", **config, **features}


FORMAT = Format(
    "Bunny",
    recognises=written_by("BunnyPhiForCausalLM", "bunny-phi"),
    config=partial(
        llava_config,
        architecture="BunnyPhiForCausalLM",
        decoder="phi",
        fields=fields,
        unembed_bias=False,
    ),
    names=llava_names(phi.NAMES, tower="model.vision_tower.vision_tower.vision_model."),
    ignored=llava_original.IGNORED,
    tower=named_tower,
)
