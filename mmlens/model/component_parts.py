"""What single heads and neurons add to the residual stream of a run."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.model.hooked_root_module import Slice, TransformerLensCache

Labelled = Any
"""A stack; with `return_labels`, the stack and the name of each component."""


class ComponentParts(TransformerLensCache):
    """The parts of an `ActivationCache`'s components.

    Where a norm comes after attention and MLP, they go through it with its scale in the run.
    """

    cache_dict: dict[str, Tensor]

    def _like(self, activations: dict[str, Tensor], **changed: Any) -> Any:
        """Return a cache of other activations of the same run."""
        raise NotImplementedError

    def compute_head_results(self) -> None:
        """Add what each head writes (`attn.hook_result`), of all layers whose `z` is there."""
        for layer in range(self.model.cfg.n_layers):
            name, of = (self.model.SITES.hook_name(site, layer) for site in ("result", "z"))
            z = self.cache_dict.get(of)
            if name not in self.cache_dict and z is not None:
                weights = self.model.blocks[layer].attn.W_O.to(z.device)
                self.cache_dict[name] = torch.einsum("...hd, hdm -> ...hm", z, weights)

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Labelled:
        """TransformerLens's `stack_head_results`: what each head adds to the stream."""
        self.compute_head_results()
        if not self.model.cfg.changes_outputs:
            return super().stack_head_results(*args, **kwargs)
        added = dict(self.cache_dict)
        for layer in range(self.model.cfg.n_layers):
            name = self.model.SITES.hook_name("result", layer)
            if name in added:
                result = self.model.blocks[layer].written(1, added[name])
                if self.model.cfg.post_norms:
                    result = result / self._post_scale(1, layer)[..., None, :]
                added[name] = result.to(added[name])
        return TransformerLensCache.stack_head_results(self._like(added), *args, **kwargs)

    def _post_scale(self, part: int, layer: int) -> Float[Tensor, "*batch_and_pos 1"]:
        """What the norm after attention (1) or the MLP (2) divided by in the run."""
        return self[f"blocks.{layer}.ln{part}_post.hook_scale"]

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        project_output_onto: Tensor | None = None,
    ) -> Float[Tensor, "*batch_and_pos neuron width"] | Float[Tensor, "*batch_and_pos neuron"]:
        """What each neuron of a layer adds to the stream, or to its product with directions.

        Args:
            layer: whose neurons.
            neuron_slice: which of them; a number drops their axis.
            pos_slice: which positions; a number drops their axis.
            project_output_onto: directions [d_model] or [d_model, width].
        """
        neurons, positions = (
            each if isinstance(each, Slice) else Slice(each) for each in (neuron_slice, pos_slice)
        )
        activations = neurons.apply(positions.apply(self["post", layer], dim=-2), dim=-1)
        block = self.model.blocks[layer]
        weights = neurons.apply(block.mlp.W_out, dim=0).to(activations.device)
        if self.model.cfg.changes_outputs:
            weights = block.written(2, weights).to(weights)
        if self.model.cfg.post_norms:
            scale = positions.apply(self._post_scale(2, layer), dim=-2)
            activations = activations / (scale if activations.ndim == scale.ndim else scale[..., 0])
        if project_output_onto is None:
            return activations[..., None] * weights
        written = weights @ project_output_onto
        wide = activations if project_output_onto.ndim == 1 else activations[..., None]
        return wide * written
