"""How images are read: the vision tower, its tiles, and the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmlens.config.blocks import TransformerConfig
from mmlens.config.checks import check_sizes, is_finite


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
