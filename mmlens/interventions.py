"""An intervention: a hook function, and where it acts.

    site x layers x positions x hook function

Since an intervention says where it acts, the engine (`mmlens.branching`) knows what it cannot
change: everything below its first layer, and every position before its first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmlens.hook_points import HookPoint
from mmlens.hooks import HookFunction, position_axis, stretch, takes_positions
from mmlens.transfer import to_device

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

BLOCK_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
ATTENTION_SITES = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
MLP_SITES = ("pre", "pre_linear", "post")
NORM_SITES = ("ln1.scale", "ln1.normalized", "ln2.scale", "ln2.normalized")
LAYERED_SITES = BLOCK_SITES + ATTENTION_SITES + MLP_SITES + NORM_SITES
MODEL_SITES = {
    "embed": "hook_embed",
    "input_embed": "hook_input_embed",
    "ln_final.scale": "ln_final.hook_scale",
    "ln_final.normalized": "ln_final.hook_normalized",
    "vision.patch_embed": "vision.hook_patch_embed",
    "vision.pos_embed": "vision.hook_pos_embed",
    "vision.embed": "vision.hook_embed",
    "vision.ln_pre.scale": "vision.ln_pre.hook_scale",
    "vision.ln_pre.normalized": "vision.ln_pre.hook_normalized",
    "vision.out": "vision.hook_out",
    "projector.in": "projector.hook_in",
    "projector.pre": "projector.hook_pre",
    "projector.post": "projector.hook_post",
    "projector.out": "projector.hook_out",
}


def hook_name(site: str, layer: int | None = None) -> str:
    """The hook point of a short site name.

    Args:
        site: one of `LAYERED_SITES`, with "vision." before it for the tower; or of `MODEL_SITES`,
            which have no layers.
        layer: which block; None for `MODEL_SITES`.

    Raises:
        ValueError: no such site, or a layer missing or too many.

    Example:
        >>> hook_name("mlp_out", 3)
        'blocks.3.hook_mlp_out'
        >>> hook_name("vision.z", 0)
        'vision.blocks.0.attn.hook_z'
    """
    if site in MODEL_SITES:
        if layer is not None:
            raise ValueError(f"site {site!r} has no layers; leave them out")
        return MODEL_SITES[site]
    tower, short = ("vision.", site[7:]) if site.startswith("vision.") else ("", site)
    if short not in LAYERED_SITES:
        raise ValueError(
            f"unknown site {site!r}; sites are {', '.join(LAYERED_SITES)} (with 'vision.' before "
            f"them for the tower) and {', '.join(MODEL_SITES)}"
        )
    if layer is None:
        raise ValueError(f"site {site!r} needs layers")
    if short in NORM_SITES:
        norm, part = short.split(".")
        return f"{tower}blocks.{layer}.{norm}.hook_{part}"
    module = "attn." if short in ATTENTION_SITES else "mlp." if short in MLP_SITES else ""
    return f"{tower}blocks.{layer}.{module}hook_{short}"


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


def hook_names(site: str, layers: Iterable[int] | None) -> list[str]:
    """The hook points of a site (with or without units) in these layers."""
    name, _ = split_site(site)
    return [hook_name(name)] if layers is None else [hook_name(name, layer) for layer in layers]


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


def n_layers_of(site: str, model: HookedMultimodalTransformer) -> int:
    """How many layers the stack of a site has.

    Raises:
        ValueError: a tower's site, for a model without one.
    """
    if not site.startswith("vision."):
        return model.cfg.n_layers
    if model.cfg.vision is None:
        raise ValueError(f"site {site!r}: this model has no vision tower")
    return model.cfg.vision.n_layers


@dataclass(frozen=True, eq=False, init=False)
class Intervention:
    """`hook`, applied at `site` of every one of `layers`, at `positions`.

    Args:
        site: a short name, see `hook_name`; with units, only these are edited: "z[3]" is head 3,
            "post[0-99]" a hundred neurons (see `split_site`). The function sees all units.
        layers: any set of layers; None for a site without layers.
        positions: any positions (queries, for scores and patterns); None for all. They count along
            the activation: for the vision tower, its own patches.
        hook: a function of `mmlens.hooks` or your own `f(slice, hook)`. It sees only the slice at
            `positions`, in their order; it returns what takes the slice's place, or None to leave
            it (an edit in place counts). With a parameter `positions` it is told them.

    Raises:
        ValueError: no such site, layers missing or too many, negative positions.
        TypeError: positions that are no integers, such as a mask.

    Example:
        >>> early = Intervention("mlp_out", range(4), inputs.span("constraint"), zero())
        >>> model.run_with_hooks(inputs, fwd_hooks=early.fwd_hooks())
    """

    site: str
    """Without units."""
    units: tuple[int, ...] | None
    """Heads, neurons or dimensions, ascending; None for all."""
    layers: tuple[int, ...] | None
    """Ascending."""
    positions: Int[Tensor, " n"] | None
    """On the CPU, each once."""
    hook: HookFunction

    def __init__(
        self,
        site: str,
        layers: Iterable[int] | int | None,
        positions: Tensor | Sequence[int] | int | None,
        hook: HookFunction,
    ) -> None:
        layers = [layers] if isinstance(layers, int) else layers
        # A frozen dataclass can be filled no other way.
        name, units = split_site(site)
        object.__setattr__(self, "site", name)
        object.__setattr__(self, "units", units)
        object.__setattr__(self, "layers", None if layers is None else tuple(sorted(set(layers))))
        object.__setattr__(self, "positions", as_positions(positions))
        object.__setattr__(self, "hook", hook)
        # A wrong site or a missing layer is an error here, not in the run.
        hook_name(name, None if layers is None else 0)

    def hook_names(self) -> list[str]:
        """The hook points it acts on."""
        return hook_names(self.site, self.layers)

    def fwd_hooks(self) -> list[tuple[str, HookFunction]]:
        """`(name, function)` pairs for `run_with_hooks`; concatenate those of several."""
        return [(name, self.edit) for name in self.hook_names()]

    @cached_property
    def first_position(self) -> int | None:
        """The first position it touches; 0 where it touches all, None where it touches none."""
        if self.positions is None:
            return 0
        return min(self.positions.tolist(), default=None)

    @cached_property
    def _last_position(self) -> int:
        return -1 if self.positions is None else max(self.positions.tolist(), default=-1)

    @cached_property
    def _stretch(self) -> tuple[int, int] | None:
        return None if self.positions is None else stretch(self.positions)

    @cached_property
    def _options(self) -> dict[str, Any]:
        return {"positions": self.positions} if takes_positions(self.hook) else {}

    def edit(self, activation: Tensor, hook: HookPoint, first: int = 0) -> Tensor:
        """The activation with the declared slice edited; its positions count from `first`.

        Raises:
            IndexError: positions or units that the activation does not have.
            ValueError: the function returned another shape than it was given.
        """
        if self.positions is None:
            return self._edit_slice(activation, hook)
        axis = position_axis(str(hook.name))
        if self._last_position >= first + activation.shape[axis]:
            raise IndexError(
                f"{hook.name} has positions 0 ... {first + activation.shape[axis] - 1}; "
                f"there is no {self._last_position}"
            )
        if self.first_position is None:
            return activation
        if self._stretch is not None:
            begin, n = self._stretch[0] - first, self._stretch[1]
            # Copies: nothing may reach what others hold of this activation.
            edited = self._edit_slice(activation.narrow(axis, begin, n).clone(), hook)
            result = activation.clone()
            result.narrow(axis, begin, n).copy_(edited)
            return result
        index = to_device(self.positions - first, activation.device)
        edited = self._edit_slice(activation.index_select(axis, index), hook)
        return activation.index_copy(axis, index, edited)

    def _edit_slice(self, slice: Tensor, hook: HookPoint) -> Tensor:
        # An edit in place must not reach the other units.
        given = slice if self.units is None else slice.clone()
        edited = self.hook(given, hook=hook, **self._options)
        if edited is None:
            edited = given
        if edited.shape != slice.shape:
            raise ValueError(
                f"{hook.name}: the hook function was given {tuple(slice.shape)} and returned "
                f"{tuple(edited.shape)}"
            )
        if self.units is None:
            return edited.to(slice)
        axis = 3 - position_axis(str(hook.name))
        if self.units[-1] >= slice.shape[axis]:
            raise IndexError(
                f"{hook.name} has units 0 ... {slice.shape[axis] - 1}; there is no {self.units[-1]}"
            )
        index = torch.tensor(self.units, device=slice.device)
        return slice.index_copy(axis, index, edited.to(slice).index_select(axis, index))


def as_positions(
    positions: Tensor | Sequence[int] | int | None,
) -> Int[Tensor, " n"] | None:
    """Positions as a LongTensor on the CPU, each once, in the order given; None stays None.

    Raises:
        ValueError: negative positions.
        TypeError: no integers.
    """
    if positions is None:
        return None
    given = torch.as_tensor(positions)
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"positions are integers, not {given.dtype}; for a mask, mask.nonzero()")
    each = list(dict.fromkeys(given.flatten().tolist()))
    if min(each, default=0) < 0:
        raise ValueError(f"positions count from 0; got {each}")
    return torch.tensor(each, dtype=torch.long)
