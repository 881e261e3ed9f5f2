"""The root module: it finds every hook point by name and runs the model with functions on them.

`HookedRootModule` is TransformerLens's own, and behaves as its users know it. What is added:

- a hook name that does not exist is an error that says what it is called here,
- nothing that interrupts a run, or the adding of hooks, leaves a hook (see
  `mmlens.utils.temporary`),
- a model is used by one thread at a time (see `mmlens.model.run_lock`),
- activations of sites that need to be asked for (`Site.needs`: each head's own contribution to the
  residual stream, and each head's own copy of its input, `[batch, pos, head, d_model]`) are cached
  only by name, or after `set_use_attn_result(True)` and the like, because each is as large as all
  other activations together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch
import transformer_lens
from torch import Tensor
from transformer_lens import ActivationCache as TransformerLensCache
from transformer_lens import FactoredMatrix
from transformer_lens.hook_points import HookPoint as TransformerLensHookPoint
from transformer_lens.utilities import Slice, composition_scores, get_act_name

from mmlens.model.hook_aliases import our_name, unknown_hook_name
from mmlens.model.hook_points import HookPoint, reading
from mmlens.model.run_lock import RunLock
from mmlens.model.sites import SiteTable, Stack
from mmlens.utils.temporary import Changes, temporary

__all__ = [
    "FactoredMatrix",
    "HookedRootModule",
    "Slice",
    "TransformerLensCache",
    "composition_scores",
    "exclusively",
    "get_act_name",
]

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M")

NamesFilter = Callable[[str], bool] | Sequence[str] | str | None


@runtime_checkable
class Intervening(Protocol):
    """What to change in a run, and where, as `mmlens.Intervention` says it."""

    def fwd_hooks(self) -> Sequence[tuple[str, Callable]]:
        """Return the hook points to change, each with a hook function."""


def hooks_of(interventions: Sequence[Intervening]) -> list[tuple[str, Callable]]:
    """Return the hook points that interventions change, each with a hook function.

    Raises:
        TypeError: something else than a list of interventions.
    """
    given = interventions if isinstance(interventions, Sequence) else [interventions]
    for each in given:
        if not isinstance(each, Intervening) or given is not interventions:
            raise TypeError(
                f"interventions= takes a list of mmlens.Intervention, not {type(each).__name__}"
                f"{' alone' * (given is not interventions)}; pairs of a hook name and a function "
                "go to fwd_hooks="
            )
    return [pair for each in given for pair in each.fwd_hooks()]


def exclusively(function: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """Run with the model to itself: a function of a model, or a method of what has `.model`."""

    @wraps(function)
    def alone(first: M, *args: P.args, **kwargs: P.kwargs) -> T:
        model = first if isinstance(first, HookedRootModule) else cast(Any, first).model
        with model.run_lock.held(is_run=True):
            return function(first, *args, **kwargs)

    return alone


class HookedRootModule(transformer_lens.HookedRootModule):
    """TransformerLens's root module, with names that are checked, for any number of threads.

    Example:
        >>> model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.hook_mlp_out", zero())])
    """

    SITES: SiteTable
    stack: Stack = "decoder"
    """Whose rows and positions a run has; other stacks have images and positions of their own."""
    hook_dict: dict[str, HookPoint]
    cfg: Any

    def __init__(self, *args: Any) -> None:
        self.run_lock = RunLock()  # before TransformerLens says that no context is open
        super().__init__(*args)

    def setup(self) -> None:
        """Find every hook point by its name; see TransformerLens. To be called after changes.

        TransformerLens's own hook points, such as those of a sparse autoencoder, or one that was
        put back after it, become hook points of ours.
        """
        for module in self.modules():
            if type(module) is TransformerLensHookPoint:
                module.__class__ = HookPoint
        super().setup()
        for name, point in self.hook_dict.items():
            point.site, _ = self.SITES.of(name)
        for part in self.modules():  # a vision tower has the hook points of its model
            if isinstance(part, HookedRootModule):
                part.run_lock = self.run_lock

    @property
    def context_level(self) -> int:
        """How many `hooks()` contexts are open, on the model or on its vision tower."""
        return max(self.run_lock.levels, default=0)

    @context_level.setter
    def context_level(self, level: int) -> None:
        self.run_lock.levels = set(range(1, level + 1))

    @temporary
    def exclusive(self) -> Changes[None]:
        """Keep other threads from running or editing the model, for the time of a `with` block.

        Every run takes its turn by itself. This is for several that must see the same model. Who
        has waited half a minute for such a block, in which nothing runs, gets a `ModelInUse` error.

        Example:
            >>> with model.exclusive():
            ...     before, after = model(one), model(other)
        """
        yield self.run_lock.held(is_run=False)

    @temporary
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        bwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        interventions: Sequence[Intervening] = (),
    ) -> Changes[Any]:
        """Add hooks for the time of a `with` block; arguments as in TransformerLens.

        `interventions` are a list of `mmlens.Intervention`, which act before `fwd_hooks` do. Other
        threads that run the model wait until the end of the block, as for `exclusive`.

        Example:
            >>> with model.hooks(fwd_hooks=[("blocks.3.hook_mlp_out", zero())]):
            ...     model.generate(inputs)
        """
        fwd_hooks = [*hooks_of(interventions), *fwd_hooks]
        yield self.exclusive()
        level, stay = self.context_level + 1, False
        yield partial(self.run_lock.levels.discard, level)
        self.run_lock.levels.add(level)

        def remove() -> None:
            if not stay:
                # Not `reset_hooks`, which waits for its turn: a generator may end in any thread.
                if clear_contexts:
                    self.clear_contexts()
                self.remove_all_hook_fns(level=level)
                self.is_caching = False

        yield remove
        for hooks, direction in ((fwd_hooks, "fwd"), (bwd_hooks, "bwd")):
            for name, hook in hooks:
                self._enable_hook(name=name, hook=hook, dir=direction)
        stay = not reset_hooks_end
        return self

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[tuple[str | Callable, Callable]] = (),
        interventions: Sequence[Intervening] = (),
        **options: Any,
    ) -> Any:
        """Run the model with hook functions; arguments as in TransformerLens.

        Args:
            interventions: what to change, and where: a list of `mmlens.Intervention`, which act one
                after the other, and before `fwd_hooks`.

        Raises:
            KeyError: a name that is not a hook point.
            ValueError: an intervention at the positions that `generate` adds, for nothing is
                generated here; what `forward` raises.

        Example:
            >>> early = Intervention("mlp_out", range(4), inputs.span("constraint"), zero())
            >>> logits = model.run_with_hooks(inputs, interventions=[early])
        """
        hooks = [*hooks_of(interventions), *fwd_hooks]
        return super().run_with_hooks(*model_args, fwd_hooks=hooks, **options)

    def run_with_cache(
        self, *model_args: Any, interventions: Sequence[Intervening] = (), **options: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the model and keep activations; arguments as in TransformerLens.

        The cache holds what `interventions` made of the activations; see `run_with_hooks`.

        Raises:
            ValueError: `incl_bwd` where gradients are off.
        """
        if options.get("incl_bwd") and not torch.is_grad_enabled():
            raise ValueError(
                "incl_bwd=True needs gradients, and they are off here: torch.set_grad_enabled(True)"
            )
        with self.hooks(interventions=interventions):
            return super().run_with_cache(*model_args, **options)

    @exclusively
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return super().__call__(*args, **kwargs)

    @exclusively
    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove the hooks that were added, but for permanent ones; see TransformerLens."""
        super().reset_hooks(*args, **kwargs)

    def check_hook_name(self, name: str) -> str:
        """Return the hook point that is meant: `name`, or what TransformerLens 4 calls so."""
        ours = our_name(name, self.hook_dict)
        if ours is None:
            raise KeyError(unknown_hook_name(name, self.hook_dict))
        return ours

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        super()._enable_hook_with_name(self.check_hook_name(name), hook, dir)

    @exclusively
    def add_hook(self, name: str | Callable[[str], bool], hook: Any, *args: Any, **kw: Any) -> None:
        """Add a hook that stays until `reset_hooks`; see TransformerLens."""
        chosen = self.check_hook_name(name) if isinstance(name, str) else name
        super().add_hook(chosen, hook, *args, **kw)

    def selected_hook_names(self, names_filter: NamesFilter) -> list[str]:
        """The hook points that `names_filter` selects; None: those that need not be asked for."""
        if names_filter is None:
            return [name for name in self.hook_dict if not self._waits_for_demand(name)]
        if callable(names_filter):
            return [name for name in self.hook_dict if names_filter(name)]
        wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        return [self.check_hook_name(name) for name in wanted]

    def _waits_for_demand(self, name: str) -> bool:
        """Whether a hook point is cached only where it is named: always, in a model's tower."""
        site = self.hook_dict[name].site
        return bool(site.needs) and (
            site.stack != self.stack or not getattr(self.cfg, str(site.needs))
        )

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether `run_with_cache` keeps `attn.hook_result` without being asked by name.

        Hooks on it work either way.
        """
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether `run_with_cache` keeps `hook_q_input`, `hook_k_input`, `hook_v_input` unasked."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether `run_with_cache` keeps `hook_attn_in` unasked."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether `run_with_cache` keeps `hook_mlp_in` unasked."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list, list]:
        """Hooks that store activations, and the dict they store them in; see TransformerLens.

        `pos_slice` applies to the decoder's activations; those of the vision tower and the
        projector have positions of their own and are stored whole.
        """
        stored: dict[str, Tensor] = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)

        def save(activation: Tensor, hook: HookPoint, suffix: str) -> None:
            value = activation.detach().to(device)
            if hook.site.stack == self.stack:
                value = positions.apply(value, dim=hook.site.position_axis - value.ndim)
                if remove_batch_dim and value.shape[0] == 1:
                    value = value[0]
            stored[f"{hook.name}{suffix}"] = value

        names = self.selected_hook_names(names_filter)
        forward = [(name, reading(partial(save, suffix=""))) for name in names]
        backward = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
        return stored, forward, backward

    @exclusively
    def add_caching_hooks(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Register `get_caching_hooks` until `reset_hooks`; return the dict they store into."""
        stored, forward, backward = self.get_caching_hooks(*args, **options)
        for hooks, direction in ((forward, "fwd"), (backward, "bwd")):
            for name, save in hooks:
                self.add_hook(name, save, dir=direction)
        return stored

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of that name, ours or TransformerLens 4's; None where there is none."""
        return self.hook_dict.get(our_name(hook_name, self.hook_dict) or "")

    def mps(self) -> HookedRootModule:
        """Move to the GPU of a Mac: `to("mps")`."""
        return self.to("mps")
