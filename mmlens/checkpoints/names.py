"""Where each tensor of a checkpoint goes: name tables of the parts that formats share.

A table maps the checkpoint's tensor name to a `Slot`: a parameter of ours, or some rows of one
(queries, keys and values share the rows of one fused projection, gate and input those of another).
Formats differ in prefixes; the tables take them as arguments.

Sources: the names are those of transformers' `modeling_llama.py`, `modeling_phi.py`,
`modeling_clip.py` and `modeling_siglip.py`, of open_clip's `transformer.py`, and of timm's
`vision_transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmlens.config import MultimodalConfig, ProjectorConfig, TransformerConfig, VisionConfig


@dataclass(frozen=True)
class Slot:
    """A parameter, or its rows `start` to `stop`."""

    parameter: str
    start: int = 0
    stop: int | None = None
    batch_axes: int = 0
    """Axes of size 1 that the checkpoint has in front, as for a batch."""

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The place itself, a view of the parameter in the checkpoint's shape."""
        place = parameters[self.parameter][self.start : self.stop]
        return place[(None,) * self.batch_axes]


Table = dict[str, Slot]


def weight_and_bias(name: str, parameter: str, bias: bool = True) -> Table:
    """A layer whose weight and bias (if it has one) keep their names."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{kind}": Slot(f"{parameter}.{kind}") for kind in kinds}


def norm_names(name: str, parameter: str, bias: bool) -> Table:
    """A norm: `weight` and `bias` there, `w` and `b` here."""
    table = {f"{name}.weight": Slot(f"{parameter}.w")}
    return table | {f"{name}.bias": Slot(f"{parameter}.b")} if bias else table


def qkv_names(cfg: TransformerConfig, prefix: str, parameter: str) -> Table:
    """Separate `q_proj`, `k_proj`, `v_proj` to the rows of the fused projection."""
    kinds = ("weight", "bias") if cfg.qkv_bias else ("weight",)
    table, start = {}, 0
    for name, heads in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads)):
        stop = start + heads * cfg.d_head
        for kind in kinds:
            table[f"{prefix}.{name}_proj.{kind}"] = Slot(f"{parameter}.{kind}", start, stop)
        start = stop
    return table


def decoder_names(cfg: MultimodalConfig, prefix: str = "model.", head: str = "lm_head") -> Table:
    """A decoder as transformers names it, under `prefix`, with its output layer at `head`."""
    names = phi_names if cfg.parallel_attn_mlp else llama_names
    table = names(cfg, prefix)
    table[f"{prefix}embed_tokens.weight"] = Slot("embed.W_E")
    if not cfg.tie_word_embeddings:
        table[f"{head}.weight"] = Slot("unembed.weight")
    if cfg.unembed_bias:
        table[f"{head}.bias"] = Slot("unembed.bias")
    return table


def llama_names(cfg: MultimodalConfig, prefix: str) -> Table:
    """The layers and the last norm of Llama, Mistral and Qwen2."""
    table = norm_names(f"{prefix}norm", "ln_final", bias=False)
    for layer in range(cfg.n_layers):
        there, here = f"{prefix}layers.{layer}", f"blocks.{layer}"
        table |= norm_names(f"{there}.input_layernorm", f"{here}.ln1", bias=False)
        table |= norm_names(f"{there}.post_attention_layernorm", f"{here}.ln2", bias=False)
        table |= qkv_names(cfg, f"{there}.self_attn", f"{here}.attn.qkv")
        table[f"{there}.self_attn.o_proj.weight"] = Slot(f"{here}.attn.o.weight")
        if cfg.o_bias:
            table[f"{there}.self_attn.o_proj.bias"] = Slot(f"{here}.attn.o.bias")
        for kind in ("weight", "bias") if cfg.mlp_bias else ("weight",):
            up = f"{here}.mlp.up.{kind}"
            table[f"{there}.mlp.gate_proj.{kind}"] = Slot(up, 0, cfg.d_mlp)
            table[f"{there}.mlp.up_proj.{kind}"] = Slot(up, cfg.d_mlp, 2 * cfg.d_mlp)
            table[f"{there}.mlp.down_proj.{kind}"] = Slot(f"{here}.mlp.down.{kind}")
    return table


def phi_names(cfg: MultimodalConfig, prefix: str) -> Table:
    """The layers and the last norm of Phi."""
    table = norm_names(f"{prefix}final_layernorm", "ln_final", bias=True)
    for layer in range(cfg.n_layers):
        there, here = f"{prefix}layers.{layer}", f"blocks.{layer}"
        table |= norm_names(f"{there}.input_layernorm", f"{here}.ln1", bias=True)
        table |= qkv_names(cfg, f"{there}.self_attn", f"{here}.attn.qkv")
        table |= weight_and_bias(f"{there}.self_attn.dense", f"{here}.attn.o")
        table |= weight_and_bias(f"{there}.mlp.fc1", f"{here}.mlp.up")
        table |= weight_and_bias(f"{there}.mlp.fc2", f"{here}.mlp.down")
    return table


def tower_names(cfg: VisionConfig, prefix: str = "vision_tower.") -> Table:
    """A CLIP or SigLIP vision tower as transformers names it (`CLIPVisionModel` under `prefix`)."""
    table = {
        f"{prefix}embeddings.patch_embedding.weight": Slot("vision.patch_embed.weight"),
        f"{prefix}embeddings.position_embedding.weight": Slot("vision.W_pos"),
    }
    if cfg.patch_bias:
        table[f"{prefix}embeddings.patch_embedding.bias"] = Slot("vision.patch_embed.bias")
    if cfg.class_token:
        table[f"{prefix}embeddings.class_embedding"] = Slot("vision.class_embed")
    if cfg.pre_norm:
        table |= norm_names(f"{prefix}pre_layrnorm", "vision.ln_pre", bias=True)
    for layer in range(cfg.n_layers):
        there, here = f"{prefix}encoder.layers.{layer}", f"vision.blocks.{layer}"
        table |= norm_names(f"{there}.layer_norm1", f"{here}.ln1", bias=True)
        table |= norm_names(f"{there}.layer_norm2", f"{here}.ln2", bias=True)
        table |= qkv_names(cfg, f"{there}.self_attn", f"{here}.attn.qkv")
        table |= weight_and_bias(f"{there}.self_attn.out_proj", f"{here}.attn.o")
        table |= weight_and_bias(f"{there}.mlp.fc1", f"{here}.mlp.up")
        table |= weight_and_bias(f"{there}.mlp.fc2", f"{here}.mlp.down")
    return table


def open_clip_tower_names(cfg: VisionConfig, prefix: str = "visual.") -> Table:
    """The image tower of an open_clip CLIP (`VisionTransformer` under `prefix`)."""
    table = {
        f"{prefix}class_embedding": Slot("vision.class_embed"),
        f"{prefix}conv1.weight": Slot("vision.patch_embed.weight"),
        f"{prefix}positional_embedding": Slot("vision.W_pos"),
    }
    if cfg.pre_norm:
        table |= norm_names(f"{prefix}ln_pre", "vision.ln_pre", bias=True)
    for layer in range(cfg.n_layers):
        there, here = f"{prefix}transformer.resblocks.{layer}", f"vision.blocks.{layer}"
        table |= norm_names(f"{there}.ln_1", f"{here}.ln1", bias=True)
        table |= norm_names(f"{there}.ln_2", f"{here}.ln2", bias=True)
        for scale in ("ls_1", "ls_2") if cfg.layer_scale else ():
            table[f"{there}.{scale}.gamma"] = Slot(f"{here}.{scale}")
        for kind in ("weight", "bias"):
            table[f"{there}.attn.in_proj_{kind}"] = Slot(f"{here}.attn.qkv.{kind}")
        table |= weight_and_bias(f"{there}.attn.out_proj", f"{here}.attn.o")
        table |= weight_and_bias(f"{there}.mlp.c_fc", f"{here}.mlp.up")
        table |= weight_and_bias(f"{there}.mlp.c_proj", f"{here}.mlp.down")
    return table


def timm_tower_names(cfg: VisionConfig, prefix: str = "visual.trunk.") -> Table:
    """The image tower of an open_clip CLIP that is timm's `VisionTransformer`, under `prefix`."""
    table = {f"{prefix}pos_embed": Slot("vision.W_pos", batch_axes=1)}
    table |= weight_and_bias(f"{prefix}patch_embed.proj", "vision.patch_embed", cfg.patch_bias)
    if cfg.class_token:
        table[f"{prefix}cls_token"] = Slot("vision.class_embed", batch_axes=2)
    if cfg.pre_norm:
        table |= norm_names(f"{prefix}norm_pre", "vision.ln_pre", bias=True)
    for layer in range(cfg.n_layers):
        there, here = f"{prefix}blocks.{layer}", f"vision.blocks.{layer}"
        table |= norm_names(f"{there}.norm1", f"{here}.ln1", bias=True)
        table |= norm_names(f"{there}.norm2", f"{here}.ln2", bias=True)
        table |= weight_and_bias(f"{there}.attn.qkv", f"{here}.attn.qkv", cfg.qkv_bias)
        table |= weight_and_bias(f"{there}.attn.proj", f"{here}.attn.o", cfg.o_bias)
        table |= weight_and_bias(f"{there}.mlp.fc1", f"{here}.mlp.up", cfg.mlp_bias)
        table |= weight_and_bias(f"{there}.mlp.fc2", f"{here}.mlp.down", cfg.mlp_bias)
    return table


def projector_names(
    cfg: ProjectorConfig, layers: Sequence[str] = ("linear_1", "linear_2"), prefix: str = ""
) -> Table:
    """A projector, whose linear layers are called `layers` under `prefix`.

    transformers says `linear_1` and `linear_2`; LLaVA's code has an `nn.Sequential`, so that its
    layers are `0`, `2`, `4` ...
    """
    table = {}
    for index, layer in enumerate(layers, start=1):
        for kind in ("weight", "bias") if cfg.bias else ("weight",):
            table[f"{prefix}{layer}.{kind}"] = Slot(f"projector.linear_{index}.{kind}")
    return table
