"""What Hugging Face's models compute on their way, under mmlens's hook names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from random_models import Prompts
from torch import Tensor, nn
from transformers.models.clip import modeling_clip
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.granite import modeling_granite
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi import modeling_phi
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.siglip import modeling_siglip

SOURCES = {
    "llama": modeling_llama,
    "mistral": modeling_mistral,
    "qwen2": modeling_qwen2,
    "qwen3": modeling_qwen3,
    "phi": modeling_phi,
    "gpt_neox": modeling_gpt_neox,
    "granite": modeling_granite,
    "gemma": modeling_gemma,
    "gemma2": modeling_gemma2,
    "gemma3_text": modeling_gemma3,
    "clip_vision_model": modeling_clip,
    "siglip_vision_model": modeling_siglip,
}


def heads(d_head: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.unflatten(-1, (-1, d_head))


@contextmanager
def recorded(modules: dict[str, nn.Module], store: dict[str, Tensor]) -> Iterator[None]:
    """Inputs and outputs of modules, as `name:in` and `name:out`."""

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, Tensor):
                store[f"{name}:in"] = given
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                store[f"{name}:out"] = output

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in modules.items()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_attention(
    source: Any, store: list[tuple[Tensor, ...]], how: list[Any] | None = None
) -> Iterator[None]:
    """Queries, keys (rotated) and pattern of each call of eager attention; and how scores are made.

    That is, what products are multiplied by, and what they are capped at.
    """
    original = source.eager_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, *a: Any, **k: Any) -> Any:
        output, pattern = original(module, query, key, value, *a, **k)
        store.append((query, key, pattern))
        if how is not None:
            how.append((k["scaling"], k.get("softcap")))
        return output, pattern

    source.eager_attention_forward = attend
    try:
        yield
    finally:
        source.eager_attention_forward = original


def attention_activations(
    prefix: str,
    query: Tensor,
    key: Tensor,
    pattern: Tensor,
    rotary: bool,
    how: tuple[float | None, float | None] = (None, None),
) -> dict[str, Tensor]:
    groups, (scaling, softcap) = query.shape[1] // key.shape[1], how
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    found = {
        f"{prefix}.hook_attn_scores": scores,
        f"{prefix}.hook_pattern": pattern,
    }
    if rotary:
        found[f"{prefix}.hook_rot_q"] = query.transpose(1, 2)
        found[f"{prefix}.hook_rot_k"] = key.transpose(1, 2)
    return found


def norm_activations(site: str, norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By its formula: dividing its output by a weight near zero would magnify rounding."""
    if isinstance(norm, nn.LayerNorm):
        x, eps = x - x.mean(-1, keepdim=True), norm.eps
    else:
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return {f"{site}.hook_scale": scale, f"{site}.hook_normalized": x / scale}


def block_activations(
    seen: dict[str, Tensor], there: str, here: str, by_head: Any, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """What blocks of decoders and towers call alike; `names` are those of W_O, W_in and W_out."""
    out, into, down = names
    return {
        f"{here}.hook_resid_pre": seen[f"{there}:in"],
        f"{here}.hook_resid_post": seen[f"{there}:out"],
        f"{here}.hook_attn_out": seen[f"{there}.self_attn:out"],
        f"{here}.hook_mlp_out": seen[f"{there}.mlp:out"],
        f"{here}.attn.hook_q": by_head(seen[f"{there}.self_attn.q_proj:out"]),
        f"{here}.attn.hook_k": by_head(seen[f"{there}.self_attn.k_proj:out"]),
        f"{here}.attn.hook_v": by_head(seen[f"{there}.self_attn.v_proj:out"]),
        f"{here}.attn.hook_z": by_head(seen[f"{there}.self_attn.{out}:in"]),
        f"{here}.mlp.hook_pre": seen[f"{there}.mlp.{into}:out"],
        f"{here}.mlp.hook_post": seen[f"{there}.mlp.{down}:in"],
    }


def decoder_activations(hf: nn.Module, prefix: str, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    decoder = hf.get_submodule(prefix)
    if decoder.config.model_type == "gpt_neox":
        return gpt_neox_activations(decoder, prefix, seen)
    is_phi = decoder.config.model_type == "phi"
    by_head = heads(decoder.layers[0].self_attn.head_dim)
    last = "final_layernorm" if is_phi else "norm"
    found = {
        "hook_embed": seen[f"{prefix}.embed_tokens:out"],
        "hook_input_embed": seen[f"{prefix}.layers.0:in"],
        **norm_activations("ln_final", getattr(decoder, last), seen[f"{prefix}.{last}:in"]),
    }
    names = ("dense", "fc1", "fc2") if is_phi else ("o_proj", "gate_proj", "down_proj")
    for layer, block in enumerate(decoder.layers):
        there, here = f"{prefix}.layers.{layer}", f"blocks.{layer}"
        found |= block_activations(seen, there, here, by_head, names)
        found |= norm_activations(f"{here}.ln1", block.input_layernorm, seen[f"{there}:in"])
        if hasattr(block, "pre_feedforward_layernorm"):
            found |= sandwich_activations(seen, there, here, block)
            found[f"{here}.mlp.hook_pre_linear"] = seen[f"{there}.mlp.up_proj:out"]
        elif not is_phi:
            norm, mid = block.post_attention_layernorm, seen[f"{there}.post_attention_layernorm:in"]
            found |= norm_activations(f"{here}.ln2", norm, mid)
            found[f"{here}.hook_resid_mid"] = mid
            found[f"{here}.mlp.hook_pre_linear"] = seen[f"{there}.mlp.up_proj:out"]
        if hasattr(block.self_attn, "q_norm"):
            for which in "qk":
                norm, x = f"{which}_norm", by_head(seen[f"{there}.self_attn.{which}_proj:out"])
                part = getattr(block.self_attn, norm)
                found |= norm_activations(f"{here}.attn.{norm}", part, x)
        if decoder.config.model_type == "granite":
            for part, out in (("attn", "attn_out"), ("mlp", "mlp_out")):
                given = found[f"{here}.hook_{out}"]
                found[f"{here}.{part}.hook_out"] = given
                found[f"{here}.hook_{out}"] = given * decoder.config.residual_multiplier
    if decoder.config.model_type == "granite":
        found["hook_embed"] = found["hook_embed"] * decoder.config.embedding_multiplier
    return found


def sandwich_activations(
    seen: dict[str, Tensor], there: str, here: str, block: Any
) -> dict[str, Tensor]:
    """Of a block whose attention and MLP each have a norm after them."""
    after, mlp_after = "post_attention_layernorm", "post_feedforward_layernorm"
    mid = seen[f"{there}.pre_feedforward_layernorm:in"]
    found = {
        f"{here}.attn.hook_out": seen[f"{there}.self_attn:out"],
        f"{here}.mlp.hook_out": seen[f"{there}.mlp:out"],
        f"{here}.hook_attn_out": seen[f"{there}.{after}:out"],
        f"{here}.hook_mlp_out": seen[f"{there}.{mlp_after}:out"],
        f"{here}.hook_resid_mid": mid,
        **norm_activations(f"{here}.ln2", block.pre_feedforward_layernorm, mid),
    }
    for name, norm in ((f"{here}.ln1_post", after), (f"{here}.ln2_post", mlp_after)):
        found |= norm_activations(name, getattr(block, norm), seen[f"{there}.{norm}:in"])
    return found


def gpt_neox_activations(decoder: Any, prefix: str, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    by_head = heads(decoder.layers[0].attention.head_size)
    final = seen[f"{prefix}.final_layer_norm:in"]
    found = {
        "hook_embed": seen[f"{prefix}.embed_in:out"],
        "hook_input_embed": seen[f"{prefix}.layers.0:in"],
        **norm_activations("ln_final", decoder.final_layer_norm, final),
    }
    for layer, block in enumerate(decoder.layers):
        there, here = f"{prefix}.layers.{layer}", f"blocks.{layer}"
        fused = seen[f"{there}.attention.query_key_value:out"]
        q, k, v = fused.unflatten(-1, (block.attention.config.num_attention_heads, -1)).chunk(3, -1)
        mid = seen[f"{there}.post_attention_layernorm:in"]
        found |= {
            f"{here}.hook_resid_pre": seen[f"{there}:in"],
            f"{here}.hook_resid_post": seen[f"{there}:out"],
            f"{here}.hook_attn_out": seen[f"{there}.attention:out"],
            f"{here}.hook_mlp_out": seen[f"{there}.mlp:out"],
            f"{here}.attn.hook_q": q,
            f"{here}.attn.hook_k": k,
            f"{here}.attn.hook_v": v,
            f"{here}.attn.hook_z": by_head(seen[f"{there}.attention.dense:in"]),
            f"{here}.mlp.hook_pre": seen[f"{there}.mlp.dense_h_to_4h:out"],
            f"{here}.mlp.hook_post": seen[f"{there}.mlp.dense_4h_to_h:in"],
            **norm_activations(f"{here}.ln1", block.input_layernorm, seen[f"{there}:in"]),
            **norm_activations(f"{here}.ln2", block.post_attention_layernorm, mid),
        }
        if not block.use_parallel_residual:
            found[f"{here}.hook_resid_mid"] = mid
    return found


def tower_activations(hf: nn.Module, n_layers: int, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "model.vision_tower"
    tower = hf.get_submodule(prefix)
    by_head = heads(tower.config.hidden_size // tower.config.num_attention_heads)
    found = {
        "vision.hook_patch_embed": seen[f"{prefix}.embeddings.patch_embedding:out"]
        .flatten(2)
        .transpose(1, 2),
        "vision.hook_pos_embed": tower.embeddings.position_embedding.weight[None],
        "vision.hook_embed": seen[f"{prefix}.embeddings:out"],
        "projector.hook_in": seen["model.multi_modal_projector:in"],
        "projector.hook_pre": seen["model.multi_modal_projector.linear_1:out"],
        "projector.hook_post": seen["model.multi_modal_projector.linear_2:in"],
        "projector.hook_out": seen["model.multi_modal_projector:out"].flatten(0, 1)[None],
    }
    found["vision.hook_out"] = found["projector.hook_in"]
    if hasattr(tower, "pre_layrnorm"):
        x = seen[f"{prefix}.pre_layrnorm:in"]
        found |= norm_activations("vision.ln_pre", tower.pre_layrnorm, x)
    for layer in range(n_layers):
        there, here = f"{prefix}.encoder.layers.{layer}", f"vision.blocks.{layer}"
        block = tower.encoder.layers[layer]
        found |= norm_activations(f"{here}.ln1", block.layer_norm1, seen[f"{there}:in"])
        mid = seen[f"{there}.layer_norm2:in"]
        found |= norm_activations(f"{here}.ln2", block.layer_norm2, mid)
        found[f"{here}.hook_resid_mid"] = mid
        names = ("out_proj", "fc1", "fc2")
        found |= block_activations(seen, there, here, by_head, names)
    return found


@torch.no_grad()
def hf_activations(hf: nn.Module, prompts: Prompts, tower_layers: int) -> tuple[Any, dict]:
    """Transformers' output in eager attention, and its activations under our names."""
    hf.set_attn_implementation("eager")
    multimodal = hasattr(hf.config, "vision_config")
    text = hf.config.text_config if multimodal else hf.config
    seen: dict[str, Tensor] = {}
    in_decoder: list[tuple[Tensor, ...]] = []
    in_tower: list[tuple[Tensor, ...]] = []
    how: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(recorded(dict(hf.named_modules()), seen))
        stack.enter_context(recorded_attention(SOURCES[text.model_type], in_decoder, how))
        if multimodal:
            tower = SOURCES[hf.config.vision_config.model_type]
            stack.enter_context(recorded_attention(tower, in_tower))
        output = hf(**prompts.for_hf(), output_hidden_states=True, output_attentions=True)
    alone = hf.base_model_prefix
    found = decoder_activations(hf, "model.language_model" if multimodal else alone, seen)
    for layer, attended in enumerate(in_decoder):
        prefix = f"blocks.{layer}.attn"
        found |= attention_activations(prefix, *attended, rotary=True, how=how[layer])
    if prompts.pixel_values is not None:
        found |= tower_activations(hf, tower_layers, seen)
        if hasattr(hf.config, "image_grid_pinpoints"):  # what the tiles are put together to
            found["projector.hook_out"] = torch.cat(list(output.image_outputs.pooler_output))[None]
        if text.model_type == "granite":  # it scales whatever comes in
            scaled = found["projector.hook_out"] * text.embedding_multiplier
            found["projector.hook_out"] = scaled
        for layer, attended in enumerate(in_tower[:tower_layers]):
            prefix = f"vision.blocks.{layer}.attn"
            found |= attention_activations(prefix, *attended, rotary=False)
    return output, found


def siglip_activations(
    hf: Any, prefix: str, seen: dict[str, Tensor], attended: Sequence[tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """Those of a SigLIP tower with its last norm, but for the learnt positions.

    Args:
        hf: transformers' whole model.
        prefix: of the tower in it.
        seen: what `recorded` has recorded.
        attended: what `recorded_attention` has of the tower's layers.
    """
    tower = hf.get_submodule(prefix)
    by_head = heads(tower.config.hidden_size // tower.config.num_attention_heads)
    patches = seen[f"{prefix}.embeddings.patch_embedding:out"]
    norm = f"{prefix}.post_layernorm"
    found = {
        "vision.hook_patch_embed": patches.flatten(2).transpose(1, 2),
        "vision.hook_embed": seen[f"{prefix}.embeddings:out"],
        "vision.hook_out": seen[f"{norm}:out"],
        **norm_activations("vision.ln_final", tower.post_layernorm, seen[f"{norm}:in"]),
    }
    for layer, block in enumerate(tower.encoder.layers):
        there, here = f"{prefix}.encoder.layers.{layer}", f"vision.blocks.{layer}"
        mid = seen[f"{there}.layer_norm2:in"]
        found |= norm_activations(f"{here}.ln1", block.layer_norm1, seen[f"{there}:in"])
        found |= norm_activations(f"{here}.ln2", block.layer_norm2, mid)
        found[f"{here}.hook_resid_mid"] = mid
        found |= block_activations(seen, there, here, by_head, ("out_proj", "fc1", "fc2"))
        found |= attention_activations(f"{here}.attn", *attended[layer], rotary=False)
    return found
