"""All layers' weights at once, in TransformerLens's shapes, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.components import Embed, Unembed
from mmlens.config import MultimodalConfig

if TYPE_CHECKING:
    from mmlens.editing import Edit


class WeightProperties(nn.Module):
    """Stacked weights of the decoder (copies; write into `blocks[l].attn.W_Q` and the like)."""

    cfg: MultimodalConfig
    embed: Embed
    unembed: Unembed
    blocks: nn.ModuleList

    def apply(self, fn: Callable[[nn.Module], None] | Edit) -> Any:
        """Add an `Edit` to the weights, until `edit.revert(model)`; returns the model.

        A function is called with every module, as in torch.

        Raises:
            ValueError: the edit is applied already, or was made for other weights.
        """
        from mmlens.editing.edit import Edit

        if not isinstance(fn, Edit):
            return super().apply(fn)
        model: Any = self
        fn.apply(model)
        return self

    def _stack(self, path: str) -> Tensor:
        part, name = path.split(".")
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings (the parameter itself)."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding (a view)."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias."""
        return self.unembed.b_U

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights."""
        return self._stack("attn.W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key weights."""
        return self._stack("attn.W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Value weights."""
        return self._stack("attn.W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Attention's output weights."""
        return self._stack("attn.W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases."""
        return self._stack("attn.b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Key biases."""
        return self._stack("attn.b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Value biases."""
        return self._stack("attn.b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Attention's output biases."""
        return self._stack("attn.b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """MLP input weights."""
        return self._stack("mlp.W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """MLP gate weights; None where the MLPs have no gate."""
        return self._stack("mlp.W_gate") if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """MLP output weights."""
        return self._stack("mlp.W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """MLP input biases."""
        return self._stack("mlp.b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """MLP output biases."""
        return self._stack("mlp.b_out")

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of all output biases in the residual stream that enters `layer`.

        Args:
            layer: 0 ... n_layers.
            mlp_input: count the attention of `layer` itself as well.
            include_mlp_biases: count the MLPs' biases.
        """
        total = self.embed.W_E.new_zeros(self.cfg.d_model)
        for index in range(self.cfg.n_layers):
            block: Any = self.blocks[index]
            if index < layer or (index == layer and mlp_input):
                total = total + block.attn.b_O
            if index < layer and include_mlp_biases:
                total = total + block.mlp.b_out
        return total
