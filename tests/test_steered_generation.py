"""Steered generation equals transformers' `generate` with forward hooks, token for token.

In float64, but for norms and rotary angles, which transformers takes in float32. So logits agree to
some 1e-6, and a row is compared up to where its best two tokens are closer than `TIE`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gemma_models
import pytest
import qwen_models
import torch
from anyres_checkpoints import random_image, written
from random_models import SHAPES, hooked, random_llava, random_prompts
from test_gemma_families import in_dtype, without_labels
from test_generation import in_double
from tiled_models import FAMILIES, random_batch, random_idefics, write
from torch import Tensor
from transformers import GenerationConfig

from mmlens import SteeringVector
from mmlens.model.transformer import HookedMultimodalTransformer

NEW = 32
TIE = 1e-4


@dataclass(frozen=True)
class Made:
    """A model as transformers and as mmlens have it, and a batch with padding and images."""

    hf: Any
    model: HookedMultimodalTransformer
    batch: dict[str, Any]

    def decoder_layers(self) -> Any:
        """Transformers' blocks of the language model."""
        inner = self.hf.model
        for name in ("language_model", "text_model"):
            if hasattr(inner, name):
                return getattr(inner, name).layers
        raise AttributeError("no decoder")


def llava(name: str) -> Callable[[int, Path], Made]:
    def make(seed: int, folder: Path) -> Made:
        hf = random_llava(SHAPES[name]).double()
        prompts = in_double(random_prompts(hf.config, [1, 2, 0]))
        given = prompts.for_hf()
        del given["position_ids"]
        return Made(hf, hooked(hf, folder), given)

    return make


def anyres(name: str) -> Callable[[int, Path], Made]:
    def make(seed: int, folder: Path) -> Made:
        made = written(name, folder)
        images = [[random_image(31, 52)], [random_image(40, 19), random_image(8, 8)]]
        texts = ["what is <image> this", "<image> is the capital of <image> this country here"]
        return Made(made.hf.double(), made.model.double(), double(made.batch(texts, images)))

    return make


def idefics(name: str) -> Callable[[int, Path], Made]:
    def make(seed: int, folder: Path) -> Made:
        family = FAMILIES[name]
        hf = random_idefics(family)
        batch = random_batch(write(family, folder, hf), [1, 0, 2], random.Random(seed))
        model = HookedMultimodalTransformer.from_pretrained(folder, device="cpu")
        hf.generation_config = model.generation_config = GenerationConfig()
        return Made(hf.double(), model.double(), double(batch))

    return make


def qwen(family: str) -> Callable[[int, Path], Made]:
    def make(seed: int, folder: Path) -> Made:
        chance = random.Random(seed)
        hf = qwen_models.random_qwen(family, chance)
        processor = qwen_models.write(family, folder, hf)
        batch = qwen_models.random_batch(processor, [1, 0, 2], chance)
        model = HookedMultimodalTransformer.from_pretrained(folder, device="cpu")
        hf.generation_config = model.generation_config = GenerationConfig()
        return Made(hf.double(), model.double(), double(batch))

    return make


def gemma(name: str) -> Callable[[int, Path], Made]:
    def make(seed: int, folder: Path) -> Made:
        # Tied embeddings would let each token be followed by itself.
        family = replace(gemma_models.FAMILIES[name], tied=False)
        hf = gemma_models.random_gemma(family)
        processor = gemma_models.write(family, folder, hf)
        batch = gemma_models.random_batch(family, processor, [1, 2], random.Random(seed))
        model = HookedMultimodalTransformer.from_pretrained(folder, device="cpu").double()
        hf = in_dtype(hf, torch.float64)
        hf.set_attn_implementation("sdpa")  # eager attention of padding is NaN in float64
        return Made(hf, model, double(without_labels(batch)))

    return make


def double(batch: Any) -> dict[str, Any]:
    return {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}


MADE = {
    "LLaVA": llava("grouped queries"),
    "LLaVA, Mistral with windows": llava("mistral, window"),
    "LLaVA-NeXT": anyres("NeXT"),
    "LLaVA-OneVision": anyres("OneVision"),
    "Idefics3": idefics("idefics3"),
    "SmolVLM": idefics("smolvlm"),
    "Qwen2-VL": qwen("qwen2"),
    "Qwen2.5-VL": qwen("qwen2.5"),
    "Gemma 3": gemma("gemma3"),
    "PaliGemma": gemma("paligemma"),
}


class Adding:
    """A forward hook that adds so much of a vector at each position of the whole text."""

    def __init__(self, vector: Tensor, amount: Callable[[int], float], keep_norm: bool) -> None:
        self.vector, self.amount, self.keep_norm, self.seen = vector, amount, keep_norm, 0

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for offset in range(hidden.shape[1]):
            if amount := self.amount(self.seen + offset):
                before = hidden[:, offset]
                after = before + amount * self.vector
                if self.keep_norm:
                    norms = [each.pow(2).sum(-1, keepdim=True).sqrt() for each in (before, after)]
                    after = after * norms[0] / norms[1]
                hidden[:, offset] = after
        self.seen += hidden.shape[1]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@torch.no_grad()
def theirs(made: Made, added: dict[int, Adding]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens and logits of transformers with these hooks on its blocks."""
    blocks = made.decoder_layers()
    with ExitStack() as stack:
        for layer, hook in added.items():
            stack.callback(blocks[layer].register_forward_hook(hook).remove)
        found = made.hf.generate(
            **made.batch,
            max_new_tokens=NEW,
            do_sample=False,
            suppress_tokens=[made.model.cfg.image_token_id],
            eos_token_id=-1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return found.sequences[:, -NEW:], found.logits


def ours(made: Made, steered: Sequence[Any], cached: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same of mmlens."""
    found = made.model.generate(
        **made.batch,
        max_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=[made.model.cfg.image_token_id],
        stop_at_eos=False,
        interventions=steered,
        use_past_kv_cache=cached,
        output_logits=True,
    )
    return found.sequences[:, -NEW:], found.logits


@pytest.mark.parametrize("name", MADE)
def test_steered_generation_equals_transformers(name: str, seed: int, tmp_path: Path) -> None:
    """Some positions of the prompt, and what is generated, each by an amount of its own."""
    chance = random.Random(seed)
    made = MADE[name](seed, tmp_path)
    model = made.model
    inputs = model.inputs_from_tokens(made.batch["input_ids"], **without_ids(made.batch))
    n_pos = inputs.n_pos
    assert not made.batch["attention_mask"].all()  # some row is padded
    layers = sorted(chance.sample(range(model.cfg.n_layers), 2))
    vector = SteeringVector(
        vectors=torch.randn(2, model.cfg.d_model),
        activation_norms=torch.ones(2),
        margins=torch.ones(2, 1),
        layers=tuple(layers),
        site="resid_post",
        method="mean_difference",
    )
    scales = chance.choice([-2.0, 1.5]), chance.choice([-1.0, 2.0])
    keep_norm = chance.random() < 0.5
    prompt = [*chance.sample(range(n_pos - 1), 3), n_pos - 1]
    steered = [
        vector.at(scales[0], prompt, keep_norm=keep_norm),
        vector.at(scales[1], "generated", keep_norm=keep_norm),
    ]

    def amount(position: int) -> float:
        return scales[1] if position >= n_pos else scales[0] * (position in prompt)

    added = {
        layer: Adding(vector.vectors[at].double(), amount, keep_norm)
        for at, layer in enumerate(layers)
    }
    expected, logits = theirs(made, added)
    assert_same(*ours(made, steered, cached=True), expected, logits, made)
    with torch.no_grad():
        plain = model(inputs)[:, -1].float()
    assert float((plain - logits[0]).abs().max()) > TIE
    if name == "LLaVA":
        assert_same(*ours(made, steered, cached=False), expected, logits, made)
        both = vector.of_answers(inputs, 1.5, layers=layers[:1], keep_norm=keep_norm)
        assert [each.layers for each in both] == [tuple(layers[:1])] * 2
        assert [both[0].positions.tolist(), both[1].positions] == [[n_pos - 1], "generated"]
        assert vector.of_answers(inputs, 0) == []


def assert_same(
    tokens: Tensor,
    found: Sequence[Tensor],
    expected: Tensor,
    logits: Sequence[Tensor],
    made: Made,
) -> None:
    """The same tokens and logits, step by step, in the rows that no tie has parted."""
    together = torch.ones(len(expected), dtype=torch.bool)
    for step, (mine, other) in enumerate(zip(found, logits, strict=True)):
        assert float((mine - other)[together].abs().max()) <= TIE / 2
        other = other.clone()
        other[:, made.model.cfg.image_token_id] = -torch.inf
        best = other.topk(2).values
        together &= best[:, 0] - best[:, 1] > TIE
        assert torch.equal(tokens[together, step], expected[together, step])
        if not together.any():
            return


def without_ids(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in batch.items() if name != "input_ids"}
