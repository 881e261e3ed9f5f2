"""Small random multimodal transformers of odd sizes, and random prompts for them.

Built from a config alone, without a checkpoint. Weights are large, so that every edit changes the
answer's probability by far more than any tolerance.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from small_tokenizers import small_tokenizer
from torch import Tensor

from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import LAYERED_SITES, hook_name
from mmlens.model.transformer import HookedMultimodalTransformer

D_VOCAB = 61
IMAGE, PAD, BOS = 60, 0, 1

# Choices that change how attention is added to the stream.
KINDS = {
    "plain": {"o_bias": False, "qkv_bias": False},
    "biased": {"o_bias": True, "qkv_bias": True},
    "normalised queries": {"qk_norm": True},
    "parallel": {"parallel_attn_mlp": True, "normalization_type": "LN"},
    "local": {"n_layers": 3, "attn_types": ("local", "global", "local"), "window_size": 3},
    "sandwich": {
        "normalization_type": "RMS",
        "post_norms": True,
        "norm_offset": 1.0,
        "embed_scale": 2.5,
        "attn_scale": 1.7,
        "scores_softcap": 3.0,
    },
}


SITES_WITHOUT_LAYERS = [
    name for name, site in HookedMultimodalTransformer.SITES.items() if not site.is_layered
]


def sites_of(model: HookedMultimodalTransformer) -> list[str]:
    """The layered sites that the model's decoder has."""
    return [site for site in LAYERED_SITES if hook_name(site, 0) in model.hook_dict]


def small_config(chance: random.Random, **choices: Any) -> MultimodalConfig:
    """A config of random odd sizes; `choices` fixes fields of the decoder."""
    n_kv_heads = chance.choice([1, 1, 2, 3])
    sizes: dict[str, Any] = {
        "n_layers": chance.randint(2, 6),
        "d_model": chance.choice([11, 18, 25]),
        "n_key_value_heads": n_kv_heads,
        "n_heads": n_kv_heads * chance.choice([1, 2, 3]),
        "d_head": chance.choice([4, 6, 10]),
        "d_mlp": chance.choice([13, 29]),
        "gated_mlp": chance.random() < 0.8,
        "normalization_type": chance.choice(["RMS", "RMS", "LN"]),
        "qkv_bias": chance.random() < 0.4,
        "o_bias": chance.random() < 0.3,
        "mlp_bias": chance.random() < 0.3,
        "tie_word_embeddings": chance.random() < 0.3,
        "d_vocab": D_VOCAB,
        "image_token_id": IMAGE,
        "bos_token_id": BOS,
        **choices,
    }
    rows, columns = chance.choice([(1, 2), (2, 3), (3, 1)])
    vision = VisionConfig(
        n_layers=2,
        d_model=10,
        n_heads=2,
        d_head=5,
        d_mlp=17,
        act_fn="quick_gelu",
        normalization_type="LN",
        eps=1e-5,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        image_size=(4 * rows, 4 * columns),
        patch_size=4,
        feature_layers=chance.choice([(2,), (1, 2)]),
        select=chance.choice(["default", "full"]),
        final_norm=True,  # as Idefics3's; transformers' towers without one are in other tests
    )
    projector = ProjectorConfig(
        d_in=10 * len(vision.feature_layers),
        d_hidden=15,
        d_out=sizes["d_model"],
        normalization_type="LN",  # as Qwen-VL's
    )
    return MultimodalConfig(
        act_fn="silu",
        eps=1e-6,
        n_ctx=256,
        vision=vision,
        projector=projector,
        **sizes,
    )


def small_model(seed: int, **choices: Any) -> HookedMultimodalTransformer:
    """A random model that follows from `seed`, in float32."""
    model = HookedMultimodalTransformer(small_config(random.Random(seed), **choices))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return model.requires_grad_(False)


def any_family(seed: int, **choices: Any) -> HookedMultimodalTransformer:
    """The same, by chance with parallel blocks, with layers that look back a few
    positions, or with normalised queries."""
    chance = random.Random(seed)
    n_layers = choices.pop("n_layers", chance.randint(2, 6))
    kind = chance.choice(["plain", "parallel", "local", "normalised"])
    if kind == "normalised":
        choices = {"qk_norm": True, **choices}
    elif kind == "parallel":
        choices = {"parallel_attn_mlp": True, **choices}
    elif kind == "local":
        choices = {**windows(chance, n_layers), **choices}
    return small_model(seed, n_layers=n_layers, **choices)


def any_attention(seed: int, **choices: Any) -> HookedMultimodalTransformer:
    """The same, or one whose images or prompts attend to themselves in both directions, with norms
    after attention and MLP."""
    chance = random.Random(seed + 1)
    kind = chance.choice(["image", "prompt", None])
    if kind is None:
        return any_family(seed, **choices)
    n_layers = choices.pop("n_layers", chance.randint(2, 6))
    choices = {"attention_blocks": kind, **windows(chance, n_layers), **choices}
    return small_model(seed, n_layers=n_layers, **KINDS["sandwich"] | choices)


def windows(chance: random.Random, n_layers: int) -> dict[str, Any]:
    """Windows in some layers."""
    types = tuple(chance.choice(["local", "global"]) for _ in range(n_layers))
    return {"attn_types": types, "window_size": chance.choice([1, 3, 7])}


def language_model(seed: int, **choices: Any) -> HookedMultimodalTransformer:
    """The same without eyes."""
    cfg = small_config(random.Random(seed), **choices)
    cfg.vision = cfg.projector = cfg.image_token_id = None
    model = HookedMultimodalTransformer(cfg)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    return model.requires_grad_(False)


def worded_model(seed: int, kind: str = "bytes", **choices: Any) -> HookedMultimodalTransformer:
    """A small model with a tokenizer (of `small_tokenizers.KINDS`) and an image processor."""
    tokenizer = small_tokenizer(kind)
    model = small_model(
        seed,
        d_vocab=len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        bos_token_id=tokenizer.bos_token_id,
        **choices,
    )
    assert model.cfg.vision is not None
    height, width = model.cfg.vision.image_size

    def process(pictures: list[Image.Image]) -> Tensor:
        arrays = [np.asarray(picture.resize((width, height))) for picture in pictures]
        return torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2) / 64.0 - 2.0

    model.tokenizer, model.image_processor = tokenizer, process
    return model


def picture(seed: int) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8))


def small_inputs(
    model: HookedMultimodalTransformer,
    seed: int,
    images: tuple[int, ...] = (1,),
    words: tuple[int, ...] | None = None,
    **options: Any,
) -> MultimodalInputs:
    """One row per entry of `images`, the number of images in it; padded on the left."""
    chance = random.Random(seed)
    rows = []
    for index, n_images in enumerate(images):
        n_words = chance.randint(4, 7) if words is None else words[index]
        pieces = [[chance.randrange(2, 60)] for _ in range(n_words)]
        for _ in range(n_images):
            assert model.cfg.vision is not None
            visual = [IMAGE] * model.cfg.vision.n_visual_tokens
            # Not after all words: the last position is one of text.
            pieces.insert(chance.randrange(len(pieces)), visual)
        rows.append([BOS, *(token for piece in pieces for token in piece)])
    longest = max(map(len, rows))
    pixels = None
    if sum(images):
        assert model.cfg.vision is not None
        shape = (sum(images), 3, *model.cfg.vision.image_size)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return model.inputs_from_tokens(
        torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        pixels,
        attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        **options,
    )


def plain_run(model: HookedMultimodalTransformer, inputs: MultimodalInputs, branch: Any) -> Tensor:
    """Logits [batch, pos, d_vocab] of a plain hooked run."""
    hooks = [pair for intervention in branch for pair in intervention.fwd_hooks()]
    return model.run_with_hooks(inputs, fwd_hooks=hooks)
