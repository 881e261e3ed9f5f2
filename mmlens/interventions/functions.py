"""Generic hook functions: each call makes an `f(activation, hook)` to use with `run_with_hooks`.

    model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.hook_mlp_out", zero())])
    Intervention("mlp_out", layers=[2, 3], positions=inputs.span("constraint"), hook=zero())

Alone, a function edits the whole activation; inside an `Intervention` only the slice that was
declared. A function that depends on where it is applied has a parameter `positions`: either way it
is told the positions of the text that its activation holds (a LongTensor), or None for all of them.
During generation with a cache these are the new ones. Write your own in the same way.

What is masked in `attn_scores` (-inf: the future, padding) stays masked, whatever is scaled, added
or clamped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mmlens.interventions.hook_function import (
    Activation,
    HookFunction,
    batched,
    generator_for,
    keep_masked,
)
from mmlens.interventions.of_runs import freeze, mean, resample, restore, transplant
from mmlens.model.components.norm import float32_or_wider
from mmlens.model.hook_points import HookPoint
from mmlens.model.run_positions import Positions, current_pass
from mmlens.utils.tensors import flat_positions, to_device

__all__ = [
    "HookFunction",
    "add",
    "batched",
    "clamp",
    "clamp_along",
    "freeze",
    "knockout",
    "mean",
    "noise",
    "project_out",
    "replace",
    "resample",
    "restore",
    "scale",
    "transplant",
    "zero",
]


KEYS_AT_ONCE = 64
"""Whose noise is drawn together."""


def replace(value: Tensor | float) -> HookFunction:
    """Put a value in the activation's place; anything that broadcasts to its shape."""

    def replaced(activation: Activation, hook: HookPoint) -> Activation:
        return like(activation, value).expand_as(activation)

    return replaced


def add(value: Tensor | float) -> HookFunction:
    """Add a value (a steering vector, say) that broadcasts to the activation's shape."""

    def added(activation: Activation, hook: HookPoint) -> Activation:
        return activation + like(activation, value)

    return added


def like(activation: Activation, value: Tensor | float) -> Float[Tensor, "*value"]:
    """Return a value in the activation's dtype, where it is; a number is rounded once, to that."""
    given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    return given.to(activation.dtype).to(activation.device)


def scale(factor: float) -> HookFunction:
    """Multiply the activation by a number."""

    def scaled(activation: Activation, hook: HookPoint) -> Activation:
        return keep_masked(activation, activation * factor, hook)

    return scaled


def clamp(low: float, high: float) -> HookFunction:
    """Limit the activation to the range from `low` to `high`; `inf` leaves a side open.

    Raises:
        ValueError: `low` is above `high`, or one of them is NaN.

    Example:
        >>> relu = clamp(0.0, math.inf)
    """
    if not low <= high:
        raise ValueError(f"low={low} and high={high}; low must be at most high")

    def clamped(activation: Activation, hook: HookPoint) -> Activation:
        return keep_masked(activation, activation.clamp(low, high), hook)

    return clamped


def zero() -> HookFunction:
    """Set the activation to zero (zero ablation); for `attn_scores`, attend evenly."""

    def zeroed(activation: Activation, hook: HookPoint) -> Activation:
        return keep_masked(activation, torch.zeros_like(activation), hook)

    return zeroed


def noise(std: float, seed: int = 0) -> HookFunction:
    """Add Gaussian noise of standard deviation `std`, the same in every run with this `seed`.

    Each position's noise follows from the seed, the hook's name and the position alone: it does not
    depend on which other positions or hooks there are, nor on where a branch starts.
    """

    def noised(
        activation: Activation, hook: HookPoint, positions: Positions | None = None
    ) -> Activation:
        site, axis = hook.site, hook.site.position_axis
        where = range(activation.shape[axis]) if positions is None else positions.tolist()
        if not where:
            return activation
        *shape, width = activation.select(axis, 0).shape
        grows = site.masked is not None and site.stack == "decoder"
        drawn = []
        for position in where:
            # How many keys of a text come later depends on the run, so those have draws of theirs.
            n = min(width, position + 1) if grows else width
            values = torch.randn((*shape, n), generator=generator_for(seed, hook.name, position))
            drawn.append(pad(values, (0, width - n)))
        added = torch.stack(drawn, dim=axis).to(activation)
        if grows:
            added = added + later_noise(activation, hook, where, seed).to(added)
        return activation + std * added

    return noised


def later_noise(
    scores: Activation, hook: HookPoint, queries: Sequence[int], seed: int
) -> Float[Tensor, "*rows query key"]:
    """Return the noise for keys that come after a query, which attends to them all the same.

    Where it does not, there is none: what is masked stays so.
    """
    rows, n_keys, masked = scores.shape[:-2], scores.shape[-1], hook.site.masked
    key = torch.arange(n_keys, device=scores.device)
    query = torch.tensor(queries, device=scores.device)[:, None]
    seen = (scores != masked) & (key > query)
    ends = torch.where(seen.flatten(0, -3).any(dim=0), key + 1, 0).amax(dim=-1).tolist()
    found = torch.zeros(scores.shape)
    for row, (position, end) in enumerate(zip(queries, ends, strict=True)):
        # Drawn in parts, of which each is the same whatever comes after it.
        for begin in range((position + 1) // KEYS_AT_ONCE * KEYS_AT_ONCE, end, KEYS_AT_ONCE):
            chance = generator_for(seed, hook.name, position, begin)
            values = torch.randn((*rows, KEYS_AT_ONCE), generator=chance)
            found[..., row, begin:][..., :KEYS_AT_ONCE] = values[..., : n_keys - begin]
    return found.to(scores).masked_fill(~seen, 0.0)


def knockout(sources: Positions | Sequence[int] | int) -> HookFunction:
    """Keep queries from attending to the keys at `sources` (attention knockout, Geva et al. 2023).

    For `attn_scores`, before the softmax: the others' weights grow to one. For `pattern`, after it:
    they stay as they are.

    A query that is left with no key attends to nothing: its pattern is zero. Keys are positions of
    the whole text; one that has not been generated yet is cut off when it comes.

    Raises:
        ValueError: another kind of activation, or keys that are not there.

    Example:
        >>> cut = Intervention("attn_scores", range(10), inputs.span("last"),
        ...                    knockout(inputs.span("image")))
    """
    keys = flat_positions(sources)

    def knocked_out(activation: Activation, hook: HookPoint) -> Activation:
        if hook.site.masked is None:
            raise ValueError(f"knockout is for attn_scores and pattern, not for {hook.name}")
        n_keys = activation.shape[-1]
        end = max(n_keys, current_pass().total)  # keys that come later are knocked out later
        if len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < end:
            raise ValueError(f"{hook.name}: keys {keys.tolist()} are not among 0 ... {end - 1}")
        here = to_device(keys[keys < n_keys], activation.device)
        return activation.index_fill(-1, here, hook.site.masked)

    return knocked_out


def project_out(direction: Float[Tensor, "*direction width"]) -> HookFunction:
    """Take out what an activation has along a direction, or in the space that several span.

    Args:
        direction: of the activation's last axis [width], or several [direction, width]; of any
            length.

    Raises:
        ValueError: a direction of zeros, or of another width than the activation.

    Example:
        >>> refusal = Intervention("resid_post", range(30), None, project_out(direction))
    """
    basis = orthonormal(direction)

    def projected(activation: Activation, hook: HookPoint) -> Activation:
        x, axes = float32_or_wider(activation), along(basis, activation, hook)
        return keep_masked(activation, (x - (x @ axes.T) @ axes).to(activation), hook)

    return projected


def clamp_along(direction: Float[Tensor, " width"], value: float) -> HookFunction:
    """Set what an activation has along a direction to a value; the rest stays.

    Args:
        direction: of the activation's last axis; of any length.
        value: the activation's product with the direction of length one, after the edit.

    Raises:
        ValueError: a direction of zeros, or of another width than the activation.

    Example:
        >>> Intervention("resid_post", 12, "generated", clamp_along(direction, 4.0))
    """
    basis = orthonormal(direction)

    def clamped_along(activation: Activation, hook: HookPoint) -> Activation:
        x, axes = float32_or_wider(activation), along(basis, activation, hook)
        return keep_masked(activation, (x + (value - x @ axes.T) @ axes).to(activation), hook)

    return clamped_along


def orthonormal(direction: Tensor) -> Float[Tensor, "direction width"]:
    """Return directions of length one, at right angles, that span the same space; in float64."""
    rows = torch.atleast_2d(direction).double()
    usable = rows.ndim == 2 and bool(rows.isfinite().all())
    if not usable or int(torch.linalg.matrix_rank(rows)) < len(rows):
        raise ValueError(
            f"directions {tuple(direction.shape)} must be [width], or [direction, width] of which "
            "none is zero, infinite or a sum of the others"
        )
    if len(rows) == 1:  # keeps the sign
        return rows / rows.norm()
    return torch.linalg.qr(rows.T)[0].T


def along(basis: Tensor, activation: Tensor, hook: HookPoint) -> Float[Tensor, "direction width"]:
    """Return the directions, where and in the precision in which the activation is edited."""
    if basis.shape[-1] != activation.shape[-1]:
        raise ValueError(
            f"{hook.name} has {activation.shape[-1]} along its last axis, the direction "
            f"{basis.shape[-1]}"
        )
    return basis.to(float32_or_wider(activation))
