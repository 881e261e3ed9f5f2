"""What a model is made of: sizes and choices, in TransformerLens's names.

`MultimodalConfig` has the decoder's fields at the top level, `vision` and `projector` below it;
a language model alone has neither. Decoder and vision tower share `TransformerConfig`, since both
are built from the same components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from mmlens.utils.transformer_lens_names import SameForAll, refused


def check_sizes(config: Any, *names: str, least: int = 1) -> None:
    """Raise a ValueError where a field of a configuration is no whole number from `least` up."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}; it must be a whole number from {least} up")


def check_cap(name: str, value: Any) -> None:
    """Raise a ValueError where a softcap or a factor is neither None nor a positive number."""
    if value is not None and not (is_finite(value) and value > 0):
        raise ValueError(f"{name}={value!r}; it must be a finite number above 0, or None")


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(kw_only=True)
class TransformerConfig(SameForAll):
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
    qk_norm: bool = False
    """Queries and keys are normalised head by head, before they are rotated (Qwen3, Gemma 3; Henry
    et al. 2020)."""
    joint_qk_norm: bool = False
    """Where `qk_norm`: those of all heads are one vector, which an RMSNorm scales (InternVL)."""
    parallel_attn_mlp: bool = False
    """Attention and MLP read the same stream side by side, through one norm (Phi)."""
    parallel_ln2: bool = False
    """In parallel blocks the MLP reads through a norm of its own, `ln2` (GPT-NeoX)."""
    layer_scale: bool = False
    """What attention and MLP add is multiplied by a learnt factor per dimension (a few towers of
    open_clip's; Touvron et al. 2021)."""
    post_norms: bool = False
    """What attention and MLP give is normalised once more before it is added to the stream
    ("sandwich norms"; Gemma 2 and 3)."""
    residual_scale: float = 1.0
    """What is added to the stream is this many times what attention and MLP give (Granite)."""
    norm_offset: float = 0.0
    """What norms add to their weights: 1 where the checkpoint has weights around 0 (Gemma)."""
    window_size: int | None = None
    """How many positions a query of a "local" layer looks back at, its own included."""
    attn_types: tuple[Literal["global", "local"], ...] | None = None
    """Per layer; None means every layer is "global"."""
    attn_scale: float = 0.0
    """What attention scores are divided by; 0 stands for the square root of `d_head`."""
    scores_softcap: float | None = None
    """Attention scores s are capped to c tanh(s / c) before the mask (Gemma 2)."""
    use_attn_result: bool = False
    """Whether caches hold `attn.hook_result` without being asked by name; as those below."""
    use_attn_in: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp")
        check_sizes(self, "n_layers", least=0)  # of a tower whose patch embeddings are taken
        if self.normalization_type not in ("RMS", "LN"):
            raise ValueError(
                f"normalization_type is {self.normalization_type!r}; it can be 'RMS' or 'LN'"
            )
        if not is_finite(self.eps) or self.eps < 0:
            raise ValueError(f"eps={self.eps!r}; it must be a finite number, 0 or more")
        if not is_finite(self.attn_scale) or self.attn_scale < 0:
            raise ValueError(f"attn_scale={self.attn_scale!r}; it must be finite, 0 or more")
        self.attn_scale = self.attn_scale or self.d_head**0.5
        check_cap("scores_softcap", self.scores_softcap)
        check_cap("residual_scale", self.residual_scale)
        if (self.post_norms or self.norm_offset) and self.normalization_type != "RMS":
            raise ValueError("post_norms and norm_offset are of models with RMSNorms")
        if self.post_norms and self.parallel_attn_mlp:
            raise ValueError("blocks with post_norms are not parallel")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is no multiple of n_key_value_heads={self.n_kv_heads}"
            )
        types = self.attn_types or ()
        if types and len(types) != self.n_layers:
            raise ValueError(f"attn_types has {len(types)} entries for {self.n_layers} layers")
        if unknown := set(types) - {"global", "local"}:
            raise ValueError(f"attn_types has {unknown}; it can have 'global' and 'local'")
        if "local" in types and self.window_size is None:
            raise ValueError("local attention needs a window_size, not None")
        if self.window_size is not None:
            check_sizes(self, "window_size")

    @property
    def changes_outputs(self) -> bool:
        """Whether what attention and MLP give is not what is added to the residual stream."""
        return self.post_norms or self.residual_scale != 1.0

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values, with or without grouped-query attention."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def n_params(self) -> int:
        """How many weights the matrices of attention and MLPs have (as Kaplan et al. 2020 count).

        Keys and values are counted once for each query head, as in TransformerLens.
        """
        attention = 4 * self.d_model * self.d_head * self.n_heads
        return self.n_layers * (attention + self.d_model * self.d_mlp * (2 + self.gated_mlp))

    @property
    def uses_rms_norm(self) -> bool:
        """Whether norms are RMSNorms."""
        return self.normalization_type == "RMS"

    @property
    def use_local_attn(self) -> bool:
        """Whether some layers look back a few positions only."""
        return "local" in (self.attn_types or ())

    @property
    def use_qk_norm(self) -> bool:
        """The same as `qk_norm`, in TransformerLens's words."""
        return self.qk_norm

    @property
    def head_dim(self) -> int:
        """The same as `d_head`, in transformers' words."""
        return self.d_head

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names."""
        return dict(vars(self))

    def __getattr__(self, name: str) -> Any:
        raise refused("config", self, name)

    def kind(self, layer: int) -> Literal["global", "local"]:
        """The kind of a layer: "local" where its attention has a window."""
        return self.attn_types[layer] if self.attn_types else "global"

    def window(self, layer: int) -> int | None:
        """The window of a layer's attention; None where it sees everything before it."""
        return self.window_size if self.kind(layer) == "local" else None


@dataclass(kw_only=True)
class VisionConfig(TransformerConfig):
    """A vision tower, up to the layers whose features the projector takes.

    Blocks after the last feature layer are not built: nothing would depend on them. A layer is
    "local" where patches attend to those of their own window, of `window_size` x `window_size`
    patches (Qwen2.5-VL).
    """

    attention_dir: ClassVar[str] = "bidirectional"
    positional_embedding_type: ClassVar[str] = "standard"

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
    final_norm: bool = False
    """Whether what leaves the last block is normalised (Idefics3)."""
    positions: Literal["bicubic", "bilinear", "nearest", "none"] = "bicubic"
    """What an image of another grid than `grid` makes of the learnt positions: it interpolates them
    (CLIP and SigLIP: bicubic; Qwen3-VL: bilinear, from corner to corner), or has the nearest
    (Idefics3; Dehghani et al. 2023, "Patch n' Pack"). "none": nothing is learnt (Qwen2-VL)."""
    rotary_base: float | None = None
    """Base of the angles by which queries and keys are rotated, one half of each head by the row of
    its patch and the other by the column (Qwen2-VL; Wang et al. 2024, 2.1); None: no rotation."""
    packed: bool = False
    """Images of any grid: `pixel_values` are patches [patch, pixel] rather than tiles, and lie one
    after the other in one row, in which each image attends to itself. `image_size` then only says
    how many positions are learnt."""
    temporal_patch_size: int = 1
    """How many times a patch of `pixel_values` has the image: twice where a tower takes videos."""
    merge_size: int = 1
    """In packed `pixel_values` come squares of this many rows and columns after one another, which
    the connector makes one visual token each; the tower puts them row by row."""
    n_channels: int = 3
    patch_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "patch_size", "n_channels", "temporal_patch_size", "merge_size")
        if len(self.image_size) != 2 or not all(type(side) is int for side in self.image_size):
            raise ValueError(f"image_size={self.image_size!r}; it must be (height, width)")
        if min(self.image_size) < self.patch_size:
            raise ValueError(f"patches of {self.patch_size} pixels do not fit {self.image_size}")
        if self.select not in ("default", "full"):
            raise ValueError(f"select={self.select!r}; it can be 'default' or 'full'")
        if self.positions not in ("bicubic", "bilinear", "nearest", "none"):
            raise ValueError(
                f"positions={self.positions!r}; it can be 'bicubic', 'bilinear', 'nearest' or "
                "'none'"
            )
        if self.packed and (self.class_token or self.select == "default"):
            raise ValueError("a packed tower hands over every patch, and has no class token")
        if self.rotary_base is not None:
            if not is_finite(self.rotary_base) or self.rotary_base <= 0:
                raise ValueError(f"rotary_base={self.rotary_base!r}; it must be above 0")
            if self.d_head % 4:
                raise ValueError(
                    f"d_head={self.d_head}; rows and columns rotate pairs of dimensions each, so "
                    "it must be a multiple of 4"
                )
        if not self.feature_layers or not all(
            type(layer) is int and 0 <= layer <= self.n_layers for layer in self.feature_layers
        ):
            raise ValueError(
                f"feature_layers={self.feature_layers!r}; a tower of {self.n_layers} layers has "
                f"features 0 ... {self.n_layers}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of one image: rows, columns."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches of one image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def n_visual_tokens(self) -> int:
        """Features of one image or tile, as the projector gets them."""
        return self.n_patches + self.class_token - (self.select == "default")


MOST_TILES = 256
"""Of an image: far above every published model's, and little enough to fit into memory."""


@dataclass(frozen=True, kw_only=True)
class AnyResConfig:
    """Tiles of images of any resolution (LLaVA-NeXT, LLaVA-OneVision)."""

    resolutions: tuple[tuple[int, int], ...]
    """Heights and widths that an image may be scaled into ("grid pinpoints"), in pixels."""
    tile_size: int
    """Pixels of a tile's side: what the tower takes."""
    tile_grid: tuple[int, int]
    """Patches of a tile: rows, columns."""
    max_tiles: int | None = None
    """Visual tokens of the tiles are shrunk to about as many as this many tiles have."""
    one_tile_of_several: bool = False
    """Whether an image of a prompt with several is seen whole only."""
    rounded: bool = True
    """Whether the patches of a side are rounded to seven digits before they are cut off to a whole
    number: transformers does so, LLaVA's own code does not."""

    def __post_init__(self) -> None:
        check_sizes(self, "tile_size")
        if self.max_tiles is not None:
            check_sizes(self, "max_tiles")
        sizes = [side for pair in self.resolutions for side in pair]
        if not sizes or any(type(n) is not int or n < 1 or n % self.tile_size for n in sizes):
            raise ValueError(
                f"resolutions={self.resolutions!r}; they must be pairs (height, width) of whole "
                f"tiles of {self.tile_size} pixels"
            )
        most = max(height * width for height, width in self.resolutions) // self.tile_size**2
        if most > MOST_TILES:
            raise ValueError(f"resolutions of {most:,} tiles; an image may have {MOST_TILES}")


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
    pixel_shuffle: int = 1
    """Rows and columns of features that make one visual token (Idefics3, Qwen-VL)."""
    average_pool: int = 1
    """Rows and columns of features of which one visual token is the mean (Gemma 3)."""
    normalization_type: Literal["RMS", "LN"] | None = None
    """Of the features, before anything else (Qwen-VL); None where they are not normalised."""
    eps: float = 1e-6
    norm_offset: float = 0.0
    """What the norm adds to its weights, as in `TransformerConfig`."""
    norm_merged: bool = False
    """Whether features are normalised after they are put together, and not each for itself."""
    n_deepstack: int = 0
    """How many first blocks of the decoder get something of the image besides (Qwen3-VL; Meng et
    al. 2024, "DeepStack"). The tower's features are then 1 + `n_deepstack` of `d_in` dimensions
    each: for the visual tokens, and for block 0, 1, ... A connector of its own maps each."""
    out_scale: float = 1.0
    """Visual tokens are this many times what the last layer gives (decoders that scale whatever
    comes in: Granite)."""
    anyres: AnyResConfig | None = None
    """How the tiles of an image are put together; None where an image is one tile."""

    def __post_init__(self) -> None:
        sizes = ("d_in", "d_hidden", "d_out", "n_layers", "pixel_shuffle", "average_pool")
        check_sizes(self, *sizes)
        check_sizes(self, "n_deepstack", least=0)
        if self.normalization_type not in ("RMS", "LN", None):
            raise ValueError(
                f"normalization_type={self.normalization_type!r}; it can be 'RMS', 'LN' or None"
            )

    @property
    def merged(self) -> int:
        """Rows and columns of features that become one visual token."""
        return self.pixel_shuffle * self.average_pool


@dataclass(kw_only=True)
class MultimodalConfig(TransformerConfig):
    """A decoder and, unless it is a language model alone, what it sees with."""

    d_vocab: int
    n_ctx: int
    decoder_type: str = "llama"
    """transformers' `model_type`: by it `checkpoints.decoders` finds the names of a decoder."""
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    """Hugging Face's own description of the rotary embedding: `rope_theta`, `rope_type`, ..."""
    local_rope_parameters: dict[str, Any] | None = None
    """The same of "local" layers, where it is another one (Gemma 3)."""
    first_rope_position: int = 0
    """What rotary positions begin at (PaliGemma: 1)."""
    attention_blocks: Literal["image", "prompt"] | None = None
    """Which positions attend to each other in both directions: those of each image (Gemma 3), or
    the whole prompt (PaliGemma); see `mmlens.model.components.attention_rule`."""
    embed_scale: float = 1.0
    """What token embeddings are multiplied by (Gemma: the square root of `d_model`)."""
    logits_scale: float = 1.0
    """Logits are this many times the products with `W_U` (Granite)."""
    logits_softcap: float | None = None
    """Logits x are capped to c tanh(x / c) (Gemma 2)."""
    tie_word_embeddings: bool = False
    unembed_bias: bool = False
    image_token_id: int | None = None
    image_placeholder: str = "<image>"
    """What the checkpoint's chat template writes for an image."""
    image_text: str = "<image>"
    """What stands in a prompt for one image, with `<image>` for its visual tokens."""
    image_layout: Literal["one_grid", "anyres", "row_col", "any_grid", "thumbnail"] = "one_grid"
    """How an image becomes visual tokens; see `mmlens.inputs.layouts`."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    model_name: str = ""
    original_architecture: str = ""
    default_template: str | None = None
    """What `template="auto"` means; None leaves the choice to the tokenizer's chat template."""
    default_prepend_bos: bool | None = None
    """Whether prompts begin with BOS unless the caller says otherwise; None: if the tokenizer
    itself puts one there, as transformers' does."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the model is, and below in which dtype: kept by the model itself."""
    dtype: torch.dtype = torch.float32

    @property
    def architecture(self) -> str:
        """The same as `original_architecture`."""
        return self.original_architecture

    @property
    def d_vocab_out(self) -> int:
        """How many logits a position has."""
        return self.d_vocab

    @property
    def rotary_base(self) -> float:
        """The base of the rotary angles' periods."""
        return self.rope_parameters.get("rope_theta", 10000.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "n_layers", "d_vocab", "n_ctx")
        ids = [self.image_token_id, self.bos_token_id, self.pad_token_id, *self.eos_token_ids]
        if not all(token is None or type(token) is int for token in ids):
            raise ValueError(f"token ids {ids} are not all whole numbers")
        if self.image_token_id is not None:
            check_sizes(self, "image_token_id", least=0)
            if self.image_token_id >= 2**32:  # as tokenizers number their tokens
                raise ValueError(f"image_token_id={self.image_token_id}; it must be below 2**32")
        check_cap("logits_softcap", self.logits_softcap)
        check_cap("logits_scale", self.logits_scale)
        if not is_finite(self.embed_scale):
            raise ValueError(f"embed_scale={self.embed_scale!r}; it must be a finite number")
        if self.attention_blocks not in (None, "image", "prompt"):
            raise ValueError(
                f"attention_blocks={self.attention_blocks!r}; it can be 'image', 'prompt' or None"
            )
        for rope in (self.rope_parameters, self.local_rope_parameters or self.rope_parameters):
            theta: Any = rope.get("rope_theta")
            if not (is_finite(theta) and theta > 0):
                raise ValueError(f"rope_theta={theta!r}; it must be a finite number above 0")
        share: Any = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if not (is_finite(share) and 0 < share <= 1):
            raise ValueError(f"partial_rotary_factor={share!r}; it must be above 0 and at most 1")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(
                f"{self.rotary_dim} of {self.d_head} dimensions of a head are rotated; these must "
                "be pairs"
            )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.d_head * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def is_multimodal(self) -> bool:
        """Whether the model has a vision tower."""
        return self.vision is not None

    @property
    def n_deepstack(self) -> int:
        """In how many first blocks the images add something besides their visual tokens."""
        return self.projector.n_deepstack if self.projector else 0

    @property
    def vision_hidden_size(self) -> int | None:
        """The tower's `d_model`."""
        return self.vision.d_model if self.vision else None

    @property
    def vision_num_layers(self) -> int | None:
        """The tower's `n_layers`."""
        return self.vision.n_layers if self.vision else None

    @property
    def vision_num_heads(self) -> int | None:
        """The tower's `n_heads`."""
        return self.vision.n_heads if self.vision else None

    @property
    def mm_tokens_per_image(self) -> int | None:
        """How many visual tokens an image of the tower's size has; None where any size is."""
        if self.vision is None or self.vision.packed:
            return None
        merged = self.projector.merged**2 if self.projector else 1
        return self.vision.n_visual_tokens // merged

    @property
    def longest_input(self) -> int:
        """The most positions that a run may have: `n_ctx`, or what rotary scaling makes of it.

        With `linear` and `yarn` scaling, many checkpoints keep the length from before in
        `max_position_embeddings`; others write the longer one, and then `yarn` says from which.
        """
        rope = self.rope_parameters
        kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
        if kind == "linear":
            return int(self.n_ctx * max(factor, 1.0))
        if kind == "yarn":
            before = rope.get("original_max_position_embeddings") or self.n_ctx
            return max(self.n_ctx, int(before * factor))
        return self.n_ctx

    def check_length(self, n_pos: int, mask: Bool[Tensor, "batch pos"] | None = None) -> None:
        """Look whether a run is no longer than the model was made for; before it takes memory.

        Args:
            n_pos: positions of a row, those in a cache of keys and values included.
            mask: False at padding, which does not count.

        Raises:
            ValueError: it is longer.
        """
        if n_pos > self.longest_input and mask is not None:
            n_pos = int(mask.sum(dim=1).max())
        if n_pos > self.longest_input:
            raise ValueError(
                f"a run of {n_pos:,} tokens, but this model was made for {self.longest_input:,}: "
                "shorten the prompt or the answer; or set model.cfg.n_ctx to the length that you "
                "want, if you know what the model does there"
            )
