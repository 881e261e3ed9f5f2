"""Regions of an image as positions: a grid, boxes, masks of objects, and random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmlens.inputs.image_tokens import ImageTokens
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.utils.tensors import flat_positions

RegionsGiven = tuple[int, int] | Sequence[Any] | Mapping[str, Any]
"""A grid of (rows, columns); or boxes in pixels, masks or positions, in a list or by name."""
Region = Int[Tensor, " _"]


def named_regions(
    inputs: MultimodalInputs, given: RegionsGiven
) -> tuple[list[list[str | int]], list[Region]]:
    """Return coordinates along one axis or two, and the positions of each region.

    Raises:
        ValueError: no image, no regions, one box instead of a list, or a region that no visual
            token shows.
        TypeError: positions that are no integers.
    """
    if not inputs.images:
        raise ValueError("a scan over regions needs a prompt with an image")
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(n, Integral) for n in given):
        rows, columns = map(int, given)
        return [list(range(rows)), list(range(columns))], grid_regions(inputs, rows, columns)
    if isinstance(given, tuple) and len(given) == 4 and isinstance(given[0], Real):
        raise ValueError(f"regions={tuple(given)} is one box; give boxes in a list, or by name")
    named = given if isinstance(given, Mapping) else dict(enumerate(given))
    found = [positions_in(inputs, each) for each in named.values()]
    if not found:
        raise ValueError("no regions: give a grid (rows, columns), boxes, masks or positions")
    return [list(named)], found


def grid_regions(inputs: MultimodalInputs, rows: int, columns: int) -> list[Region]:
    """Return the cells of a grid over the image, in all of its views where it has several."""
    image = inputs.images[0]
    if len(image.grids) == 1:
        return inputs.tiles(rows, columns)
    if image.views[0].box is None:
        raise ValueError(
            f"the image has {len(image.grids)} views, and where they lie in it is unknown, since "
            "the inputs do not hold it: give positions"
        )
    left, top, right, bottom = whole_box(image)
    xs, ys = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    return [
        inputs.patches((xs[j], ys[i], xs[j + 1], ys[i + 1]))
        for i in range(rows)
        for j in range(columns)
    ]


def whole_box(image: ImageTokens) -> tuple[float, float, float, float]:
    """Return the rectangle of the image itself."""
    assert image.image is not None  # where views have boxes
    width, height = image.image.size
    return 0.0, 0.0, float(width), float(height)


def positions_in(inputs: MultimodalInputs, region: Any) -> Region:
    """Return the visual tokens of a box, a mask, a `Region` of a data set, or positions."""
    region = getattr(region, "box", region)
    if isinstance(region, np.ndarray | Tensor) and region.ndim == 2:
        return masked_positions(inputs, np.asarray(region, dtype=bool))
    if isinstance(region, tuple) and len(region) == 4:
        return inputs.patches(region)
    positions = flat_positions(region, "a box is a tuple; positions").unique()
    visual = inputs.is_image[0].cpu()
    inside = (positions >= 0) & (positions < inputs.n_pos)
    if not len(positions) or not bool(inside.all()) or not bool(visual[positions].all()):
        raise ValueError(
            f"a region is a box (a tuple of four numbers), a mask [height, width] or positions of "
            f"visual tokens, not {positions.tolist()[:8]}"
        )
    return positions


def masked_positions(inputs: MultimodalInputs, mask: np.ndarray) -> Region:
    """Return the visual tokens, of every view, of which at least half lies in a mask.

    What a cell shows beyond the image's edge, which is padding, does not count. Where that is none,
    since what it shows is smaller than the cells, those that hold most of it: of the whole image,
    and of its tiles together.
    """
    image = inputs.images[0]
    if image.image is None or mask.shape != image.image.size[::-1]:
        known = "unknown" if image.image is None else f"{image.image.size[::-1]}"
        raise ValueError(f"a mask of {mask.shape} pixels for an image of {known} (height, width)")
    # Sums over rectangles, by the integral of the mask.
    area = np.pad(mask.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    found: list[int] = []
    for cells in image.seen_cells():
        shares = {}
        for position, cell in cells.items():
            left, right = np.clip([round(cell.left), round(cell.right)], 0, mask.shape[1])
            top, bottom = np.clip([round(cell.top), round(cell.bottom)], 0, mask.shape[0])
            held = area[bottom, right] - area[top, right] - area[bottom, left] + area[top, left]
            size = (cell.right - cell.left) * (cell.bottom - cell.top)
            shares[position] = float(held / size)
        most = max(shares.values(), default=0.0)
        bound = 0.5 if most >= 0.5 else most * (1 - 1e-6)
        found += [position for position, share in shares.items() if share and share >= bound]
    if not found:
        raise ValueError("no visual token shows what the mask marks")
    return torch.tensor(sorted(found), dtype=torch.long)


def random_regions(
    inputs: MultimodalInputs, regions: Sequence[Region], n_draws: int, seed: int
) -> list[Region]:
    """Return, for each region, sets of as many other visual tokens, drawn at random.

    Raises:
        ValueError: a region with more tokens than are left.
    """
    visual = inputs.is_image[0].nonzero().flatten().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for region in regions:
        others = visual[~torch.isin(visual, region)]
        if n_draws and len(others) < len(region):
            raise ValueError(
                f"a region of {len(region)} of {len(visual)} visual tokens has no random control: "
                "there are not as many others"
            )
        for _ in range(n_draws):
            order = torch.randperm(len(others), generator=generator)
            drawn.append(others[order[: len(region)]].sort().values)
    return drawn
