"""From tiles to lines of visual tokens, each with an embedding at its end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import AnyResConfig
from mmlens.inputs.layouts.anyres import Tiling
from mmlens.inputs.visual import Visual


class LineEnds(nn.Module):
    """The arrangement of LLaVA-NeXT and OneVision ("image newline").

    Of every image: the tokens of the whole, then those of the tiles as one grid, without padding,
    shrunk where there are too many, and with a learnt embedding at the end of each line. Source:
    transformers, `pack_image_features` of `modeling_llava_next.py`, `modeling_llava_onevision.py`.
    """

    def __init__(self, cfg: AnyResConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.newline = nn.Parameter(torch.empty(d_model).normal_(std=d_model**-0.5))

    def forward(
        self, tokens: Float[Tensor, "run tile feature d_model"], visual: Visual
    ) -> Float[Tensor, "run visual_token d_model"]:
        """Return the visual tokens of all images, in reading order."""
        counts = visual.counts["pixel_values"]
        sizes = visual["image_sizes"].tolist()
        found = []
        for tiles, (height, width) in zip(tokens.split(counts, dim=1), sizes, strict=True):
            lines = tiles[:, :0, 0]
            if tiles.shape[1] > 1:
                lines = self._lines(tiles[:, 1:], Tiling.of((height, width), self.cfg))
            else:
                lines = self.newline.to(tiles).expand(len(tiles), 1, -1)
            found += [tiles[:, 0], lines]
        return torch.cat(found, dim=1)

    def _lines(
        self, tiles: Float[Tensor, "run tile feature d_model"], tiling: Tiling
    ) -> Float[Tensor, "run line_token d_model"]:
        grid = rearrange(
            tiles,
            "run (tile_row tile_col) (row col) d -> run d (tile_row row) (tile_col col)",
            tile_row=tiling.tiles[0],
            row=self.cfg.tile_grid[0],
        )
        grid = grid[:, :, tiling.kept[0], tiling.kept[1]]
        if grid.shape[2:] != tiling.grid:
            grid = F.interpolate(grid, tiling.grid, mode="bilinear")
        ends = self.newline.to(grid)[:, None, None].expand(*grid.shape[:-1], 1)
        return rearrange(torch.cat([grid, ends], dim=-1), "run d row col -> run (row col) d")
