"""How an image becomes visual tokens: one file for each way in which models do it.

A layout processes an image for a prompt (`processed`), and finds the images in ready token ids
(`located`). `image_layout(cfg)` returns the model's.
"""

from __future__ import annotations

from collections.abc import Callable

from mmlens.inputs.layouts.any_grid import AnyGrid
from mmlens.inputs.layouts.anyres import AnyRes
from mmlens.inputs.layouts.layout import (
    BATCH_KEYS,
    ImageLayout,
    MultimodalConfig,
    ProcessedImage,
    drop_what_is_known,
)
from mmlens.inputs.layouts.one_grid import OneGrid
from mmlens.inputs.layouts.row_col import RowCol
from mmlens.inputs.layouts.thumbnail import Thumbnail

__all__ = [
    "BATCH_KEYS",
    "LAYOUTS",
    "ImageLayout",
    "ProcessedImage",
    "drop_what_is_known",
    "image_layout",
]

LAYOUTS: dict[str, Callable[[MultimodalConfig], ImageLayout]] = {
    "one_grid": OneGrid,
    "anyres": AnyRes,
    "row_col": RowCol,
    "any_grid": AnyGrid,
    "thumbnail": Thumbnail,
}
"""By the names that `MultimodalConfig.image_layout` takes."""


def image_layout(cfg: MultimodalConfig) -> ImageLayout:
    """Return how images become visual tokens in a model of this configuration."""
    return LAYOUTS[getattr(cfg, "image_layout", "one_grid")](cfg)
