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
    parallel_attn_mlp: bool = False
    """Attention and MLP read the same normalised stream, side by side (Phi)."""
    layer_scale: bool = False
    """What attention and MLP add is multiplied by a learnt factor per dimension (a few towers of
    open_clip's; Touvron et al. 2021)."""
    window_size: int | None = None
    """How many positions a query of a "local" layer looks back at, its own included."""
    attn_types: tuple[Literal["global", "local"], ...] | None = None
    """Per layer; None means every layer is "global"."""
    attn_only: bool = False
    """Always False: TransformerLens's cache asks for it."""

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is no multiple of n_key_value_heads={self.n_kv_heads}"
            )
        types = self.attn_types or ()
        if types and len(types) != self.n_layers:
            raise ValueError(f"attn_types has {len(types)} entries for {self.n_layers} layers")
        if "local" in types and not self.window_size:
            raise ValueError(f"local attention needs a window_size, not {self.window_size}")

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values, with or without grouped-query attention."""
        return self.n_key_value_heads or self.n_heads

    @property
    def attn_scale(self) -> float:
        """What attention scores are divided by: the square root of `d_head`."""
        return self.d_head**0.5

    def window(self, layer: int) -> int | None:
        """The window of a layer's attention; None where it sees everything before it."""
        return self.window_size if self.attn_types and self.attn_types[layer] == "local" else None


@dataclass(kw_only=True)
class VisionConfig(TransformerConfig):
    """A CLIP or SigLIP vision tower, up to the layers whose features the projector takes.

    Blocks behind the last feature layer are not built: nothing would depend on them.
    """

    image_size: tuple[int, int]
    """Height and width in pixels."""
    patch_size: int
    feature_layers: tuple[int, ...]
    """Residual streams handed to the projector, concatenated: 0 is the input of block 0, l the
    output of block l - 1."""
    select: Literal["default", "full"] = "default"
    """`full` hands over every position; `default` drops the first one: CLIP's class token, or the
    first patch of a tower without one (TinyLLaVA does so)."""
    class_token: bool = True
    """CLIP has one, at position 0; SigLIP has none."""
    pre_norm: bool = True
    """CLIP normalises what enters its first block; SigLIP does not."""
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
        return self.n_patches + self.class_token - (self.select == "default")


@dataclass(kw_only=True)
class ProjectorConfig:
    """The projector from visual features to the language model's residual stream."""

    d_in: int
    d_hidden: int
    d_out: int
    n_layers: int = 2
    """Linear layers, with the activation in between; 1 is a single linear map."""
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
    unembed_bias: bool = False
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
    default_prepend_bos: bool = True
    """Whether prompts begin with BOS unless the caller says otherwise."""
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
