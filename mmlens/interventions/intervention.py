"""An intervention: a hook function, and where it acts.

    site x layers x positions x hook function

Since an intervention says where it acts, the engine (`mmlens.branching`) knows what it cannot
change: everything below its first layer, and every position before its first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mmlens.interventions.cut import Cut, called
from mmlens.interventions.hook_function import HookFunction, stretch
from mmlens.interventions.in_tile import InTile, check_has_tiles, in_tile
from mmlens.model.hook_points import HookPoint
from mmlens.model.run_positions import PassPositions, Positions, current_pass
from mmlens.model.sites import Site, split_site
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.utils.tensors import flat_positions, listed_numbers, to_device

LAYERED_SITES = tuple(
    name
    for name, site in HookedMultimodalTransformer.SITES.items()
    if site.stack == "decoder" and site.is_layered
)
"""The short names of what every layer of the decoder may have."""


SiteLayers = str | tuple[str, int | Iterable[int] | None]
"""A site with one layer or several; a site without layers, or the name of a hook point, alone."""


def site_of(site: str) -> Site:
    """The entry of a site (with or without units) in the table of sites."""
    return HookedMultimodalTransformer.SITES[split_site(site)[0]]


def hook_name(site: str, layer: int | None = None) -> str:
    """The hook point of a short site name.

    Args:
        site: one of `LAYERED_SITES`, with "vision." before it for the tower; or a site without
            layers, such as "input_embed", "vision.out" and "projector.out".
        layer: which block; None for a site without layers.

    Raises:
        ValueError: no such site, or a layer missing or too many.

    Example:
        >>> hook_name("mlp_out", 3)
        'blocks.3.hook_mlp_out'
        >>> hook_name("vision.z", 0)
        'vision.blocks.0.attn.hook_z'
    """
    return HookedMultimodalTransformer.SITES.hook_name(site, layer)


def hook_names(site: str, layers: Iterable[int] | None) -> list[str]:
    """The hook points of a site (with or without units) in these layers."""
    name, _ = split_site(site)
    return [hook_name(name, layer) for layer in ([None] if layers is None else layers)]


def names_of(sites: Iterable[SiteLayers]) -> list[str]:
    """The hook points of sites with their layers, each once.

    Example:
        >>> names_of([("resid_post", 12), ("z", range(2)), "input_embed"])
        ['blocks.12.hook_resid_post', 'blocks.0.attn.hook_z', ...]
    """
    names: list[str] = []
    for each in sites:
        if isinstance(each, str) and each not in HookedMultimodalTransformer.SITES:
            names.append(each)
            continue
        site, layers = (each, None) if isinstance(each, str) else each
        names += hook_names(site, None if layers is None else listed_numbers(layers))
    return list(dict.fromkeys(names))


def window(
    site: str,
    center: int,
    width: int,
    model: HookedMultimodalTransformer | None = None,
) -> range:
    """The layers of a window of `width` around `center`, clipped to the model.

    They are center - width // 2 ... center - width // 2 + width - 1, as in ROME (Meng et al. 2022):
    1 is the layer alone, 3 is one to each side. (The paper's released script takes 2 w + 1 layers
    for its `--window w`.)

    Args:
        site: decides whose layers are meant, the decoder's or (with "vision.") the tower's.
        model: clips at its last layer; without it only at layer 0.

    Raises:
        ValueError: a width below 1, or a centre outside of the model.

    Example:
        >>> window("mlp_out", 5, 3)
        range(4, 7)
    """
    if width < 1:
        raise ValueError(f"a window of {width} layers; it needs at least 1")
    n_layers = None if model is None else n_layers_of(site, model)
    if center < 0 or (n_layers is not None and center >= n_layers):
        last = "" if n_layers is None else f" ... {n_layers - 1}"
        raise ValueError(f"a window around layer {center}; layers are 0{last}")
    first = center - width // 2
    stop = first + width if n_layers is None else min(first + width, n_layers)
    return range(max(first, 0), stop)


def stack_config(site: str, model: HookedMultimodalTransformer) -> Any:
    """The configuration of what a site lies in: decoder, tower or connector.

    Raises:
        ValueError: a language model alone has no tower.
    """
    cfg = model.cfg
    of: Any = {"decoder": cfg, "tower": cfg.vision, "connector": cfg.projector}
    if (stack := of[site_of(site).stack]) is None:
        raise ValueError(f"site {site!r}: this model has no vision tower")
    return stack


def n_layers_of(site: str, model: HookedMultimodalTransformer) -> int:
    """How many layers have a site.

    Raises:
        ValueError: none in this model.
    """
    if not (n_layers := getattr(stack_config(site, model), site_of(site).layers)):
        raise ValueError(f"site {site!r}: this model has none")
    return n_layers


@dataclass(frozen=True, eq=False, init=False)
class Intervention:
    """`hook`, applied at `site` of every one of `layers`, at `positions`.

    Args:
        site: a short name, see `hook_name`; with units, only these are edited: "z[3]" is head 3,
            "post[0-99]" a hundred neurons (see `split_site`). The function sees all units.
        layers: any set of layers; None for a site without layers.
        positions: any positions (queries, for scores and patterns); None for all. They are those of
            the whole text: a pass that computes only what comes after a key-value cache, as each
            step of `generate` is, edits those that it computes, and a position that has not been
            generated yet is edited when it comes. In a batch, padding counts. "generated" is every
            position that `generate` adds. For the vision tower they are its own patches, in every
            tile alike; `InTile(2, positions)` are those of one tile. In a branch of a recording,
            None makes the branch compute the whole prompt, visual tokens included, since position 0
            is among them: `range(first, inputs.n_pos)` costs the positions from `first` on, and
            gives the same where nothing earlier changes.
        hook: a function of `mmlens.interventions.functions` or your own `f(slice, hook)`. It sees
            only the slice at `positions`, in their order; it returns what takes the slice's place,
            or None to leave it (an edit in place counts). With a parameter `positions` it is told
            those of its slice (None where the slice is the whole text).

    Raises:
        ValueError: no such site, layers missing or too many, negative positions; "generated" for a
            site of the vision tower or the connector, which see the prompt alone; one tile of a
            site that has none.
        TypeError: positions that are no integers, such as a mask.

    Example:
        >>> early = Intervention("mlp_out", range(4), inputs.span("constraint"), zero())
        >>> model.run_with_hooks(inputs, interventions=[early])
    """

    site: str
    """Without units."""
    units: tuple[int, ...] | None
    """Heads, neurons or dimensions, ascending; None for all."""
    layers: tuple[int, ...] | None
    """Ascending."""
    positions: Int[Tensor, " n"] | Literal["generated"] | None
    """On the CPU, each once."""
    tile: int | None
    """Where the positions are those of one tile alone; else None."""
    hook: HookFunction

    def __init__(
        self,
        site: str,
        layers: Iterable[int] | int | None,
        positions: Tensor | Sequence[int] | int | InTile | Literal["generated"] | None,
        hook: HookFunction,
    ) -> None:
        layers = None if layers is None else listed_numbers(layers)
        # A frozen dataclass can be filled no other way.
        name, units = split_site(site)
        object.__setattr__(self, "site", name)
        object.__setattr__(self, "units", units)
        object.__setattr__(self, "layers", None if layers is None else tuple(sorted(set(layers))))
        tile = None
        if isinstance(positions, InTile):
            tile, positions = positions.tile, positions.positions
        object.__setattr__(self, "positions", as_positions(positions))
        object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "hook", hook)
        # A wrong site or a missing layer is an error here, not in the run.
        hook_name(name, None if layers is None else 0)
        if tile is not None:
            check_has_tiles(site, self.where)
        if isinstance(self.positions, str) and self.where.stack != "decoder":
            raise ValueError(
                f"positions='generated' are tokens; the positions of {site!r} are "
                f"{self.where.positions} of the prompt's images, and generate adds none"
            )

    @cached_property
    def where(self) -> Site:
        """What the table of sites says of its site."""
        return site_of(self.site)

    def places(self) -> list[tuple[str, int | None]]:
        """The hook points it acts on, each with its layer, or None for a site without layers."""
        layers = [None] if self.layers is None else self.layers
        return [(hook_name(self.site, layer), layer) for layer in layers]

    def hook_names(self) -> list[str]:
        """The hook points it acts on."""
        return hook_names(self.site, self.layers)

    def fwd_hooks(self, branch: int = 0) -> list[tuple[str, HookFunction]]:
        """`(name, function)` pairs for `run_with_hooks`; concatenate those of several.

        Args:
            branch: which branch a `batched` function is told.
        """
        return [(name, partial(self.edit, branch=branch)) for name in self.hook_names()]

    @cached_property
    def first_position(self) -> int | None:
        """The first position it touches; 0 where it touches all, None where it touches none.

        Raises:
            ValueError: it touches what `generate` adds, and how long the prompt is only a
                generation knows.
        """
        if self.positions is None:
            return 0
        return min(self._given.tolist(), default=None)

    @property
    def _given(self) -> Positions:
        """The positions that were given as numbers."""
        if isinstance(self.positions, Tensor):
            return self.positions
        raise ValueError(
            f"an intervention on {self.site} at positions='generated', but nothing is generated "
            "here: generate(..., interventions=[...]) adds positions; for other runs give numbers, "
            "or None for every position"
        )

    @cached_property
    def _last_position(self) -> int:
        return max(self._given.tolist(), default=-1)

    @cached_property
    def _stretch(self) -> tuple[int, int] | None:
        return stretch(self._given)

    def edit(
        self, activation: Tensor, hook: HookPoint, first: int | None = None, branch: int = 0
    ) -> Tensor:
        """Return the activation with the declared slice edited.

        Args:
            first: the position of the text at which the activation begins; by default the model
                says it (`mmlens.model.run_positions`).
            branch: which branch a `batched` function is told.

        Raises:
            IndexError: positions or units that the activation does not have.
            TypeError, ValueError: the function returned no tensor, or another shape or dtype than
                it was given; or it acts on what is generated, and nothing is.
        """
        cut = self.cut(activation, hook, first)
        if cut is None:
            return activation
        return cut.put(called([(branch, self, cut)], hook)[0])

    def cut(self, activation: Tensor, hook: HookPoint, first: int | None = None) -> Cut | None:
        """Return the slice that is edited; None where this activation has nothing of it."""
        here = current_pass() if first is None else PassPositions(first)
        axis = hook.site.position_axis
        n_here = activation.shape[axis]
        if self.positions is None:
            return Cut(activation, axis, None, activation, here.positions(n_here))
        positions, found = self._within(here, n_here, hook)
        if not len(positions):
            return None
        if found is not None:
            begin, n = found[0] - here.first, found[1]
            # A copy: nothing may reach what others hold of this activation.
            return Cut(
                activation, axis, begin, activation.narrow(axis, begin, n).clone(), positions
            )
        index = to_device(positions - here.first, activation.device)
        return Cut(activation, axis, index, activation.index_select(axis, index), positions)

    def _within(
        self, here: PassPositions, n_here: int, hook: HookPoint
    ) -> tuple[Positions, tuple[int, int] | None]:
        """Return the positions that a pass computes, and as a stretch if they are one."""
        begin, end = here.first, here.first + n_here
        if isinstance(self.positions, str) and here.prompt is not None:
            new = torch.arange(max(begin, here.prompt), max(end, here.prompt))
            return new, stretch(new)
        if self._last_position >= here.end(n_here):
            raise IndexError(
                f"{hook.name} has positions 0 ... {here.end(n_here) - 1}; "
                f"there is no {self._last_position}"
            )
        if begin <= (self.first_position or 0) and self._last_position < end:
            return self._given, self._stretch
        inside = self._given[(self._given >= begin) & (self._given < end)]
        return inside, stretch(inside)

    @property
    def is_partial(self) -> bool:
        """Whether it edits only some units or one tile of the slice that its function sees."""
        return self.units is not None or self.tile is not None

    def with_units(self, slice: Tensor, edited: Tensor, hook: HookPoint) -> Tensor:
        """Return the slice with the declared units, and tile, of what it became."""
        if self.tile is not None:
            edited = in_tile(self.tile, slice, edited.to(slice), str(hook.name))
        if self.units is None:
            return edited.to(slice)
        axis, n = hook.site.unit_axis, slice.shape[hook.site.unit_axis]
        if self.units[-1] >= n:
            raise IndexError(
                f"{hook.name} has {hook.site.units} 0 ... {n - 1}; there is no {self.units[-1]}"
            )
        index = torch.tensor(self.units, device=slice.device)
        return slice.index_copy(axis, index, edited.to(slice).index_select(axis, index))


def as_positions(
    positions: Tensor | Sequence[int] | int | str | None,
) -> Int[Tensor, " n"] | Literal["generated"] | None:
    """Positions as a LongTensor on the CPU, each once, in the order given; None stays None."""
    if positions is None:
        return None
    if isinstance(positions, str):
        if positions == "generated":
            return "generated"
        raise ValueError(
            f"positions={positions!r}; they are numbers, None (every position) or 'generated'; "
            f"those of a span are inputs.span({positions!r})"
        )
    each = list(dict.fromkeys(flat_positions(positions).tolist()))
    if min(each, default=0) < 0:
        raise ValueError(f"positions count from 0; got {each}")
    return torch.tensor(each, dtype=torch.long)
