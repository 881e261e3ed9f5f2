"""The hooked modules that models are built from. They know nothing of analyses."""

from mmlens.model.components.attention import Attention
from mmlens.model.components.block import TransformerBlock
from mmlens.model.components.embedding import Embed, Unembed
from mmlens.model.components.key_value_cache import KeyValueCache
from mmlens.model.components.mlp import MLP
from mmlens.model.components.norm import LayerNorm, RMSNorm, make_norm
from mmlens.model.components.projector import Projector
from mmlens.model.components.rotary import Rotary

__all__ = [
    "MLP",
    "Attention",
    "Embed",
    "KeyValueCache",
    "LayerNorm",
    "Projector",
    "RMSNorm",
    "Rotary",
    "TransformerBlock",
    "Unembed",
    "make_norm",
]
