"""The cells of a causal trace: sites x groups of positions x layers, and what cannot be traced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mmlens.inputs.common_prefix import common_prefix
from mmlens.inputs.image_tokens import check_same_cells
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.position_labels import region_label
from mmlens.interventions.in_tile import InTile, check_has_tiles
from mmlens.interventions.intervention import n_layers_of, site_of, window
from mmlens.model.components.packed_images import grids_of, places
from mmlens.utils.tensors import flat_positions, listed_numbers

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

SITES = ("resid_post", "attn_out", "mlp_out")
Group = int | Sequence[int] | Int[Tensor, " _"] | InTile | Sequence[InTile]
"""Positions; or those of one tile of the tower, or of several tiles, each with its own."""


@dataclass(frozen=True, eq=False)
class TracedGroup:
    """A group of positions that are restored together."""

    parts: tuple[Int[Tensor, " _"] | InTile, ...]
    """As interventions take them."""
    label: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """All positions, one part after the other."""
        return tuple(number for part in self.parts for number in numbers_of(part))

    @property
    def tiles(self) -> tuple[int | None, ...]:
        """The tile of each position; None stands for every tile."""
        return tuple(
            part.tile if isinstance(part, InTile) else None
            for part in self.parts
            for _ in numbers_of(part)
        )


def numbers_of(part: Int[Tensor, " _"] | InTile) -> list[int]:
    """The positions of one part."""
    return list(part.positions) if isinstance(part, InTile) else part.tolist()


def check_pair(clean: MultimodalInputs, corrupted: MultimodalInputs) -> None:
    """Raise a ValueError unless both are one prompt with the same positions and patches."""
    if len(clean) != 1 or len(corrupted) != 1:
        raise ValueError(
            f"causal_trace takes one prompt; clean has {len(clean)} rows, corrupted has "
            f"{len(corrupted)}"
        )
    if clean.noise is not None:
        raise ValueError("the clean inputs have noise; only the corrupted may have some")
    if len(clean.images) == len(corrupted.images):
        for image, other in zip(clean.images, corrupted.images, strict=True):
            check_same_cells(other, image)
    if (
        clean.n_pos != corrupted.n_pos
        or not torch.equal(clean.is_image, corrupted.is_image)
        or not torch.equal(clean.attention_mask, corrupted.attention_mask)
    ):
        raise ValueError(
            f"clean ({clean.n_pos} positions) and corrupted ({corrupted.n_pos}) must have the same "
            "positions, visual tokens and padding; swap_span keeps them"
        )
    if len(clean.images) != len(corrupted.images):
        raise ValueError(
            f"clean has {len(clean.images)} images, corrupted has {len(corrupted.images)}"
        )


def first_difference(clean: MultimodalInputs, corrupted: MultimodalInputs) -> int:
    """The first position at which the two runs can differ."""
    first = common_prefix(clean, corrupted)
    if first == clean.n_pos:
        raise ValueError("clean and corrupted inputs are the same: there is nothing to trace")
    return first


def position_groups(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    sites: Sequence[str],
    positions: Sequence[Group] | None,
) -> list[TracedGroup]:
    """The groups of positions, each with a label."""
    first = first_difference(clean, corrupted)
    if isinstance(positions, str):
        raise ValueError(
            f"positions={positions!r}; they are groups, such as [inputs.span({positions!r})]"
        )
    if positions is None:
        if site_of(sites[0]).positions != "tokens":
            raise ValueError(f"site {sites[0]!r} has positions of its own: give them")
        positions = list(range(first, clean.n_pos))
    groups = [parts_of(group) for group in positions]
    if not groups:
        raise ValueError("no positions to trace; positions=None takes all that can matter")
    known = {
        tile: labels_at(model, clean, sites[0], tile)
        for tile in {tile_of(part) for parts in groups for part in parts}
    }
    for parts in groups:
        for part in parts or (torch.tensor([], dtype=torch.long),):
            numbers, n_labels = numbers_of(part), len(known[tile_of(part)])
            if not numbers or min(numbers) < 0 or max(numbers) >= n_labels:
                raise ValueError(
                    f"positions {numbers} are not among 0 ... {n_labels - 1}; each group needs at "
                    "least one"
                )
    return [
        TracedGroup(
            parts,
            group_label([known[tile_of(part)][n] for part in parts for n in numbers_of(part)]),
        )
        for parts in groups
    ]


def tiles_of(groups: Sequence[TracedGroup]) -> dict[str, list[list[int | None]]]:
    """What a result says of the tiles of its groups' positions; nothing where none names one."""
    tiles = [list(group.tiles) for group in groups]
    return {"tiles": tiles} if any(tile is not None for each in tiles for tile in each) else {}


def parts_of(group: Group) -> tuple[Int[Tensor, " _"] | InTile, ...]:
    """A group as interventions take it: positions, or those of one tile after the other."""
    if isinstance(group, InTile):
        return (group,)
    if isinstance(group, Sequence) and any(isinstance(part, InTile) for part in group):
        if not all(isinstance(part, InTile) for part in group):
            raise ValueError(f"a group is positions or `InTile`s, not both: {list(group)}")
        return of_tiles([part for part in group if isinstance(part, InTile)])
    # What is summed over a group counts each position once.
    return (torch.tensor(list(dict.fromkeys(flat_positions(group).tolist())), dtype=torch.long),)


def of_tiles(given: Sequence[InTile]) -> tuple[InTile, ...]:
    """Positions of one tile after the other, each once, also where several name the same tile."""
    found: dict[int, list[int]] = {}
    for part in given:
        found.setdefault(part.tile, []).extend(part.positions)
    return tuple(InTile(tile, positions) for tile, positions in found.items())


def tile_of(part: Int[Tensor, " _"] | InTile) -> int | None:
    """The tile of positions that are of one; None for every tile."""
    return part.tile if isinstance(part, InTile) else None


def labels_at(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    site: str,
    tile: int | None = None,
) -> list[str]:
    """A label for each position of a site: tokens, or what stands for the image's patches.

    Positions of the tower are those of one tile. Where it sees several, an edit there acts on all
    of them alike, and labels are `<patch *:row,column>`; those of one of them (`InTile`) are
    `<patch 2:row,column>`. What the connector puts together is `<img ...>` instead. Where the tower
    packs patches, its positions are those of all images, `<patch1 row,column>`.

    Args:
        tile: one of several; None for every one.

    Raises:
        ValueError: there is no such tile, or the site's rows are no tiles.
    """
    place, vision = site_of(site), model.cfg.vision
    if tile is not None:
        check_has_tiles(site, place)
        n_tiles = 0 if clean.pixel_values is None else len(clean.pixel_values)
        if vision is not None and vision.packed:
            raise ValueError(
                "this model's tower has all patches in one row, so that a number says which image "
                "is meant, too: give positions without a tile"
            )
        if tile >= n_tiles:
            raise ValueError(f"tile {tile}, but the tower sees {n_tiles}, counted from 0")
    if place.positions == "tokens" or vision is None:
        return clean.labels()
    axis, projector = place.axes[place.position_axis], model.cfg.projector
    merged = axis == "square" or (axis == "normed" and bool(projector and projector.norm_merged))
    if place.positions == "visual tokens" or (vision.packed and merged):
        labels = clean.labels()
        return [labels[position] for image in clean.images for position in image.positions]
    if vision.packed:
        grids = [] if clean.visual is None else grids_of(clean.visual)
        return [
            f"<patch{image if len(grids) > 1 else ''} {row},{column}>"
            for image, row, column in places(grids).tolist()
        ]
    rows, columns = vision.grid
    if clean.pixel_values is not None:  # of another size than the tower's own, perhaps
        height, width = clean.pixel_values.shape[-2:]
        rows, columns = height // vision.patch_size, width // vision.patch_size
    several = clean.pixel_values is not None and len(clean.pixel_values) > 1
    which = "*" if tile is None else str(tile)
    before = f"{which}:" if several else ""
    if merged and projector is not None and projector.merged > 1:
        rows, columns = (side // projector.merged for side in (rows, columns))
        return [f"<img {before}{row},{column}>" for row in range(rows) for column in range(columns)]
    patches = [
        f"<patch {before}{row},{column}>" for row in range(rows) for column in range(columns)
    ]
    if place.positions == "patches":
        return patches
    labels = [f"<cls {which}>" if several else "<cls>"] * vision.class_token + patches
    dropped = place.positions == "features" and vision.select == "default"
    return labels[1:] if dropped else labels


def group_label(labels: Sequence[str]) -> str:
    """The tokens of a group, shortened where there are many; a region of an image as such."""
    if region := region_label(labels):
        return region
    if len(labels) > 6:
        return f"{labels[0]} ... {labels[-1]} ({len(labels)})"
    return "".join(labels)


def layer_centres(
    model: HookedMultimodalTransformer, sites: Sequence[str], layers: Iterable[int] | None
) -> list[int]:
    """The centres of the windows, each once; by default all layers that have these sites.

    For sites without layers it is 0 alone.
    """
    if isinstance(sites, str) or not sites:
        raise ValueError(f"sites must be several names, e.g. ('mlp_out',), not {sites!r}")
    found = [site_of(site) for site in sites]
    if len(set(sites)) < len(sites):
        raise ValueError(f"sites {', '.join(sites)}: one of them is there twice; give each once")
    flat = [not site.is_layered for site in found]
    if len({site.positions for site in found}) > 1:
        raise ValueError(
            f"trace the decoder, the vision tower and the visual tokens one at a time, not {sites}"
        )
    if any(flat):
        if layers is not None or not all(flat):
            raise ValueError(
                f"{', '.join(sites)}: sites without layers have a single column; trace them apart, "
                "without layers"
            )
        return [0]
    n_layers = min(n_layers_of(site, model) for site in sites)
    centres = listed_numbers(range(n_layers) if layers is None else layers)
    outside = [layer for layer in centres if not 0 <= layer < n_layers]
    if outside or not centres:
        raise ValueError(
            f"layers {outside or centres} are not among 0 ... {n_layers - 1}, which have "
            f"{', '.join(sites)}"
        )
    if len(set(centres)) < len(centres):
        raise ValueError(f"layers {centres}: one of them is there twice; give each once")
    return centres


def window_layers(
    model: HookedMultimodalTransformer, site: str, centre: int, width: int
) -> range | None:
    """The layers of a window; None for sites without layers."""
    if site_of(site).is_layered:
        return window(site, centre, width, model)
    if width != 1:
        raise ValueError(f"site {site!r} has no layers, and so no window of {width}")
    return None
