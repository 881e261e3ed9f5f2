"""Generic hook functions: each call makes an `f(activation, hook)` to use with `run_with_hooks`.

    model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.hook_mlp_out", zero())])
    Intervention("mlp_out", layers=[2, 3], positions=inputs.span("constraint"), hook=zero())

Alone, a function edits the whole activation; inside an `Intervention` only the slice that was
declared. A function that depends on where it is applied has a parameter `positions`: it is told the
positions of its slice (a LongTensor), or None for all of them. Write your own in the same way.

What is masked in `attn_scores` (-inf: the future, padding) stays masked, whatever is scaled or
added.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.hook_points import ActivationCache, HookPoint
from mmlens.transfer import to_device

Activation = Float[Tensor, "*shape"]
Positions = Int[Tensor, " n"]


@runtime_checkable
class HookFunction(Protocol):
    """What a hook point calls: returns the activation's replacement, or None to leave it."""

    def __call__(self, activation: Any, /, hook: Any) -> Any:
        """Called as `f(activation, hook=hook_point)`."""


def position_axis(hook_name: str) -> int:
    """Which axis of an activation counts positions: the queries, for scores and patterns."""
    return 2 if hook_name.endswith(("hook_attn_scores", "hook_pattern")) else 1


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
        source = cache[str(hook.name)]
        if source.ndim == activation.ndim and positions is not None:
            source = at_positions(source, position_axis(str(hook.name)), positions)
        if source.ndim != activation.ndim or source.shape[1:] != activation.shape[1:]:
            raise ValueError(
                f"{hook.name}: cannot restore {tuple(source.shape)} in {tuple(activation.shape)}; "
                "the cache must be of a run with the same positions, and keep its batch dimension"
            )
        return source.to(activation).expand_as(activation)

    return restored


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
        axis = position_axis(str(hook.name))
        where = range(activation.shape[axis]) if positions is None else positions.tolist()
        shape = activation.select(axis, 0).shape if where else ()
        drawn = [
            torch.randn(shape, generator=generator_for(seed, hook.name, position))
            for position in where
        ]
        if not drawn:
            return activation
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

    A query that is left with no key attends to nothing: its pattern is zero.

    Raises:
        ValueError: another kind of activation, or keys that are not there.

    Example:
        >>> cut = Intervention("attn_scores", range(10), inputs.span("last"),
        ...                    knockout(inputs.span("image")))
    """
    keys = torch.as_tensor(sources, dtype=torch.long).flatten()

    def knocked_out(activation: Activation, hook: HookPoint) -> Activation:
        name = str(hook.name)
        if not name.endswith(("hook_attn_scores", "hook_pattern")):
            raise ValueError(f"knockout is for attn_scores and pattern, not for {name}")
        n_keys = activation.shape[-1]
        if len(keys) and not 0 <= int(keys.min()) <= int(keys.max()) < n_keys:
            raise ValueError(f"{name}: keys {keys.tolist()} are not among 0 ... {n_keys - 1}")
        value = -torch.inf if name.endswith("hook_attn_scores") else 0.0
        return activation.index_fill(-1, to_device(keys, activation.device), value)

    return knocked_out


def keep_masked(before: Tensor, after: Tensor, hook: HookPoint) -> Tensor:
    """`after`, with -inf where attention scores were masked: 0 x -inf would be NaN."""
    if not str(hook.name).endswith("hook_attn_scores"):
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
    """The activation at some positions; a view of it where they follow one another.

    An index would have to be moved to the GPU, for every cell of a trace.
    """
    found = stretch(positions)
    if found is not None and sum(found) <= activation.shape[axis]:
        return activation.narrow(axis, *found)
    return activation.index_select(axis, to_device(positions, activation.device))


def takes_positions(function: Any) -> bool:
    """Whether a hook function wants to know the positions of its slice."""
    code = getattr(function, "__code__", None)
    if code is not None and not hasattr(function, "__wrapped__"):
        # The common case without `inspect`, which takes as long as an edit.
        return "positions" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return "positions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins have no signature
        return False
