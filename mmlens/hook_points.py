"""The hook base: the only module that imports TransformerLens.

`HookPoint` is an identity module that stands wherever an activation can be read or edited;
`HookedRootModule` finds every hook point below it by name and runs the model with functions on
them; `ActivationCache` is what `run_with_cache` returns. All three are TransformerLens's own, and
behave as its users know them. What is added here is little:

- a hook name that does not exist is an error that names its nearest neighbours,
- `attn.hook_result` (every head's own contribution, `[batch, pos, head, d_model]`) is cached only
  when it is asked for by name, because it is as large as all other activations together,
- the cache knows that the residual stream of a multimodal model starts at `hook_input_embed`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformer_lens
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice, get_act_name

__all__ = ["ActivationCache", "HookPoint", "HookedRootModule", "has_listeners", "listens"]

NamesFilter = Callable[[str], bool] | Sequence[str] | str | None

# Activations whose position axis is not the second from last: [..., pos, head, d_head].
PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k", "hook_result")


def has_listeners(*hook_points: HookPoint) -> bool:
    """Whether anything (a hook, a backward hook, a cache) is registered on one of `hook_points`.

    Components use it to take a fused path when nobody looks at the values in between.
    """
    return any(point._forward_hooks or point._backward_hooks for point in hook_points)


def listens(model: nn.Module) -> bool:
    """Whether any hook is on the model or a part of it, of ours or of torch."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in model.modules()
    )


class HookedRootModule(transformer_lens.HookedRootModule):
    """TransformerLens's root module, with names that are checked.

    Example:
        >>> model.run_with_hooks(inputs, fwd_hooks=[("blocks.3.hook_mlp_out", zero())])
    """

    hook_dict: dict[str, HookPoint]

    if TYPE_CHECKING:  # TransformerLens's own, which mypy does not look into
        hooks: Callable[..., AbstractContextManager[Any]]
        run_with_hooks: Callable[..., Any]
        setup: Callable[[], None]

    def check_hook_name(self, name: str) -> None:
        """Raise a KeyError that suggests the nearest names if `name` is not a hook point."""
        if name in self.hook_dict:
            return
        near = difflib.get_close_matches(name, list(self.hook_dict), n=4, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise KeyError(
            f"no hook point is called {name!r}{hint}. "
            f"`model.hook_dict` holds all {len(self.hook_dict)} names."
        )

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        self.check_hook_name(name)
        super()._enable_hook_with_name(name, hook, dir)

    def add_hook(self, name: str | Callable[[str], bool], hook: Any, *args: Any, **kw: Any) -> None:
        """Add a hook that stays until `reset_hooks`; see TransformerLens."""
        if isinstance(name, str):
            self.check_hook_name(name)
        super().add_hook(name, hook, *args, **kw)

    def selected_hook_names(self, names_filter: NamesFilter) -> list[str]:
        """The hook points that `names_filter` (a name, several, a predicate or None) selects.

        None selects all but `hook_result`.

        Raises:
            KeyError: a name that is not a hook point.
        """
        if names_filter is None:
            return [name for name in self.hook_dict if not name.endswith("hook_result")]
        if callable(names_filter):
            return [name for name in self.hook_dict if names_filter(name)]
        wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        for name in wanted:
            self.check_hook_name(name)
        return wanted

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
            name = str(hook.name)
            value = activation.detach().to(device)
            if not name.startswith(("vision.", "projector.")):
                value = positions.apply(value, dim=-3 if name.endswith(PER_HEAD) else -2)
            if remove_batch_dim and value.shape[0] == 1:
                value = value[0]
            stored[name + suffix] = value

        names = self.selected_hook_names(names_filter)
        forward = [(name, partial(save, suffix="")) for name in names]
        backward = [(name, partial(save, suffix="_grad")) for name in names] if incl_bwd else []
        return stored, forward, backward


class ActivationCache(transformer_lens.ActivationCache):
    """What `run_with_cache` returns: activations by name, and decompositions of the stream.

    `cache["mlp_out", 3]`, `cache["blocks.3.hook_mlp_out"]`, `cache["vision.mlp_out", 3]`;
    `cache.decompose_resid()`, `cache.accumulated_resid()`, `cache.stack_head_results()`,
    `cache.logit_attrs(...)` as in TransformerLens.

    The `embed` term of a decomposition is `hook_input_embed`, in which the visual tokens already
    stand: with TransformerLens's `hook_embed` the parts would not add up to the whole.
    """

    inputs: Any = None
    """The `MultimodalInputs` that were run; None where the model was given something else."""

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, tuple) and isinstance(key[0], str) and key[0].startswith("vision."):
            name, layer, *rest = key
            if layer is not None and layer < 0:
                layer += self.model.cfg.vision.n_layers
            return self.cache_dict["vision." + get_act_name(name[7:], layer, *rest)]
        return super().__getitem__(key)

    def _from_input_embed(self) -> transformer_lens.ActivationCache:
        """The activations for TransformerLens's decompositions, which begin at `hook_embed`."""
        activations = dict(self.cache_dict)
        if "hook_input_embed" in activations:
            activations["hook_embed"] = activations["hook_input_embed"]
        return transformer_lens.ActivationCache(activations, self.model, self.has_batch_dim)

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's `decompose_resid`, with the visual tokens in the `embed` term."""
        return self._from_input_embed().decompose_resid(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's `get_full_resid_decomposition`, with the visual tokens in `embed`."""
        return self._from_input_embed().get_full_resid_decomposition(*args, **kwargs)

    def logit_attrs(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's `logit_attrs`, with the final norm's weights in the directions.

        TransformerLens expects them to be folded into the unembedding. So the attributions of a
        whole decomposition add up to the logit; where the final norm or the unembedding has a bias
        (Phi), up to the constant `ln_final.b @ W_U + b_U`.
        """
        folded = transformer_lens.ActivationCache(
            self.cache_dict, FoldedFinalNorm(self.model), self.has_batch_dim
        )
        return folded.logit_attrs(*args, **kwargs)


class FoldedFinalNorm:
    """A model whose tokens read directions that hold the final norm's weights."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """The model's own, times the final norm's weights."""
        directions = self._model.tokens_to_residual_directions(tokens)
        folded = directions * self._model.ln_final.w.to(directions.device)
        return folded.to(self._model.device)  # where the activations of a spread model are
