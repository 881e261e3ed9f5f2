"""Models and prompts to measure with: the demo's, or a published model's shape with random weights.

Where the weights of all layers don't fit into memory (LLaVA-1.5-7B's in float32 are 28 GB), layers
share the weights of the first ones, again and again: what is computed, and its cost, are the same.

What is wrapped by others (`decoder(case)`) are transformers' own modules whose parameters are views
of mmlens's: the weights are the same, and in memory once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Idefics3ImageProcessor,
    LlamaConfig,
    LlavaOnevisionImageProcessor,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLImageProcessor,
    SiglipVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from mmlens import HookedMultimodalTransformer, MultimodalInputs, demo_questions, swap_span
from mmlens.checkpoints.decoders import decoder_fields
from mmlens.checkpoints.formats import language_model
from mmlens.checkpoints.hf_configs import vision_config
from mmlens.checkpoints.towers.qwen_vl import merger_config, tower_config
from mmlens.config import AnyResConfig, MultimodalConfig, ProjectorConfig, VisionConfig
from mmlens.demo.language_model import language_model_folder
from mmlens.inputs.layouts import ProcessedImage, image_layout
from mmlens.inputs.layouts.row_col import FENCE, WHOLE
from mmlens.inputs.spans import PLACEHOLDER
from mmlens.utils.memory import free_memory


@dataclass(frozen=True)
class Case:
    """A model, a clean and a corrupted prompt, and where they differ."""

    name: str
    model: HookedMultimodalTransformer
    hf_config: Any
    """Of the decoder alone."""
    clean: MultimodalInputs
    corrupted: MultimodalInputs
    constraint: tuple[int, ...]
    """Positions of the swapped words."""
    n_distinct_layers: int | None = None
    """How many layers have weights of their own; None: all."""

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.model.device

    def embeddings(self, inputs: MultimodalInputs) -> Tensor:
        """What enters the first layer: the decoder's prompt, with the visual tokens in."""
        with torch.no_grad():
            return self.model.input_embeddings(inputs)

    def decoder(self) -> Any:
        """Transformers' decoder with the same weights (SDPA attention)."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                self.hf_config, dtype=self.model.cfg.dtype, attn_implementation="sdpa"
            )
        ours = dict(self.model.named_parameters(remove_duplicate=False))
        for name, slot in language_model.FORMAT.table(self.model.cfg).items():
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(slot.of(ours).detach(), requires_grad=False)
            setattr(lm.get_submodule(owner), leaf, value)
        lm.tie_weights()
        if self.model.cfg.tie_word_embeddings:
            lm.lm_head.weight = lm.model.embed_tokens.weight
        # What is computed from the configuration, and not among the weights.
        several_axes = "mrope_section" in self.model.cfg.rope_parameters
        rotary = PlacedRotary(self) if several_axes else type(lm.model.rotary_emb)(self.hf_config)
        lm.model.rotary_emb = rotary.to(self.device)
        left = [name for name, value in lm.named_parameters() if value.is_meta]
        assert not left, left
        return lm.eval()


@dataclass(frozen=True)
class Tiled:
    """How a model sees an image in tiles, and the size of the one that is measured."""

    layout: str
    """Of `mmlens.inputs.layouts`."""
    projector: dict[str, Any]
    """What its configuration has beside the sizes."""
    image_processor: Any
    """transformers' own."""
    size: tuple[int, int]
    """Width and height of the image."""
    tokenizer: Any = None
    """Knows the text between the tiles, where there is any."""

    def image(self, cfg: MultimodalConfig) -> ProcessedImage:
        """Return a grey image of that size as the family's processor makes it."""
        grey = Image.new("RGB", self.size, (90, 120, 80))
        (image,) = image_layout(cfg).processed(self.image_processor, self.tokenizer, [grey])
        return image


class PlacedRotary(nn.Module):
    """Stands for the rotary embedding of transformers' decoder, where positions have three axes.

    Those follow from the prompt, and not from the decoder's inputs.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        positions = case.clean.rope_positions
        self.cos, self.sin = case.model.rotary_angles(positions, case.model.cfg.dtype)["global"]

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [batch, pos, d_head] of some positions of the prompt."""
        return self.cos[0, position_ids, 0], self.sin[0, position_ids, 0]


def random_weights(model: HookedMultimodalTransformer) -> HookedMultimodalTransformer:
    """Weights that keep activations of order 1, and an answer that stands out."""
    generator = torch.Generator(model.device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.data.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith(".w"):
            parameter.data.fill_(1.0)
    model.ln_final.w.data.fill_(6.0)  # logits spread by 6, so that one token gets much
    return model.requires_grad_(False)


def share_layers(model: HookedMultimodalTransformer) -> int | None:
    """Let later layers share the weights of the first ones, where not all fit into main memory.

    That is taken when weights are written, so it is still free; half of it is left to activations.
    A GPU's has been taken already.

    Returns:
        How many layers have weights of their own; None: all.
    """
    if model.device.type != "cpu":
        return None
    n_layers, size = len(model.blocks), sum(p.nbytes for p in model.parameters())
    layer = sum(p.nbytes for p in model.blocks[0].parameters())
    n = n_layers
    while n > 1 and size - (n_layers - n) * layer > free_memory(model.device) / 2:
        n //= 2
    for index in range(n, n_layers):
        for name, shared in model.blocks[index % n].named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(model.blocks[index].get_submodule(owner), leaf, shared)
    return n if n < n_layers else None


def random_case(
    name: str,
    hf_config: Any,
    tower: VisionConfig,
    device: torch.device,
    dtype: torch.dtype,
    before: int,
    suffix: int,
    tiled: Tiled | None = None,
    n_layers: int | None = None,
    rope: dict[str, Any] | None = None,
) -> Case:
    """A prompt of BOS, one image, `before` words, and `suffix` more, the first two swapped.

    Args:
        tiled: how images are cut into tiles; by default there is one grid.
        n_layers: of the decoder, where that is less than the shape has.
        rope: what the decoder's rotary embedding has besides.
    """
    if n_layers is not None:
        name = f"{name}, {n_layers} of its {hf_config.num_hidden_layers} layers"
        hf_config = type(hf_config)(
            **hf_config.to_dict() | {"num_hidden_layers": n_layers, "layer_types": None}
        )
    d_model, fields = hf_config.hidden_size, decoder_fields(hf_config)
    cfg = MultimodalConfig(
        **fields | {"rope_parameters": fields["rope_parameters"] | (rope or {})},
        image_token_id=hf_config.vocab_size - 1,
        image_layout=tiled.layout if tiled else "one_grid",
        vision=tower,
        projector=ProjectorConfig(
            **{
                "d_in": tower.d_model * len(tower.feature_layers),
                "d_hidden": d_model,
                "d_out": d_model,
                **(tiled.projector if tiled else {}),
            }
        ),
        model_name=name,
    )
    with torch.device("meta"):
        model = HookedMultimodalTransformer(cfg).to(dtype)
    model = model.to_empty(device=device)
    if cfg.tie_word_embeddings:  # each of the two has been allocated
        model.unembed.weight = model.embed.W_E
    n_distinct_layers = share_layers(model)
    model = random_weights(model)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 20_000, (before + suffix,), generator=generator)
    image = tiled.image(cfg) if tiled else image_layout(cfg).random_image(generator)
    model.tokenizer = tiled.tokenizer if tiled else None
    tokens = torch.cat([torch.tensor([1]), torch.tensor(image.ids), words])[None]
    clean = model.inputs_from_tokens(tokens, **dict[str, Any](image.visual))
    start = clean.n_pos - suffix
    constraint = tuple(range(start, min(start + 2, clean.n_pos)))
    changed = clean.tokens.clone()
    changed[0, list(constraint)] += 7
    corrupted = replace(clean, tokens=changed)
    return Case(name, model, hf_config, clean, corrupted, constraint, n_distinct_layers)


def demo(device: torch.device, dtype: torch.dtype, **_: Any) -> Case:
    """The embedded model, a flag, and a question about its capital."""
    model = HookedMultimodalTransformer.from_pretrained("demo", device=device, dtype=dtype)
    question = demo_questions(relation="capital")[0]
    clean = model.prepare(
        question.question, question.image, spans={"constraint": question.visual_constraint}
    )
    corrupted = swap_span(model, clean, "constraint", "Paris")
    constraint = tuple(clean.span("constraint").tolist())
    config = AutoConfig.from_pretrained(language_model_folder())
    return Case("demo", model, config, clean, corrupted, constraint)


def stand_in_tower(side: int, columns: int | None = None) -> VisionConfig:
    """A tower of one narrow layer: for a decoder's shape, where the tower is not what is measured.

    Args:
        side: rows of patches.
        columns: by default as many.
    """
    hf = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=(14 * side, 14 * (columns or side)),
        patch_size=14,
    )
    return vision_config(hf, -1, "default")


def smollm2(**options: Any) -> Case:
    """SmolLM2-135M's shape with 576 visual tokens."""
    return random_case("SmolLM2-135M shape", smollm2_config(), stand_in_tower(24), **options)


def smollm2_config(n_layers: int = 30) -> LlamaConfig:
    """SmolLM2-135M's sizes (its published config.json)."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=n_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )


def llava_7b(**options: Any) -> Case:
    """LLaVA-1.5-7B's shape: Vicuna-7B, CLIP ViT-L/14 at 336 pixels, 576 visual tokens."""
    decoder = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, num_key_value_heads=32)
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        image_size=336,
        patch_size=14,
    )
    return random_case(
        "LLaVA-1.5-7B shape", decoder, vision_config(tower, -2, "default"), **options
    )


def bunny_3b(**options: Any) -> Case:
    """Bunny-v1.0-3B's shape: Phi-2, SigLIP so400m at 384 pixels, 729 visual tokens."""
    decoder = PhiConfig(
        vocab_size=50295,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.4,
        },
    )
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        num_hidden_layers=27,
        image_size=384,
        patch_size=14,
    )
    return random_case("Bunny-3B shape", decoder, vision_config(tower, -1, "full"), **options)


def onevision_05b(**options: Any) -> Case:
    """LLaVA-OneVision 0.5B's decoder with the most visual tokens: 10 x 729, and 81 line ends."""
    decoder = Qwen2Config(
        vocab_size=152000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    )
    tower = stand_in_tower(27)
    tiles = AnyResConfig(
        resolutions=((3 * 378, 3 * 378),), tile_size=378, tile_grid=tower.grid, max_tiles=9
    )
    processor = LlavaOnevisionImageProcessor(
        size={"height": 378, "width": 378}, image_grid_pinpoints=[[3 * 378, 3 * 378]]
    )
    tiled = Tiled("anyres", {"anyres": tiles}, processor, (3 * 378, 3 * 378))
    return random_case("OneVision-0.5B shape", decoder, tower, tiled=tiled, **options)


def smolvlm_256m(**options: Any) -> Case:
    """SmolVLM-256M's decoder (SmolLM2-135M) with its most tokens: 4 x 4 tiles and the whole.

    Each has 32 x 32 patches, of which 64 visual tokens are made, after two tokens of text.
    """
    tower = replace(
        stand_in_tower(32),
        class_token=False,
        pre_norm=False,
        final_norm=True,
        patch_bias=True,
        positions="nearest",
        select="full",
    )
    side, n_words = 14 * 32, 49152
    processor = Idefics3ImageProcessor(
        size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}
    )
    tiled = Tiled(
        "row_col",
        {"pixel_shuffle": 4, "n_layers": 1, "bias": False},
        processor,
        (4 * side, 4 * side),
        tokenizer_of_tags(n_words),
    )
    decoder = smollm2_config()
    decoder.vocab_size = n_words + 128
    decoder.max_position_embeddings = 8192
    return random_case("SmolVLM-256M shape", decoder, tower, tiled=tiled, **options)


def tokenizer_of_tags(n_words: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbered words that knows the tags of SmolVLM's tiles after them.

    The image token has the last id, as everywhere here.
    """
    tags = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    named = ["\n", FENCE, WHOLE, *tags]
    words = [f"<word {i}>" for i in range(n_words + 128)]
    words[n_words : n_words + len(named)] = named
    words[-1] = PLACEHOLDER
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_tokens([AddedToken(tag, special=True) for tag in [*named, PLACEHOLDER]])
    return fast


def qwen2_5_vl_3b(**options: Any) -> Case:
    """Qwen2.5-VL-3B's decoder and 1,200 visual tokens: an image of 840 x 1,120 pixels."""
    decoder = Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=128000,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    )
    hf = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=2048,
        fullatt_block_indexes=[1],
    )
    tower = tower_config(hf)
    merger = vars(merger_config(tower, hf, decoder.hidden_size))
    tiled = Tiled("any_grid", merger, Qwen2VLImageProcessor(), (840, 1120))
    sections = {"mrope_section": [16, 24, 24], "mrope_interleaved": False}
    return random_case("Qwen2.5-VL-3B shape", decoder, tower, tiled=tiled, rope=sections, **options)


SHAPES: dict[str, Callable[..., Case]] = {
    "demo": demo,
    "smollm2": partial(smollm2, before=13, suffix=22),
    "llava-7b": partial(llava_7b, before=14, suffix=30),
    "onevision-0.5b": partial(onevision_05b, before=14, suffix=30),
    "smolvlm-256m": partial(smolvlm_256m, before=14, suffix=30),
    "bunny-3b": partial(bunny_3b, before=14, suffix=30),
    "qwen2.5-vl-3b": partial(qwen2_5_vl_3b, before=14, suffix=30),
}


def build(name: str, **options: Any) -> Case:
    """A shape by its name, on the GPU (bfloat16) if there is one, else on the CPU (float32).

    Args:
        options: of the shape, such as `n_layers`.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda and name != "demo" else torch.float32
    return SHAPES[name](device=device, dtype=dtype, **options)
