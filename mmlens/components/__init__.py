"""The hooked modules that models are built from. They know nothing of analyses."""

from mmlens.components.attention import Attention
from mmlens.components.block import TransformerBlock
from mmlens.components.embedding import Embed, Unembed
from mmlens.components.key_value_cache import KeyValueCache
from mmlens.components.mlp import MLP
from mmlens.components.norm import LayerNorm, RMSNorm, make_norm
from mmlens.components.projector import Projector
from mmlens.components.rotary import Rotary
from mmlens.components.shared_past import Packing, SharedPast
from mmlens.components.vision import HookedVisionTransformer

__all__ = [
    "MLP",
    "Attention",
    "Embed",
    "HookedVisionTransformer",
    "KeyValueCache",
    "LayerNorm",
    "Packing",
    "Projector",
    "RMSNorm",
    "Rotary",
    "SharedPast",
    "TransformerBlock",
    "Unembed",
    "make_norm",
]
