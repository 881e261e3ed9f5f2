"""What some images have of an activation of the tower or the connector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.inputs.visual import Visual
from mmlens.model.sites import POSITIONS, Site
from mmlens.utils.tensors import to_device


def of_images(
    activation: Float[Tensor, "*all"],
    site: Site,
    visual: Visual,
    images: Sequence[int],
    visual_tokens: Sequence[int],
) -> Float[Tensor, "*some"]:
    """Return the rows, or in packed rows the positions, that belong to some images.

    Args:
        activation: of all images.
        site: what it is.
        visual: all images.
        images: which are meant.
        visual_tokens: which of all visual tokens are theirs.
    """
    if site.rows == "all":
        return activation[:, visual_tokens]
    rows = visual.rows_of("pixel_values", images)
    if visual.axis == 0:
        if site.rows == "1" and len(activation) == 1:  # learnt positions that all tiles share
            return activation
        return activation[rows]
    for axis, what in enumerate(site.axes):
        if what in POSITIONS or what == "key":
            index = torch.tensor(visual_tokens if what == "square" else rows, dtype=torch.long)
            activation = activation.index_select(axis, to_device(index, activation.device))
    return activation
