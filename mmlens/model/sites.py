"""Sites: which activations a model has, where they are computed, and what their axes mean.

A component declares its sites beside the hook points that it computes (`Attention.SITES`), relative
to itself; whatever holds the component adds where it lies (`within`). So the table of a model,
`model.SITES`, is made of those of its components, and a new hook point is declared where it is
computed and nowhere else. Everything else looks up what an activation is: by its short name ("z",
in `model.SITES`), by the name of its hook point (`model.SITES.of`), or, in a hook function, in
`hook.site`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

Stack = Literal["decoder", "tower", "connector"]
POSITIONS = {
    "pos": "tokens",
    "query": "tokens",
    "patch": "patches",
    "feature": "features",
    "square": "features",
    "normed": "features",
    "visual_token": "visual tokens",
}
"""Axes that count positions, and what these are; in the tower, "tokens" are those of a tile. A
square holds the features that make one visual token; normed are features, or squares of them where
the connector puts them together first."""
UNITS = {"head": "heads", "kv_head": "heads", "d_mlp": "neurons"}
NUMBER = re.compile(r"(?<=[._])\d+(?![^.])")
"""The number of a layer in the name of a hook point."""


@dataclass(frozen=True)
class Site:
    """One kind of activation.

    Example:
        >>> site = Site("z", "batch pos head d_head")
        >>> site.hook, site.position_axis, site.unit_axis, site.units
        ('hook_z', 1, 2, 'heads')
    """

    name: str
    """Short, such as "mlp_out", "ln1.scale", "vision.z"."""
    shape: str
    """Names of its axes: rows, positions (see `POSITIONS`), units, and others."""
    hook: str = ""
    """Its hook point, with "{layer}" for the number of a layer; "hook_" and the name by default."""
    stack: Stack = "decoder"
    key_side: bool = False
    """Whether keys or values are made of it: other positions attend to what is computed here."""
    after: bool = False
    """Whether it comes after its block (a site without layers: after all blocks)."""
    masked: float | None = None
    """What it holds where a query must not attend; None where it says nothing of pairs."""
    layers: str = "n_layers"
    """The field of its stack's configuration that counts its layers."""
    needs: str | None = None
    """The field of the config without which a cache keeps it only where it is named."""

    def __post_init__(self) -> None:
        # A frozen dataclass can be filled no other way.
        object.__setattr__(self, "hook", self.hook or f"hook_{self.name}")

    @cached_property
    def axes(self) -> list[str]:
        """The names of its axes."""
        return self.shape.split()

    @property
    def rows(self) -> str:
        """What its rows are: "batch", "tile" (of images; one for all where a tower packs patches),
        "all" (one for all images), or "1".
        """
        return self.axes[0]

    @cached_property
    def position_axis(self) -> int:
        """The axis that counts positions: the queries, for attention."""
        return next(i for i, axis in enumerate(self.axes) if axis in POSITIONS)

    @property
    def unit_axis(self) -> int:
        """The axis that counts units, which `z[3]` chooses from."""
        return 3 - self.position_axis

    @property
    def units(self) -> str:
        """What its units are: "heads", "neurons" or "dimensions"."""
        return UNITS.get(self.axes[self.unit_axis], "dimensions")

    @property
    def positions(self) -> str:
        """What its positions are."""
        found = POSITIONS[self.axes[self.position_axis]]
        return "class token and patches" if (self.stack, found) == ("tower", "tokens") else found

    @property
    def is_layered(self) -> bool:
        """Whether each layer has its own."""
        return "{layer}" in self.hook

    @property
    def is_of_part(self) -> bool:
        """Whether a part of the block or model computes it: a norm, attention or an MLP."""
        return "." in self.hook.removeprefix("blocks.{layer}.")


def within(
    module: str, sites: Iterable[Site], prefix: str = "", **changes: Any
) -> tuple[Site, ...]:
    """Return the sites of a component as those of what holds it, where it is called `module`.

    Short names begin with `prefix` from there on; `changes` are other fields.
    """
    return tuple(
        replace(site, name=prefix + site.name, hook=f"{module}.{site.hook}", **changes)
        for site in sites
    )


class SiteTable(dict[str, Site]):
    """The sites of a model, by their short names."""

    def __init__(self, *sites: Site) -> None:
        super().__init__((site.name, site) for site in sites)
        self._by_hook = {site.hook: site for site in sites}

    def __missing__(self, name: str) -> Site:
        known = [
            each for each, site in self.items() if site.stack != "tower" or not site.is_layered
        ]
        raise ValueError(
            f"unknown site {name!r}; sites are {', '.join(known)}, and those of the tower's layers "
            "with 'vision.' before them"
        )

    def hook_name(self, name: str, layer: int | None = None) -> str:
        """Return the hook point of a short name, such as "blocks.3.hook_mlp_out"."""
        site = self[name]
        if site.is_layered and layer is None:
            raise ValueError(f"site {name!r} needs layers")
        if not site.is_layered and layer is not None:
            raise ValueError(f"site {name!r} has no layers; leave them out")
        return site.hook.format(layer=layer)

    def of(self, hook_name: str) -> tuple[Site, int | None]:
        """Return the site of a hook point, and its layer.

        One that nobody declared, as of a sparse autoencoder in the place of a hook point, lies in
        the stack of the declared one whose name begins most like its own, with the same rows and
        positions.
        """
        number = NUMBER.search(hook_name)
        layer = int(number[0]) if number else None
        hook = NUMBER.sub("{layer}", hook_name, count=1)
        if hook in self._by_hook:
            return self._by_hook[hook], layer
        near = next(
            site
            for end in range(len(hook), -1, -1)
            for site in self.values()
            if site.hook.startswith(hook[:end])
        )
        shape = f"{near.rows} {near.axes[near.position_axis]} unit"
        return Site(hook_name, shape, hook, near.stack), layer


def is_hook_place(module: str) -> bool:
    """Whether a module's name is one of a hook point, whatever may stand in its place."""
    return module.rpartition(".")[2].startswith("hook_")


@cache
def split_site(site: str) -> tuple[str, tuple[int, ...] | None]:
    """The name of a site and its units, where it has some in brackets.

    Units are heads for the sites of attention ("z[3]"), neurons for those of the MLP
    ("post[0,16-31]"), dimensions for the others; ranges include both ends.

    Raises:
        ValueError: brackets with something else in them.

    Example:
        >>> split_site("z[0,2-4]")
        ('z', (0, 2, 3, 4))
    """
    name, bracket, inside = site.partition("[")
    if not bracket:
        return site, None
    parts = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in inside[:-1].split(",")]
    ends = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    if site[-1] != "]" or len(ends) < len(parts) or any(first > last for first, last in ends):
        raise ValueError(f"site {site!r}: units are numbers and ranges, as in 'z[0,2-4]'")
    units = [unit for first, last in ends for unit in range(first, last + 1)]
    return name, tuple(sorted(set(units)))
