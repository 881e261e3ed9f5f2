"""Where each tensor of a checkpoint goes: name tables as data, and the `Slot`s that they stand for.

A name table is a dictionary from a checkpoint's names to ours, with `{}` for the number of a layer:

    "layers.{}.self_attn.o_proj": "blocks.{}.attn.o"           a module: its weight, its bias
    "layers.{}.self_attn.q_proj": "blocks.{}.attn.qkv[q]"      some rows: q, k or v
    "layers.{}.query_key_value": "blocks.{}.attn.qkv[by head]"  q, k and v of one head after another
    "embed_tokens.weight": "embed.W_E"                         one tensor
    "pos_embed": "vision.W_pos[None]"                          with an axis of size 1 in front
    "projection_weight": "projector.linear_1.weight[T]"        transposed

What a model of the configuration has not (a bias, a class token, an output layer that is tied) is
left out of the `Table`, so that one name table serves every variant of a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmlens.config import MultimodalConfig, ProjectorConfig, TransformerConfig, VisionConfig
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.model.vision_tower import HookedVisionTransformer

Names = Mapping[str, str]

KINDS = {".w": ".weight", ".w_less_offset": ".weight", ".b": ".bias"}
"""What the parameters of our norms are called in checkpoints."""

# CLIP and SigLIP: `modeling_clip.py` and `modeling_siglip.py` of transformers.
TOWER = {
    "embeddings.class_embedding": "vision.class_embed",
    "embeddings.patch_embedding": "vision.patch_embed",
    "embeddings.position_embedding.weight": "vision.W_pos",
    "pre_layrnorm": "vision.ln_pre",
    "encoder.layers.{}.layer_norm1": "vision.blocks.{}.ln1",
    "encoder.layers.{}.self_attn.q_proj": "vision.blocks.{}.attn.qkv[q]",
    "encoder.layers.{}.self_attn.k_proj": "vision.blocks.{}.attn.qkv[k]",
    "encoder.layers.{}.self_attn.v_proj": "vision.blocks.{}.attn.qkv[v]",
    "encoder.layers.{}.self_attn.out_proj": "vision.blocks.{}.attn.o",
    "encoder.layers.{}.layer_norm2": "vision.blocks.{}.ln2",
    "encoder.layers.{}.mlp.fc1": "vision.blocks.{}.mlp.up",
    "encoder.layers.{}.mlp.fc2": "vision.blocks.{}.mlp.down",
}

HF_PROJECTOR = {
    "multi_modal_projector.linear_1": "projector.linear_1",
    "multi_modal_projector.linear_2": "projector.linear_2",
    "image_newline": "projector.line_ends.newline",
}


@dataclass(frozen=True)
class Slot:
    """A parameter, or its rows `start` to `stop`."""

    parameter: str
    start: int = 0
    stop: int | None = None
    batch_axes: int = 0
    """Axes of size 1 that the checkpoint has in front, as for a batch."""
    n_heads: int | None = None
    """Of queries, keys and values that the checkpoint has by head: q, k, v of each."""
    transposed: bool = False
    """Whether the checkpoint has columns where we have rows."""

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return what the checkpoint has there: a view, but for a copy of what it has by head."""
        place = self._place(parameters)
        return place.flatten(0, 2) if self.n_heads else place

    def fill(self, parameters: Mapping[str, Tensor], tensor: Tensor) -> None:
        """Copy a tensor of the checkpoint there."""
        place = self._place(parameters)
        place.copy_(tensor.reshape(place.shape))

    def _place(self, parameters: Mapping[str, Tensor]) -> Tensor:
        place = parameters[self.parameter][self.start : self.stop]
        if self.n_heads:
            return place.unflatten(0, (3, self.n_heads, -1)).transpose(0, 1)
        return place.T if self.transposed else place[(None,) * self.batch_axes]


Table = dict[str, Slot]


def under(prefix: str, names: Names) -> dict[str, str]:
    """Return a name table whose names in the checkpoint begin with `prefix`."""
    return {prefix + there: here for there, here in names.items()}


def sequential(cfg: ProjectorConfig | None, name: str) -> dict[str, str]:
    """Return the names of a projector that is an `nn.Linear`, or an `nn.Sequential` of several."""
    n_layers = cfg.n_layers if cfg else 0
    if n_layers == 1:
        return {name: "projector.linear_1"}
    return {f"{name}.{2 * i}": f"projector.linear_{i + 1}" for i in range(n_layers)}


def slots(cfg: MultimodalConfig | VisionConfig, names: Names) -> Table:
    """Return the place of every tensor that a model of this configuration has."""
    table: Table = {}
    parameters = parameter_names(cfg)
    for there, here in names.items():
        of_vision = here.startswith("vision.") and isinstance(cfg, MultimodalConfig)
        stack: TransformerConfig = (of_vision and cfg.vision) or cfg
        place, _, part = here.rstrip("]").partition("[")
        of_first = place.format(0)
        kinds = [
            name.removeprefix(of_first)
            for name in parameters
            if name == of_first or name.startswith(f"{of_first}.")
        ]
        n_heads = stack.n_heads if part == "by head" else None
        whole = "None" in part or part in ("", "T")
        start, stop = (0, None) if whole else rows_of(stack)[part]
        for layer in range(stack.n_layers) if "{}" in here else (0,):
            for kind in kinds:
                name = there.format(layer) + KINDS.get(kind, kind)
                parameter = place.format(layer) + kind
                table[name] = Slot(parameter, start, stop, part.count("None"), n_heads, part == "T")
    return table


def rows_of(cfg: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return which rows of a fused projection are the queries, the keys and the values."""
    query, key = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    return {
        "q": (0, query),
        "k": (query, query + key),
        "v": (query + key, query + 2 * key),
        "by head": (0, query + 2 * key),
    }


def parameter_names(cfg: MultimodalConfig | VisionConfig) -> list[str]:
    """Return the parameters of a model with one layer of each stack; the others are like it.

    Of the decoder there are as many as deepstack needs.
    """
    vision = cfg if isinstance(cfg, VisionConfig) else cfg.vision
    if vision is not None:
        layers = (0,) * len(vision.feature_layers)
        vision = replace(vision, n_layers=1, attn_types=None, feature_layers=layers)
    with torch.device("meta"):
        model: nn.Module
        if isinstance(cfg, MultimodalConfig):
            few = max(1, cfg.n_deepstack)
            small = replace(cfg, n_layers=few, attn_types=None, vision=vision)
            model = HookedMultimodalTransformer(small)
        else:
            assert vision is not None
            model = nn.ModuleDict({"vision": HookedVisionTransformer(vision)})
    return [name for name, _ in model.named_parameters()]
