"""All layers' weights at once, in TransformerLens's shapes, and what is computed from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmlens.config import MultimodalConfig
from mmlens.model.components import Embed, Unembed
from mmlens.model.hook_points import is_hook_point
from mmlens.model.hooked_root_module import FactoredMatrix, composition_scores
from mmlens.model.sites import is_hook_place


def stacked(path: str) -> property:
    """A property: a weight of every block, stacked; None where the blocks have none."""

    def stack(model: Any) -> Tensor | None:
        weights = [operator.attrgetter(path)(block) for block in model.blocks]
        if weights[0] is None:
            return None
        return torch.stack([weight.to(model.embed.W_E.device) for weight in weights])

    return property(stack)


class WeightProperties(nn.Module):
    """Stacked weights of the decoder (copies; write into `blocks[l].attn.W_Q` and the like).

    Those of a model that is spread over several devices are brought to its first.
    """

    cfg: MultimodalConfig
    embed: Embed
    unembed: Unembed
    blocks: nn.ModuleList
    ln_final: nn.Module

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
    def adapter(self) -> Unembed:
        """Where TransformerLens's lenses look for what logits go through after `W_U` and `b_U`."""
        return self.unembed

    W_Q = stacked("attn.W_Q")
    """Query weights: [layer, head, d_model, d_head]."""
    W_K = stacked("attn.W_K")
    """Key weights: [layer, kv_head, d_model, d_head]."""
    W_V = stacked("attn.W_V")
    """Value weights: [layer, kv_head, d_model, d_head]."""
    W_O = stacked("attn.W_O")
    """Attention's output weights: [layer, head, d_head, d_model]."""
    b_Q = stacked("attn.b_Q")
    """Query biases: [layer, head, d_head]."""
    b_K = stacked("attn.b_K")
    """Key biases: [layer, kv_head, d_head]."""
    b_V = stacked("attn.b_V")
    """Value biases: [layer, kv_head, d_head]."""
    b_O = stacked("attn.b_O")
    """Attention's output biases: [layer, d_model]."""
    W_in = stacked("mlp.W_in")
    """MLP input weights: [layer, d_model, d_mlp]."""
    W_gate = stacked("mlp.W_gate")
    """MLP gate weights: [layer, d_model, d_mlp]; None where the MLPs have no gate."""
    W_out = stacked("mlp.W_out")
    """MLP output weights: [layer, d_mlp, d_model]."""
    b_in = stacked("mlp.b_in")
    """MLP input biases: [layer, d_mlp]."""
    b_out = stacked("mlp.b_out")
    """MLP output biases: [layer, d_model]."""

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of all output biases in the residual stream that enters `layer`.

        Args:
            layer: 0 ... n_layers.
            mlp_input: count the attention of `layer` itself as well; in parallel blocks it adds
                nothing to what the MLP reads.
            include_mlp_biases: count the MLPs' biases.

        Raises:
            ValueError: a model with norms after attention and MLP, where what a bias adds depends
                on the run.
        """
        if self.cfg.post_norms and (self.cfg.o_bias or self.cfg.mlp_bias):
            raise ValueError(
                "this model normalises what attention and MLP give, biases included: what they add "
                "to the stream depends on the run"
            )
        total = self.embed.W_E.new_zeros(self.cfg.d_model)
        reads_mid = mlp_input and not self.cfg.parallel_attn_mlp
        for index in range(self.cfg.n_layers):
            block: Any = self.blocks[index]
            if index < layer or (index == layer and reads_mid):
                total = total + block.written(1, block.attn.b_O).to(total)
            if index < layer and include_mlp_biases:
                total = total + block.written(2, block.mlp.b_out).to(total)
        return total

    # Circuits

    def _for_each_head(self, stacked: Float[Tensor, "layer kv_head ..."]) -> Tensor:
        """Weights of key-value heads, once for each query head that reads them."""
        return stacked.repeat_interleave(self.cfg.n_heads // self.cfg.n_kv_heads, dim=1)

    @property
    def QK(self) -> FactoredMatrix:
        """What each head's scores are made of, W_Q W_K^T: [layer, head, d_model, d_model].

        Rotary positions come between the two, so this is the score at distance 0, but for the
        biases, the norm's weights and the division by `cfg.attn_scale`.
        Where `cfg.qk_norm`, queries and keys are normalised first, so it is the score only up to a
        factor for each query and key, and to the weights of these norms.
        """
        return FactoredMatrix(self.W_Q, self._for_each_head(self.W_K).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """What each head writes of what it attends to, W_V W_O: [layer, head, d_model, d_model].

        In a model with a norm after attention (Gemma 2 and 3), before that.
        """
        return FactoredMatrix(self._for_each_head(self.W_V), self.W_O)

    def QK_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """The layers with attention (here all), and `QK`."""
        return self.composition_layer_indices(), self.QK

    def OV_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """The layers with attention (here all), and `OV`."""
        return self.composition_layer_indices(), self.OV

    def all_composition_scores(
        self, mode: str
    ) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much each head writes into what each later head reads (Elhage et al. 2021).

        ||OV R|| / (||OV|| ||R||) in Frobenius norms, where R is the later head's QK ("Q"), QK^T
        ("K") or OV ("V"); 0 where the other head is not in a later layer. The tensor has
        `layer_indices` and `head_labels` as attributes.

        Raises:
            ValueError: another mode.
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode={mode!r}; it is 'Q', 'K' or 'V'")
        written = self.OV
        read = written if mode == "V" else self.QK if mode == "Q" else self.QK.T
        scores = composition_scores(written, read, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        earlier = layers[:, None, None, None] < layers[None, None, :, None]
        scores = scores.where(earlier, 0.0)
        scores.layer_indices = self.composition_layer_indices()
        scores.head_labels = self.all_head_labels
        return scores

    # Which layers have what: all have attention and an MLP

    @property
    def all_head_labels(self) -> list[str]:
        """`L0H0`, `L0H1`, ... of all heads."""
        heads = range(self.cfg.n_heads)
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in heads]

    attn_head_labels = all_head_labels
    """The same: all layers have attention."""

    def composition_layer_indices(self) -> list[int]:
        """The layers with attention: all."""
        return list(range(self.cfg.n_layers))

    def layer_types(self) -> list[str]:
        """What each layer is made of: "attn+mlp"."""
        return ["attn+mlp"] * self.cfg.n_layers

    def block_submodules(self, layer_idx: int) -> list[str]:
        """Names of the parts of a block: `ln1`, `attn`, `mlp`, ..."""
        named = self.blocks[layer_idx].named_children()
        return [name for name, part in named if not is_hook_place(name)]

    def block_hooks(self, layer_idx: int) -> list[str]:
        """Names of the hook points of a block, as they are called inside of it, sorted."""
        named = self.blocks[layer_idx].named_modules()
        return sorted(name for name, part in named if is_hook_point(part))

    def blocks_with(self, submodule: str) -> list[tuple[int, nn.Module]]:
        """Layers and blocks that have a part of this name."""
        return [
            (layer, block)
            for layer, block in enumerate(self.blocks)
            if submodule in self.block_submodules(layer)
        ]

    def stack_params_for(
        self, submodule: str, attr_path: str, reshape_fn: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[list[int], Tensor]:
        """A weight of all blocks that have a part, stacked, and their layers.

        Args:
            submodule: the part, `attn` say.
            attr_path: the weight as a path from the block, `attn.W_Q` say.
            reshape_fn: what is done with each before they are stacked.

        Raises:
            ValueError: no block has that part.
        """
        blocks = self.blocks_with(submodule)
        if not blocks:
            raise ValueError(
                f"no block has {submodule!r}; parts are {', '.join(self.block_submodules(0))}"
            )
        found = [operator.attrgetter(attr_path)(block) for _, block in blocks]
        each = found if reshape_fn is None else [reshape_fn(weight) for weight in found]
        return [layer for layer, _ in blocks], torch.stack(each)

    # Parameters

    @property
    def n_params_total(self) -> int:
        """How many parameters the model has, tower, projector, embeddings and biases included.

        `cfg.n_params` counts the decoder's matrices alone.
        """
        return sum(parameter.numel() for parameter in self.parameters())

    def tl_parameters(self) -> dict[str, Tensor]:
        """The decoder's weights by TransformerLens's names, as its SVDInterpreter reads them.

        Views and copies of the parameters; biases that the model has not are zeros. As in
        TransformerLens, keys and values are there once for each query head, and parallel blocks
        (where the MLP reads through `ln1`) have that norm as `ln2` too.
        Weights of norms are what these multiply by, so they hold the 1 that Gemma's add.
        """
        found: dict[str, Any] = {"embed.W_E": self.W_E}
        repeats = self.cfg.n_heads // self.cfg.n_kv_heads
        for layer in range(self.cfg.n_layers):
            block: Any = self.blocks[layer]
            own: dict[str, Any] = {}
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
                weight = getattr(block.attn, name)
                shared = name[-1] in "KV" and repeats > 1
                own[f"attn.{name}"] = weight.repeat_interleave(repeats, 0) if shared else weight
            for name in ("W_in", "W_out", "b_in", "b_out", "W_gate", "b_gate"):
                own[f"mlp.{name}"] = getattr(block.mlp, name)
            norms = {"ln1": block.ln1, "ln2": block.ln2 if block.has_ln2 else block.ln1}
            if self.cfg.post_norms:
                norms |= {"ln1_post": block.ln1_post, "ln2_post": block.ln2_post}
            for name, norm in norms.items():
                own |= {f"{name}.w": norm.w, f"{name}.b": getattr(norm, "b", None)}
            found |= {f"blocks.{layer}.{name}": weight for name, weight in own.items()}
        final: Any = self.ln_final
        found |= {"ln_final.w": final.w, "ln_final.b": getattr(final, "b", None)}
        found |= {"unembed.W_U": self.W_U, "unembed.b_U": self.b_U}
        return {name: weight for name, weight in found.items() if weight is not None}

    get_params = tl_parameters

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The items of `tl_parameters`."""
        return iter(self.tl_parameters().items())
