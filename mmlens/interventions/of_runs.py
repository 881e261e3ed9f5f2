"""Hook functions that put activations of other runs in: of a recording, or of a cache.

A source is a `Recording` that holds the site (`model.record(inputs, sites=[...])`), what
`run_with_cache` returns, or any mapping from names of hook points to activations [row, pos, ...].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from mmlens.interventions.hook_function import (
    Activation,
    HookFunction,
    at_positions,
    generator_for,
)
from mmlens.model.activation_cache import ActivationCache
from mmlens.model.hook_points import HookPoint
from mmlens.model.run_positions import Positions, current_pass
from mmlens.model.sites import Site
from mmlens.utils.tensors import flat_positions

Source = Any
"""A `Recording`, an `ActivationCache` or another mapping from names of hook points."""


def restore(cache: ActivationCache | Mapping[str, Tensor]) -> HookFunction:
    """Copy the activation of another run in, at the same positions (activation patching).

    Args:
        cache: activations by hook name, of a run with the same positions; one row serves all.

    Raises:
        KeyError: the cache does not hold the hook's activation.
        ValueError: it holds it without a batch dimension, or of a run with other sizes.

    Example:
        >>> _, clean_cache = model.run_with_cache(clean)
        >>> model.run_with_hooks(corrupted, fwd_hooks=[("blocks.3.hook_mlp_out",
        ...                                             restore(clean_cache))])
    """

    def restored(
        activation: Activation, hook: HookPoint, positions: Positions | None = None
    ) -> Activation:
        name, source = str(hook.name), cache[str(hook.name)]
        axis = hook.site.position_axis
        if source.ndim == activation.ndim and positions is not None:
            there = positions[positions < source.shape[axis]]  # the shapes tell what is missing
            source = with_keys(at_positions(source, axis, there), activation, hook.site)
        if source.ndim != activation.ndim or source.shape[1:] != activation.shape[1:]:
            raise ValueError(
                f"{name}: cannot restore {tuple(source.shape)} in {tuple(activation.shape)}; "
                "the cache must be of a run with the same positions, and keep its batch dimension"
            )
        return source.to(activation).expand_as(activation)

    return restored


def with_keys(source: Tensor, activation: Tensor, site: Site) -> Tensor:
    """Return attention scores or a pattern of another pass with as many keys as `activation`.

    While a text grows, its passes differ in the keys that no earlier query attends to.
    """
    n_more = activation.shape[-1] - source.shape[-1]
    if site.masked is None or not n_more or current_pass().is_whole:
        return source
    return pad(source, (0, n_more), value=site.masked)


def freeze(recording: Source) -> HookFunction:
    """Keep what an activation was in a recorded run, at the same positions.

    In a branch of that recording, what was changed earlier then does not reach what is later
    through this component: `path_patch` freezes attention and MLPs between sender and receiver.

    Args:
        recording: a run of as many positions, which holds the site.

    Raises:
        KeyError: it does not hold the hook's activation.
        ValueError: it is a run with other sizes.

    Example:
        >>> recording = model.record(inputs, sites=[("mlp_out", range(10))])
        >>> Intervention("mlp_out", range(10), range(first, inputs.n_pos), freeze(recording))
    """
    return restore(held_by(recording))


def held_by(source: Source) -> Any:
    """Return the activations that a recording or a cache holds, by hook point."""
    return getattr(source, "cache", source)


def found_in(source: Source, hook: HookPoint) -> Tensor:
    """Return a source's activation [row, pos, ...]; a KeyError where it holds none."""
    try:
        found: Tensor = held_by(source)[str(hook.name)]
    except KeyError:
        raise KeyError(
            f"the run holds no {hook.name}: keep it with record(inputs, sites=[...]), or with "
            "names_filter of run_with_cache"
        ) from None
    return found


def real_positions(source: Source, found: Tensor, site: Site) -> Bool[Tensor, "row pos"]:
    """Return which positions of a source are no padding, where that is known."""
    shape = (len(found), found.shape[site.position_axis])
    inputs = getattr(source, "inputs", None)
    if inputs is None or site.stack != "decoder" or inputs.attention_mask.shape[1] != shape[1]:
        return torch.ones(shape, dtype=torch.bool, device=found.device)
    return inputs.attention_mask.to(found.device).expand(shape)


def check_maskless(function: str, hook: HookPoint) -> None:
    """Raise a ValueError for attention scores and patterns, whose keys depend on the position."""
    if hook.site.masked is not None:
        raise ValueError(
            f"{function} is not for {hook.name}: its keys belong to one prompt; knockout cuts "
            "attention, restore puts another run's pattern in"
        )


def mean(
    sources: Source | Sequence[Source], among: Positions | Sequence[int] | None = None
) -> HookFunction:
    """Put the mean activation of other runs in (mean ablation).

    The mean is over all rows and positions of all sources, padding left out where the inputs are
    known; each head, neuron or dimension keeps its own.

    Args:
        sources: recordings or caches of any prompts; one or several.
        among: which of their positions the mean is over; all by default.

    Raises:
        KeyError: a source does not hold the hook's activation.
        ValueError: attention scores or patterns, whose keys belong to one prompt; activations of
            another width; positions that are not there.

    Example:
        >>> others = model.record_many(prompts, sites=[("z", range(30))])
        >>> Intervention("z[3]", 12, inputs.span("last"), mean(others))
    """
    several = list(sources) if isinstance(sources, list | tuple) else [sources]
    known: dict[str, Tensor] = {}

    def of_hook(hook: HookPoint) -> Tensor:
        total, count = None, 0
        for source in several:
            found = found_in(source, hook)
            real = real_positions(source, found, hook.site)
            if among is not None:
                at = flat_positions(among).to(real.device)
                if not len(at) or not 0 <= int(at.min()) <= int(at.max()) < real.shape[1]:
                    raise ValueError(
                        f"{hook.name}: positions {at.tolist()} are not among 0 ... "
                        f"{real.shape[1] - 1}"
                    )
                chosen = torch.zeros_like(real)
                chosen[:, at] = True
                real = real & chosen
            rows = found.movedim(hook.site.position_axis, 1)[real].double()
            total = rows.sum(dim=0) if total is None else total + rows.sum(dim=0)
            count += len(rows)
        if total is None or not count:
            raise ValueError(f"{hook.name}: a mean of no runs, or of padding alone")
        return total / count

    def averaged(activation: Activation, hook: HookPoint) -> Activation:
        check_maskless("mean", hook)
        name = str(hook.name)
        if name not in known:
            known[name] = of_hook(hook)
        check_width(known[name].shape, activation, hook)
        return known[name].to(activation).expand_as(activation)

    return averaged


def check_width(shape: Sequence[int], activation: Tensor, hook: HookPoint) -> None:
    """Raise a ValueError unless a position of the activation has this shape."""
    axis = hook.site.position_axis
    own = (*activation.shape[1:axis], *activation.shape[axis + 1 :])
    if tuple(shape) != own:
        raise ValueError(
            f"{hook.name}: a position has {own} here, and {tuple(shape)} in the other run"
        )


def resample(
    sources: Source | Sequence[Source],
    seed: int = 0,
    *,
    among: Positions | Sequence[int] | None = None,
) -> HookFunction:
    """Put the activation of another prompt in, drawn at random (resample ablation).

    What is drawn is one row of one source for each hook point. It gives its activations at the same
    positions; or, with `among`, each position gets that of one of these, drawn anew (patches of
    other images, say). All of it follows from the seed, the hook's name and the position.

    Args:
        sources: recordings or caches; several rows, or several sources.
        seed: of the draws.
        among: positions that the activations are taken from; by default the same position, which
            every source must have.

    Raises:
        KeyError: a source does not hold the hook's activation.
        ValueError: attention scores or patterns; runs of other sizes; positions that are not there.

    Example:
        >>> others = model.record_many(prompts, sites=[("z", range(30))])
        >>> Intervention("z[3]", 12, inputs.span("last"), resample(others))
    """
    several = list(sources) if isinstance(sources, list | tuple) else [sources]

    def resampled(
        activation: Activation, hook: HookPoint, positions: Positions | None = None
    ) -> Activation:
        check_maskless("resample", hook)
        axis = hook.site.position_axis
        rows = [
            (found, row)
            for found in (found_in(each, hook) for each in several)
            for row in range(len(found))
        ]
        chance = generator_for(seed, hook.name)
        found, row = rows[int(torch.randint(len(rows), (), generator=chance))]
        n_here = activation.shape[axis]
        here = range(n_here) if positions is None else positions.tolist()
        source = found[row : row + 1]
        check_width((*source.shape[1:axis], *source.shape[axis + 1 :]), activation, hook)
        at = list(here) if among is None else drawn_from(among, here, (seed, hook.name))
        # Of every run, so that the draw does not decide whether this is an error.
        n_there = min(run.shape[axis] for run, _ in rows)
        if max(at, default=0) >= n_there:
            raise ValueError(
                f"{hook.name}: another run has positions 0 ... {n_there - 1}; there is no {max(at)}"
            )
        taken = at_positions(source, axis, torch.tensor(at, dtype=torch.long))
        return taken.to(activation).expand_as(activation)

    return resampled


def drawn_from(
    positions: Positions | Sequence[int], here: Sequence[int], key: tuple[object, ...]
) -> list[int]:
    """Return one of some positions for each of others, drawn by a key."""
    among = flat_positions(positions).tolist()
    draws = (torch.randint(len(among), (), generator=generator_for(*key, each)) for each in here)
    return [among[int(each)] for each in draws]


def transplant(
    recording: Source,
    site: str,
    layer: int | None,
    positions: Positions | Sequence[int] | int,
) -> HookFunction:
    """Put the activation of another layer, position or prompt in.

    So one looks at a hidden state with another prompt (Patchscopes, Ghandeharioun et al. 2024,
    arXiv 2401.06102; SelfIE, Chen et al. 2024), or feeds a later layer's state to an earlier one
    (back-patching, Biran et al. 2024).

    Args:
        recording: a recording of any prompt, which holds the site in that layer.
        site: where it is taken from, without units.
        layer: of that site; None where it has no layers.
        positions: where it is taken from: as many as are edited, in their order, or one for all.

    Raises:
        KeyError: the recording does not hold the site.
        ValueError: another number of positions than are edited; activations of another shape.

    Example:
        >>> source = model.record(inputs, sites=[("resid_post", 12)])
        >>> look = Intervention("resid_post", 2, patchscope.span("x"),
        ...                     transplant(source, "resid_post", 12, inputs.patch(3, 5)))
        >>> model.generate(patchscope, 8, interventions=[look])
    """
    at = flat_positions(positions)
    place = recording.model.SITES[site]
    source = at_positions(recording[site, layer], place.position_axis, at)

    def transplanted(activation: Activation, hook: HookPoint) -> Activation:
        axis = hook.site.position_axis
        check_maskless("transplant", hook)
        taken = source.movedim(place.position_axis, axis)
        n_here, width = activation.shape[axis], (*taken.shape[1:axis], *taken.shape[axis + 1 :])
        check_width(width, activation, hook)
        if len(at) not in (1, n_here) or len(taken) not in (1, len(activation)):
            raise ValueError(
                f"{hook.name}: {len(activation)} rows and {n_here} positions are edited, and "
                f"{len(taken)} rows and {len(at)} positions were taken from {site}; as many, or one"
            )
        return taken.to(activation).expand_as(activation)

    return transplanted
