"""Hook points, and what a hook function there gets.

`HookPoint` is an identity module that stands wherever an activation can be read or edited. It is
TransformerLens's own, and behaves as its users know it. What is added is little:

- a hook function is given a copy of its own, so that an edit in place does what returning an edited
  copy does, and it must return the shape and the dtype that it was given,
- functions that are marked as `reading`, as those that fill a cache are, change no bit of a run,
- a hook function with a parameter `positions` is told which positions it sees,
- nothing that interrupts the adding of a hook leaves half of it.

Only this module and `mmlens.model.hooked_root_module` import TransformerLens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint as TransformerLensHookPoint

from mmlens.model.run_positions import told_positions
from mmlens.model.sites import Site, is_hook_place


def reading(hook: Callable) -> Callable:
    """Return a hook function that is marked as one that only reads.

    It must edit nothing, and what it returns is not used. Where only such functions listen,
    components give what their fused kernels give: outputs are those of a run without hooks, bit by
    bit.

    Example:
        >>> see = reading(lambda pattern, hook: print(hook.name, pattern.amax()))
        >>> model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.attn.hook_pattern", see)])
    """
    marked: Any = partial(hook)
    marked.only_reads = True
    return marked


class HookPoint(TransformerLensHookPoint):
    """TransformerLens's hook point, whose hook functions cannot do harm by accident.

    A function is given a copy of its own. So an edit in place works on any activation (also on a
    view, or on what autograd or another hook point holds), and reaches only what is computed from
    here on: no cache, no weight, no other activation. A function with a parameter `positions` gets
    those of the text that its activation holds, as a LongTensor, or None where the activation holds
    the whole text.

    Example:
        >>> model.blocks[3].hook_mlp_out.add_hook(lambda mlp_out, hook: mlp_out.mul_(2))
    """

    site: Site = Site("", "batch pos unit")
    """What the activation is; a model says it of its hook points."""
    fwd_hooks: list[Any]
    bwd_hooks: list[Any]
    ctx: dict[Any, Any]

    def add_hook(self, hook: Any, dir: str = "fwd", *args: Any, **options: Any) -> Any:
        """Add a hook function; see TransformerLens.

        A run then raises a TypeError where it returns something else than a tensor or None, and a
        ValueError where it returns a tensor of another shape or dtype than it was given.

        TransformerLens registers a hook with torch before it notes it, and cannot remove what it
        has not noted; so whatever interrupts this, the hook is there and noted, or not there.
        """
        guarded = self.guarded(told_positions(hook)) if dir == "fwd" else hook
        before = {*self._forward_hooks, *self._backward_hooks}
        try:
            handle = super().add_hook(guarded, dir, *args, **options)
        except BaseException:
            try:
                self._remove_all_but(before)
            finally:
                self._remove_all_but(before)
            raise
        if handle is not None:
            handle.user_hook = hook
        return handle

    def remove_hooks(self, dir: str = "fwd", *args: Any, **options: Any) -> None:
        """Remove hooks; see TransformerLens, which writes two lists where there are none, too."""
        if self.fwd_hooks or self.bwd_hooks or dir not in ("fwd", "bwd", "both"):
            super().remove_hooks(dir, *args, **options)

    def clear_context(self) -> None:
        """Forget what hooks have kept in `ctx`."""
        self.ctx = {}  # TransformerLens deletes it first

    def _remove_all_but(self, before: set[int]) -> None:
        """Remove what has been registered since; by torch's numbers."""
        for hooks in (self._forward_hooks, self._backward_hooks):
            for number in hooks.keys() - before:
                hooks.pop(number, None)
        self.fwd_hooks = [each for each in self.fwd_hooks if each.hook.id in before]
        self.bwd_hooks = [each for each in self.bwd_hooks if each.hook.id in before]

    def guarded(self, function: Any) -> Callable:
        """Return a hook function that gives `function` its copy, and checks what it returns."""
        only_reads = getattr(function, "only_reads", False)

        @wraps(function)
        def call(activation: Tensor, hook: Any, **options: Any) -> Tensor | None:
            if only_reads:
                function(activation, hook=hook, **options)
                return None
            own = activation.clone()
            returned = function(own, hook=hook, **options)
            if returned is None:
                return own
            check_replacement(own, returned, self.name, self.site.rows == "1")
            return returned

        return call


def check_replacement(
    given: Tensor, returned: Any, name: str | None, one_for_all: bool = False
) -> None:
    """Check that what a hook function returned can take the place of what it was given.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape; with `one_for_all`, but for the number of rows. Or it has
            another dtype, which would change the precision of what is computed from here on.
    """
    wrong = f"{name}: the hook function was given "
    expected = "; it must return a tensor of the same shape and dtype, or None to change nothing"
    shape = tuple(given.shape)
    if not isinstance(returned, Tensor):
        raise TypeError(f"{wrong}{shape} and returned {type(returned).__name__}{expected}")
    shapes = [x.shape[1:] if one_for_all else x.shape for x in (given, returned)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{wrong}{shape} and returned {tuple(returned.shape)}{expected}")
    if given.dtype != returned.dtype:
        raise ValueError(f"{wrong}{given.dtype} and returned {returned.dtype}{expected}")


def is_hook_point(module: nn.Module) -> bool:
    """Return whether a module gives what it is given, unless a hook is on it."""
    return type(module) is HookPoint


def has_hooks(module: nn.Module) -> bool:
    """Return whether any hook is on this module, of ours or of torch."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_listeners(*hook_points: nn.Module) -> bool:
    """Return whether anything reads or edits the activations at `hook_points`.

    That is a hook of any kind (a cache is one), or another module in a hook point's place, such as
    a sparse autoencoder. Components take a fused path where nothing does.
    """
    return any(not is_hook_point(point) or has_hooks(point) for point in hook_points)


def left_alone(hook_point: nn.Module, given: Tensor, returned: Tensor) -> bool:
    """Return whether a hook point gave back the very activation, edited by nothing.

    Functions that may edit are given a copy, which then takes the activation's place. Another
    module, and hooks of torch itself, may have edited it where it is.
    """
    if returned is not given or type(hook_point) is not HookPoint:
        return False
    of_torch = len(hook_point._forward_hooks) - len(hook_point.fwd_hooks)
    return not of_torch and not hook_point._forward_pre_hooks


def listens(model: nn.Module) -> bool:
    """Return whether a hook is on the model or a part of it, or a hook point was replaced."""
    return any(
        has_hooks(module) or (is_hook_place(name) and not is_hook_point(module))
        for name, module in model.named_modules()
    )
