"""`InTile`: positions of the vision tower in one of the tiles that it sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.model.sites import Site

__all__ = ["InTile"]


@dataclass(frozen=True)
class InTile:
    """Positions of the tower in one tile alone.

    Where a tower sees an image in tiles, a position is that of a patch in a tile, and numbers alone
    mean this patch of *every* tile. `InTile(2, [5, 6])` means positions 5 and 6 of the third tile.
    Tiles are counted as the rows of `pixel_values` are: over all images of the inputs. LLaVA-NeXT
    and LLaVA-OneVision see the whole image in the first tile of an image, Idefics3, SmolVLM and
    InternVL in the last; the others are parts of it, row by row.

    Raises:
        ValueError: a negative tile, no positions, or negative ones.

    Example:
        >>> Intervention("vision.mlp_out", 3, InTile(2, range(10)), zero())
        >>> causal_trace(model, clean, corrupted, sites=("vision.mlp_out",),
        ...              positions=[InTile(0, range(576)), InTile(1, range(576))])
    """

    tile: int
    positions: tuple[int, ...]

    def __init__(self, tile: int, positions: Tensor | Iterable[int] | int) -> None:
        each = torch.as_tensor(
            positions if isinstance(positions, int | Tensor) else list(positions)
        )
        if tile < 0 or not each.numel() or int(each.min()) < 0:
            raise ValueError(
                f"tiles and positions count from 0, and there must be some; got tile {tile} and "
                f"positions {each.flatten().tolist()}"
            )
        if each.is_floating_point() or each.dtype == torch.bool:
            raise ValueError(f"positions are integers, not {each.dtype}")
        # A frozen dataclass can be filled no other way.
        object.__setattr__(self, "tile", int(tile))
        object.__setattr__(self, "positions", tuple(dict.fromkeys(each.flatten().tolist())))


def check_has_tiles(name: str, site: Site) -> None:
    """Raise a ValueError for a site whose rows are no tiles."""
    if site.rows != "tile":
        raise ValueError(
            f"the rows of {name!r} are no tiles: positions in one tile are for sites of the vision "
            "tower and of the connector, up to what it makes of single tiles"
        )


def in_tile(
    tile: int, before: Float[Tensor, "tile ..."], edited: Float[Tensor, "tile ..."], name: str
) -> Float[Tensor, "tile ..."]:
    """Return an activation with one tile of what it became.

    Raises:
        IndexError: there is no such tile.
    """
    if tile >= len(before):
        raise IndexError(f"{name} has tiles 0 ... {len(before) - 1}; there is no {tile}")
    rows = torch.arange(len(before), device=before.device) == tile
    return edited.where(rows.view(-1, *(1,) * (before.ndim - 1)), before)
