"""What a trace means: a model whose way to the answer is known, because it is written by hand.

    python examples/planted_circuit.py

"What is the capital of this country ?" is asked about an image with one coloured patch. Six layers
have random weights of small size, and three parts that do something:

- layer 1, attention: the word "country" attends to patches with a colour, and takes the colour;
- layer 3, MLP, at "country": the colour becomes a capital. This is where the fact is stored;
- layer 4, attention: the last word attends to nouns, and takes the capital. It is said.

The trace replaces "country" by "Paris", puts the clean run's activations back one at a time, and
finds these parts. Read every block from the left: the residual stream matters at "country" until
layer 3, and at the last word from layer 4 on, when the capital has been fetched; in between stand
the parts that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import rich
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmlens import (
    HookedMultimodalTransformer,
    MultimodalConfig,
    MultimodalInputs,
    ProjectorConfig,
    VisionConfig,
    causal_trace,
    swap_span,
)
from mmlens.plots.terminal import TerminalHeatmap

WORDS = "<s> <image> What is the capital of this country ? Paris Rome Tokyo Lima".split()
ID = {word: index for index, word in enumerate(WORDS)}
CAPITALS = ["Rome", "Tokyo", "Lima"]
"""Of the countries whose patch is red, green and blue."""

LOOKS, KNOWS, TELLS = 1, 3, 4
"""Layers."""

# Each thing that the residual stream can hold is a dimension of its own. CONSTANT is the same large
# number everywhere, so that norms divide by nearly the same everywhere.
CONSTANT, BEGIN, ASKS, NOUN, LAST = range(5)
COLOR, SEEN, SAID = range(5, 8), range(8, 11), range(11, 14)
D_MODEL, SIZE, D_HEAD = 14, 64.0, 6


def words_and_images() -> tuple[PreTrainedTokenizerFast, Callable[[list[Image.Image]], Tensor]]:
    """A tokenizer with a token for each word, and an image processor that does nothing else."""
    tokenizer = Tokenizer(WordLevel(ID, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})

    def process(pictures: list[Image.Image]) -> Tensor:
        arrays = np.stack([np.asarray(picture) for picture in pictures])
        return torch.tensor(arrays).permute(0, 3, 1, 2) / 255

    return fast, process


def blank_model() -> HookedMultimodalTransformer:
    """Six layers of small random weights; a tower that hands over the mean colour of each patch."""
    sizes = {"n_heads": 1, "normalization_type": "RMS", "eps": 1e-6, "act_fn": "gelu"}
    vision = VisionConfig(
        n_layers=1,
        d_model=3,
        d_head=3,
        d_mlp=3,
        image_size=(4, 6),
        patch_size=2,
        feature_layers=(0,),
        select="full",
        class_token=False,
        pre_norm=False,
        **sizes,
    )
    cfg = MultimodalConfig(
        n_layers=6,
        d_model=D_MODEL,
        d_head=D_HEAD,
        d_mlp=8,
        d_vocab=len(WORDS),
        n_ctx=32,
        # The first two dimensions of a head know positions; the others are for what is planted.
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 2 / D_HEAD},
        image_token_id=ID["<image>"],
        default_prepend_bos=True,  # where attention rests; the tokenizer adds none itself
        vision=vision,
        projector=ProjectorConfig(d_in=3, d_hidden=3, d_out=D_MODEL, n_layers=1),
        **sizes,
    )
    model = HookedMultimodalTransformer(cfg, *words_and_images())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        is_norm = ".ln" in name or name.startswith("ln")
        parameter.data.fill_(1.0) if is_norm else parameter.data.normal_(
            0, 0.01, generator=generator
        )
    model.vision.patch_embed.weight.data = torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2) / 4
    model.vision.W_pos.data.zero_()
    return model.requires_grad_(False)


def plant(model: HookedMultimodalTransformer) -> None:
    """Write the circuit. After a norm every dimension is smaller by 1 / `read`."""
    read = SIZE / D_MODEL**0.5
    model.embed.W_E[:, CONSTANT] = model.projector.linear_1.bias[CONSTANT] = SIZE
    for word, meaning in (("<s>", BEGIN), ("country", ASKS), ("?", LAST)):
        model.embed.W_E[ID[word], meaning] = 1
    model.embed.W_E[[ID["country"], ID["Paris"]], NOUN] = 1
    for i in range(3):
        model.projector.linear_1.weight[COLOR[i], i] = 1

    for layer, query, keys, source, target in (
        (LOOKS, ASKS, COLOR, COLOR, SEEN),
        (TELLS, LAST, [NOUN], SAID, SAID),
    ):
        attn = model.blocks[layer].attn
        # Who asks scores such keys 20; everybody scores the first token 10, and rests there.
        attn.W_Q[0, query, 2] = 20 * D_HEAD**0.5 * read
        attn.W_Q[0, CONSTANT, 3] = 10 * D_HEAD**0.5 / D_MODEL**0.5
        attn.W_K[0, keys, 2] = attn.W_K[0, BEGIN, 3] = read
        for i in range(3):
            attn.W_V[0, source[i], i] = read
            attn.W_O[0, i, target[i]] = 1

    mlp = model.blocks[KNOWS].mlp
    for i in range(3):  # gelu(x) - gelu(-x) = x
        mlp.W_in[SEEN[i], 2 * i], mlp.W_in[SEEN[i], 2 * i + 1] = read, -read
        mlp.W_out[2 * i, SAID[i]], mlp.W_out[2 * i + 1, SAID[i]] = 1, -1
        model.unembed.W_U[SAID[i], ID[CAPITALS[i]]] = 8 * read


def ask(model: HookedMultimodalTransformer, color: str) -> MultimodalInputs:
    """The question about an image whose patch in row 1, column 2 has a colour."""
    picture = Image.new("RGB", (6, 4))
    picture.paste(color, (4, 2, 6, 4))
    return model.prepare(
        "What is the capital of this country ?",
        picture,
        spans={"constraint": "country"},
        template=None,
    )


def main() -> None:
    """Plant, ask, trace, show."""
    model = blank_model()
    plant(model)
    for color in ("red", "lime", "blue"):
        said = model(ask(model, color))[0, -1].softmax(-1)
        print(f"{color:4}: {WORDS[int(said.argmax())]} ({said.max():.3f})")
    clean = ask(model, "red")
    corrupted = swap_span(model, clean, "constraint", "Paris")
    trace = causal_trace(model, clean, corrupted)
    print(f'\nP(Rome) {trace.clean:.3f}; with "Paris" for "country" {trace.corrupted:.3f}')
    rich.print(TerminalHeatmap(trace))


if __name__ == "__main__":
    main()
