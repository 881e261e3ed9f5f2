"""Random checkpoints of the formats that transformers does not know, in their published naming,
and what they compute, put together from transformers' own parts.

A `Parts` is a decoder, a tower and a projector; each function of `FORMATS` writes one down as its
format does (config.json and tensors).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from random_models import BOS, EOS, IMAGE, PAD, VOCABULARY, Prompts, enliven, random_prompts
from rounding import rounded_otherwise
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.transformer import HookedMultimodalTransformer

GRID, PATCH = 3, 5
DECODER = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
LLAMA = DECODER | {
    "hidden_size": 30,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "linear", "factor": 3.0},
    "tie_word_embeddings": False,
}
PHI = DECODER | {
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "qk_layernorm": False,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": 21,
    "intermediate_size": 27,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": PATCH,
}
CLIP = TOWER | {"model_type": "clip_vision_model", "image_size": GRID * PATCH, "projection_dim": 13}
# A strip at the right and bottom fills no patch, as 384 = 27 x 14 + 6.
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "image_size": GRID * PATCH + 2}


@dataclass
class Parts:
    """A decoder, a tower and a projector of transformers and torch."""

    decoder: Any
    tower: Any
    projector: nn.Sequential
    layer: int = -2
    drops_first: bool = True
    """Whether the first position of the tower is left out."""
    image_id: int = VOCABULARY
    """What stands in the tokens for every visual token."""

    @property
    def n_visual(self) -> int:
        has_class_token = isinstance(self.tower, CLIPVisionModel)
        return GRID * GRID + has_class_token - self.drops_first

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """What the images become, as LLaVA's `encode_images` does it."""
        features = self.tower(pixels, output_hidden_states=True).hidden_states[self.layer]
        return self.projector(features[:, self.drops_first :])

    def embeddings(self, prompts: Prompts) -> dict[str, Tensor]:
        """The decoder's arguments, with the images spliced in."""
        visual = prompts.tokens == self.image_id
        embeds = self.decoder.get_input_embeddings()(prompts.tokens.masked_fill(visual, 0))
        if prompts.pixel_values is not None:
            embeds[visual] = self.visual_tokens(prompts.pixel_values).flatten(0, 1)
        return {"inputs_embeds": embeds, "attention_mask": prompts.attention_mask}

    def prompts(self, images: list[int], text_last: bool = False) -> Prompts:
        """Random ones; the image token is the first id after the vocabulary."""
        shape = SimpleNamespace(vision_config=self.tower.config, image_seq_length=self.n_visual)
        prompts = random_prompts(shape, images, text_last=text_last)
        tokens = prompts.tokens.masked_fill(prompts.tokens == IMAGE, VOCABULARY)
        pixels = prompts.pixel_values
        dtype = self.projector[0].weight.dtype
        return Prompts(tokens, prompts.attention_mask, None if pixels is None else pixels.to(dtype))

    def rounded_otherwise(self) -> Parts:
        """A copy whose parts round everything by one unit more."""
        kinds = ("decoder", "tower", "projector")
        return replace(self, **{kind: rounded_otherwise(getattr(self, kind)) for kind in kinds})

    def double(self) -> Parts:
        """In float64."""
        for part in (self.decoder, self.tower, self.projector):
            part.double()
        return self


def parts(
    decoder: str,
    tower: str,
    depth: int = 2,
    layer: int = -2,
    drops_first: bool | None = None,
    vocabulary: int = VOCABULARY,
) -> Parts:
    """Random ones, in float32."""
    size = {"vocab_size": vocabulary}
    text: Any = LlamaForCausalLM if decoder == "llama" else PhiForCausalLM
    text_config: Any = (
        LlamaConfig(**LLAMA | size) if decoder == "llama" else PhiConfig(**PHI | size)
    )
    vision: Any = CLIPVisionModel if tower == "clip" else SiglipVisionModel
    vision_config: Any = (
        CLIPVisionConfig(**CLIP) if tower == "clip" else SiglipVisionConfig(**SIGLIP)
    )
    widths = [vision_config.hidden_size, *[text_config.hidden_size] * depth]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.GELU()] * bool(layers) + [nn.Linear(d_in, d_out)]
    return Parts(
        enliven(text(text_config)),
        enliven(vision(vision_config)),
        enliven(nn.Sequential(*layers)),
        layer,
        tower == "clip" if drops_first is None else drops_first,
    )


# Tensors under their published names


def decoder_tensors(made: Parts, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in made.decoder.state_dict().items()}


def tower_tensors(made: Parts, prefix: str) -> dict[str, Tensor]:
    """transformers has had `vision_model.` in front of these names, and is losing it."""
    return {
        f"{prefix}vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in made.tower.state_dict().items()
        if not name.endswith("position_ids")
    }


def projector_tensors(made: Parts, name: str) -> dict[str, Tensor]:
    linear = len(made.projector) == 1
    return {
        f"{name}.{key.removeprefix('0.') if linear else key}": tensor
        for key, tensor in made.projector.state_dict().items()
    }


def projector_type(made: Parts) -> str:
    depth = len(made.projector) // 2 + 1
    return "linear" if depth == 1 else f"mlp{depth}x_gelu"


# Formats

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json and the tensors."""


def mm_fields(made: Parts) -> dict[str, Any]:
    """What LLaVA's code adds to the decoder's config.json."""
    is_clip = isinstance(made.tower, CLIPVisionModel)
    return {
        "image_aspect_ratio": "pad",
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_projector_type": projector_type(made),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch" if made.drops_first or not is_clip else "cls_patch",
        "mm_vision_select_layer": made.layer,
        "mm_vision_tower": "tower",
        "torch_dtype": "float32",
        "use_mm_proj": True,
    }


def vocabulary(made: Parts) -> dict[str, int]:
    return {"vocab_size": made.decoder.config.vocab_size}


def llava(made: Parts) -> Checkpoint:
    config = LLAMA | vocabulary(made) | mm_fields(made)
    config |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
    buffers = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(3) for layer in range(3)
    }
    tensors = decoder_tensors(made) | projector_tensors(made, "model.mm_projector") | buffers
    return config, tensors | tower_tensors(made, "model.vision_tower.vision_tower.")


def bunny(made: Parts) -> Checkpoint:
    """As published: without a bias in the head, SigLIP's last layer and its pooling."""
    config = PHI | vocabulary(made) | mm_fields(made)
    del config["mm_vision_select_feature"], config["mm_vision_select_layer"]
    config |= {"architectures": ["BunnyPhiForCausalLM"], "model_type": "bunny-phi"}
    made.decoder.lm_head.bias.data.zero_()
    tensors = decoder_tensors(made) | projector_tensors(made, "model.mm_projector")
    del tensors["lm_head.bias"]
    tower = tower_tensors(made, "model.vision_tower.vision_tower.")
    left_out = (".head.", f".layers.{TOWER['num_hidden_layers'] - 1}.")
    return config, tensors | {
        name: tensor for name, tensor in tower.items() if not any(x in name for x in left_out)
    }


def tinyllava(made: Parts) -> Checkpoint:
    is_phi = isinstance(made.decoder, PhiForCausalLM)
    text = PHI | {"model_type": "phi"} if is_phi else LLAMA | {"model_type": "llama"}
    is_clip = isinstance(made.tower, CLIPVisionModel)
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "connector_type": projector_type(made),
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "llm_model_name_or_path": "microsoft/phi-2",
        "model_type": "tinyllava",
        "text_config": text | vocabulary(made) | {"torch_dtype": "float32"},
        "vision_config": CLIP if is_clip else SIGLIP,
        "vision_feature_layer": made.layer,
        "vision_feature_select_strategy": "patch" if made.drops_first else "cls_patch",
        "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
    }
    return config, (
        decoder_tensors(made, "language_model.")
        | tower_tensors(made, "vision_tower._vision_tower.")
        | projector_tensors(made, "connector._connector")
    )


def llava_phi(made: Parts) -> Checkpoint:
    """LLaVA-Phi: tower and projector spelt out in `vision_config`."""
    fields = mm_fields(made)
    selection = {key: fields[key] for key in ("mm_vision_select_feature", "mm_vision_select_layer")}
    tower = CLIP | selection | {"model_type": "llava_phi_clip_vision_model"}
    config = PHI | {
        **vocabulary(made),
        "architectures": ["LlavaPhiForCausalLM"],
        "model_type": "llava_phi",
        "image_aspect_ratio": "pad",
        "vision_config": {
            "vision_tower": tower,
            "mm_projector": {"mm_projector_type": fields["mm_projector_type"]},
        },
    }
    return config, (
        decoder_tensors(made)
        | projector_tensors(made, "model.mm_projector")
        | tower_tensors(made, "model.vision_tower.")
    )


def llava_phi_flat(made: Parts) -> Checkpoint:
    """LLaVA's code with a Phi in it: LLaVA's fields, no bias in the head."""
    config = PHI | vocabulary(made) | mm_fields(made)
    config |= {"architectures": ["LlavaPhiForCausalLM"], "model_type": "llava_phi"}
    made.decoder.lm_head.bias.data.zero_()
    tensors = decoder_tensors(made) | projector_tensors(made, "model.mm_projector")
    del tensors["lm_head.bias"]
    return config, tensors | tower_tensors(made, "model.vision_tower.vision_tower.")


def llava_phi_msft(made: Parts) -> Checkpoint:
    """The first layout of Phi-2: fused queries, keys and values, its own names throughout."""
    config = {
        "architectures": ["LlavaPhiForCausalLM"],
        "model_type": "phi-msft",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_embd": PHI["hidden_size"],
        "n_head": PHI["num_attention_heads"],
        "n_head_kv": PHI["num_key_value_heads"],
        "n_inner": PHI["intermediate_size"],
        "n_layer": PHI["num_hidden_layers"],
        "n_positions": 128,
        "rotary_dim": 4,
        "tie_word_embeddings": False,
        **vocabulary(made),
        **mm_fields(made),
    }
    theirs = decoder_tensors(made)
    tensors = {"transformer.embd.wte.weight": theirs["model.embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        tensors[f"lm_head.ln.{kind}"] = theirs[f"model.final_layernorm.{kind}"]
        tensors[f"lm_head.linear.{kind}"] = theirs[f"lm_head.{kind}"]
        for layer in range(3):
            old, new = f"transformer.h.{layer}", f"model.layers.{layer}"
            qkv = [theirs[f"{new}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{old}.mixer.Wqkv.{kind}"] = torch.cat(qkv)
            tensors[f"{old}.mixer.out_proj.{kind}"] = theirs[f"{new}.self_attn.dense.{kind}"]
            tensors[f"{old}.ln.{kind}"] = theirs[f"{new}.input_layernorm.{kind}"]
            tensors[f"{old}.mlp.fc1.{kind}"] = theirs[f"{new}.mlp.fc1.{kind}"]
            tensors[f"{old}.mlp.fc2.{kind}"] = theirs[f"{new}.mlp.fc2.{kind}"]
    return config, (
        tensors
        | projector_tensors(made, "transformer.mm_projector")
        | tower_tensors(made, "transformer.vision_tower.vision_tower.")
    )


# Folders


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1, pickled: bool = False) -> None:
    """One file or several with an index, as transformers writes them."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    write: Callable[[dict[str, Tensor], Path], None] = torch.save if pickled else save_file  # type: ignore[assignment]
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        write(tensors, folder / f"{stem}.{suffix}")
        return
    names = [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        write({name: t for name, t in tensors.items() if where[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write(folder: Path, checkpoint: Checkpoint, **how: Any) -> Path:
    """The folder. Where it names its tower "tower", that one's sizes lie in it, not its weights."""
    config, tensors = checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save(folder, tensors, **how)
    if config.get("mm_vision_tower") == "tower" and not (folder / "tower").exists():
        is_clip = any("class_embedding" in name for name in tensors)
        (folder / "tower").mkdir()
        (folder / "tower" / "config.json").write_text(json.dumps(CLIP if is_clip else SIGLIP))
    return folder


def write_tower(folder: Path, made: Parts) -> Path:
    """The tower's own checkpoint, as transformers writes it."""
    made.tower.save_pretrained(folder)
    return folder


def inputs(model: HookedMultimodalTransformer, prompts: Prompts) -> MultimodalInputs:
    return prompts.for_mmlens(model)


def some_images() -> list[int]:
    """Numbers of images of the rows of a batch."""
    return random.choice([[1, 0, 2], [2, 1], [0, 3, 1]])
