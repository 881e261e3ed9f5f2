"""What a model is made of: sizes and choices, in TransformerLens's names.

`MultimodalConfig` has the decoder's fields at the top level, `vision` and `projector` below it;
a language model alone has neither. Decoder and vision tower share `TransformerConfig`, since both
are built from the same components.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch


@dataclass(kw_only=True)
class TransformerConfig:
    """A stack of transformer blocks, whichever way it is used."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    act_fn: str
    normalization_type: Literal["RMS", "LN"]
    eps: float
    gated_mlp: bool = False
    n_key_value_heads: int | None = None
    """Heads of keys and values under grouped-query attention; None means `n_heads`."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attn_only: bool = False
    """Always False: TransformerLens's cache asks for it."""

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is no multiple of n_key_value_heads={self.n_kv_heads}"
            )

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values, with or without grouped-query attention."""
        return self.n_key_value_heads or self.n_heads

    @property
    def attn_scale(self) -> float:
        """What attention scores are divided by: the square root of `d_head`."""
        return self.d_head**0.5


@dataclass(kw_only=True)
class VisionConfig(TransformerConfig):
    """A CLIP-style vision tower, up to the layers whose features the projector takes.

    Blocks behind the last feature layer are not built: nothing would depend on them.
    """

    image_size: tuple[int, int]
    """Height and width in pixels."""
    patch_size: int
    feature_layers: tuple[int, ...]
    """Residual streams handed to the projector, concatenated: 0 is the input of block 0, l the
    output of block l - 1."""
    select: Literal["default", "full"] = "default"
    """`default` drops the class token, `full` keeps it in front of the patches."""
    n_channels: int = 3
    patch_bias: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of one picture: rows, columns."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches of one picture."""
        rows, columns = self.grid
        return rows * columns

    @property
    def n_visual_tokens(self) -> int:
        """Visual tokens of one picture, as the language model gets them."""
        return self.n_patches + (self.select == "full")


@dataclass(kw_only=True)
class ProjectorConfig:
    """The two-layer projector from visual features to the language model's residual stream."""

    d_in: int
    d_hidden: int
    d_out: int
    act_fn: str = "gelu"
    bias: bool = True


@dataclass(kw_only=True)
class MultimodalConfig(TransformerConfig):
    """A decoder and, unless it is a language model alone, what it sees with."""

    d_vocab: int
    n_ctx: int
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    """Hugging Face's own description of the rotary embedding: `rope_theta`, `rope_type`, ..."""
    tie_word_embeddings: bool = False
    image_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    model_name: str = ""
    original_architecture: str = ""
    default_template: str | None = None
    """What `template="auto"` means; None leaves the choice to the tokenizer's chat template."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the model is, and below in which dtype: kept by the model itself."""
    dtype: torch.dtype = torch.float32
    positional_embedding_type: str = "rotary"
    final_rms: bool = False
    """Always False: TransformerLens's cache asks for it, for models that mix kinds of norm."""

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.d_head * self.rope_parameters.get("partial_rotary_factor", 1.0))
