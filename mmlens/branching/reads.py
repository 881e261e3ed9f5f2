"""`Read`: an activation that is read of every branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.branching.packing import Packing
from mmlens.interventions.intervention import hook_name, site_of
from mmlens.model.hook_points import HookPoint
from mmlens.model.sites import Site, split_site
from mmlens.utils.tensors import flat_positions, to_device

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer


@dataclass(frozen=True, eq=False)
class Read:
    """An activation that is read of every branch, and where."""

    site: str
    """As it was given, with units."""
    layer: int | None
    positions: Int[Tensor, " n"]
    """On the CPU, in the order given."""

    @classmethod
    def of(
        cls,
        model: HookedMultimodalTransformer,
        site: str,
        layer: int | None,
        positions: Sequence[int] | Tensor | int | None,
        n_pos: int,
    ) -> Read:
        """Check what is read, and where.

        Raises:
            ValueError: no such site, one that is not of the decoder's layers or its final norm, or
                positions that are not there.
            KeyError: the model has no such hook point.
        """
        given = range(n_pos) if positions is None else positions
        each = flat_positions(given)
        read = cls(site, layer, each)
        model.check_hook_name(read.name)
        if read.where.stack != "decoder" or (layer is None and not read.where.after):
            raise ValueError(
                f"read={site!r}: branches are read in the decoder's layers and in ln_final; "
                "run_with_cache(inputs, interventions=[...]) keeps any activation"
            )
        if not len(each) or not 0 <= int(each.min()) <= int(each.max()) < n_pos:
            raise ValueError(
                f"read={site!r} at {each.tolist()}; positions are 0 ... {n_pos - 1}, at least one"
            )
        return read

    @cached_property
    def name(self) -> str:
        """The hook point."""
        return hook_name(split_site(self.site)[0], self.layer)

    @cached_property
    def where(self) -> Site:
        """What the table of sites says of the site."""
        return site_of(self.site)

    @cached_property
    def first(self) -> int:
        """The first position that is read."""
        return int(self.positions.min())

    def last_layer(self, n_layers: int) -> int:
        """The layer that has to be run; `n_layers` for the final norm."""
        return n_layers if self.layer is None else self.layer

    def keep(
        self, activation: Tensor, hook: HookPoint, packing: Packing, kept: dict[Read, Tensor]
    ) -> None:
        """Keep what is read of branches that are packed, a copy [branch, row, n, ...]."""
        axis, n = hook.site.position_axis, len(packing.starts)
        begins = torch.tensor(packing.offsets[:-1]) - torch.tensor(packing.starts)
        index = to_device((begins[:, None] + self.positions).flatten(), activation.device)
        found = activation.index_select(axis, index).unflatten(axis, (n, len(self.positions)))
        kept[self] = self._with_units(found.movedim(axis, 0), hook)

    def keep_run(self, activation: Tensor, hook: HookPoint, kept: dict[Read, Tensor]) -> None:
        """Keep what is read of a whole run [row, n, ...]."""
        index = to_device(self.positions, activation.device)
        found = activation.index_select(hook.site.position_axis, index)
        kept[self] = self._with_units(found[None], hook)[0]

    def _with_units(self, found: Float[Tensor, "branch row *rest"], hook: HookPoint) -> Tensor:
        units = split_site(self.site)[1]
        return found if units is None else of_units(found, units, hook, before=1)


def of_units(found: Tensor, units: Sequence[int], hook: HookPoint, before: int = 0) -> Tensor:
    """Return the heads, neurons or dimensions of an activation that were asked for.

    Args:
        before: how many axes it has before its own.

    Raises:
        IndexError: it has fewer.
    """
    axis = before + hook.site.unit_axis
    if units[-1] >= found.shape[axis]:
        raise IndexError(
            f"{hook.name} has {hook.site.units} 0 ... {found.shape[axis] - 1}; there is no "
            f"{units[-1]}"
        )
    return found.index_select(axis, torch.tensor(units, device=found.device))
