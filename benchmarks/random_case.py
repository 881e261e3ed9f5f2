"""A model of random weights of any sizes, and a prompt for it.

Where the weights of all layers don't fit into memory (LLaVA-1.5-7B's in float32 are 28 GB), layers
share the weights of the first ones, again and again: what is computed, and its cost, are the same.

What is wrapped by others (`decoder(case)`) are transformers' own modules whose parameters are views
of mmlens's: the weights are the same, and in memory once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
)

from mmlens import HookedMultimodalTransformer, MultimodalInputs
from mmlens.checkpoints.decoders import decoder_fields
from mmlens.checkpoints.formats import language_model
from mmlens.config import MultimodalConfig, ProjectorConfig, VisionConfig
from mmlens.inputs.layouts import ProcessedImage, image_layout
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
