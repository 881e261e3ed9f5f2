"""The learnt positions of a vision tower, for images of any grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def interpolated(
    positions: Float[Tensor, "pos d_model"],
    learnt: tuple[int, int],
    grid: tuple[int, int],
    mode: str,
) -> Float[Tensor, "other_pos d_model"]:
    """Return learnt positions for the patches of another grid, row by row.

    Args:
        learnt: rows and columns of `positions`.
        mode: "bicubic" between the centres of patches, as transformers does for CLIP and SigLIP;
            "bilinear" from corner to corner, as it does for Qwen3-VL.
    """
    table = positions.unflatten(0, learnt).permute(2, 0, 1)[None]
    corners = mode == "bilinear"
    return F.interpolate(table, size=grid, mode=mode, align_corners=corners)[0].flatten(1).T


def nearest_positions(
    seen: Bool[Tensor, "tile row column"], grid: tuple[int, int]
) -> Int[Tensor, "tile pos"]:
    """Return which learnt position each patch has: the one at its place in the image.

    In float32 and by transformers' own steps, since rounding decides at the edges: even of an image
    of the tower's own grid it moves patches by one, where that has 25 rows, say.

    Args:
        seen: False at patches that are padding, which have position 0.
        grid: rows and columns of learnt positions.
    """
    index = []
    for axis, n_learnt in zip((1, 2), grid, strict=True):
        n_seen = seen.select(3 - axis, 0).sum(dim=1)
        places = torch.arange(seen.shape[axis], dtype=torch.float32, device=seen.device)
        shares = (places[None] * (1.0 / n_seen)[:, None]).clamp(max=1.0 - 1e-6)
        edges = torch.arange(
            1 / n_learnt, 1.0, 1 / n_learnt, dtype=torch.float32, device=seen.device
        )
        index.append(torch.bucketize(shares, edges, right=True))
    positions = index[0][:, :, None] * grid[1] + index[1][:, None, :]
    return positions.masked_fill(~seen, 0).flatten(1)
