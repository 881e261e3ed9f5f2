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

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mmlens.model.activation_cache import ActivationCache
from mmlens.model.hook_points import HookPoint
from mmlens.model.run_positions import Positions, current_pass
from mmlens.model.sites import Site
from mmlens.utils.tensors import to_device

Activation = Float[Tensor, "*shape"]


@runtime_checkable
class HookFunction(Protocol):
    """What a hook point calls: returns the activation's replacement, or None to leave it."""

    def __call__(self, activation: Any, /, hook: Any) -> Any:
        """Called as `f(activation, hook=hook_point)`."""


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


def replace(value: Tensor | float) -> HookFunction:
    """Put a value in the activation's place; anything that broadcasts to its shape."""

    def replaced(activation: Activation, hook: HookPoint) -> Activation:
        return torch.as_tensor(value).to(activation).expand_as(activation)

    return replaced


def add(value: Tensor | float) -> HookFunction:
    """Add a value (a steering vector, say) that broadcasts to the activation's shape."""

    def added(activation: Activation, hook: HookPoint) -> Activation:
        return activation + torch.as_tensor(value).to(activation)

    return added


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
        drawn = []
        for position in where:
            # Of a text's scores, those for later keys are masked, and how many there are by now
            # depends on the run.
            grows = site.masked is not None and site.stack == "decoder"
            n = min(width, position + 1) if grows else width
            values = torch.randn((*shape, n), generator=generator_for(seed, hook.name, position))
            drawn.append(pad(values, (0, width - n)))
        return activation + std * torch.stack(drawn, dim=axis).to(activation)

    return noised


def generator_for(*key: object) -> torch.Generator:
    """A generator whose seed is a hash of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def knockout(sources: Positions | Sequence[int] | int) -> HookFunction:
    """Keep queries from looking at the keys at `sources` (attention knockout, Geva et al. 2023).

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
    keys = torch.as_tensor(sources, dtype=torch.long).flatten()

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


def keep_masked(before: Tensor, after: Tensor, hook: HookPoint) -> Tensor:
    """`after`, with -inf where attention scores were masked: 0 x -inf would be NaN."""
    if hook.site.masked != -torch.inf:
        return after
    return after.masked_fill(before.isneginf(), -torch.inf)


def stretch(positions: Positions) -> tuple[int, int] | None:
    """The first position and their number, where they follow one another; else None."""
    each = positions.tolist()
    if not each or each != list(range(each[0], each[0] + len(each))):
        return None
    return each[0], len(each)


def at_positions(
    activation: Activation, axis: int, positions: Positions
) -> Float[Tensor, "*selected"]:
    """The activation at some positions; a view of it where they follow one another."""
    found = stretch(positions)  # an index would have to be moved to the GPU, for every cell
    if found is not None and sum(found) <= activation.shape[axis]:
        return activation.narrow(axis, *found)
    return activation.index_select(axis, to_device(positions, activation.device))
