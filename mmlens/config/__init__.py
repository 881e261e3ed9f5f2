"""What a model is made of: sizes and choices, in TransformerLens's names.

`MultimodalConfig` has the decoder's fields at the top level, `vision` and `projector` below it;
a language model alone has neither. Decoder and vision tower share `TransformerConfig`, since both
are built from the same components.
"""

from mmlens.config.blocks import TransformerConfig
from mmlens.config.images import AnyResConfig, ProjectorConfig, VisionConfig
from mmlens.config.multimodal import MultimodalConfig

__all__ = [
    "AnyResConfig",
    "MultimodalConfig",
    "ProjectorConfig",
    "TransformerConfig",
    "VisionConfig",
]
