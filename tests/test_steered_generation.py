"""Steered generation equals transformers' `generate` with forward hooks, token for token.

In float64, but for norms and rotary angles, which transformers takes in float32. So logits agree to
some 1e-6, and a row is compared up to where its best two tokens are closer than `TIE`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import MADE, Made, without_ids
from torch import Tensor

from mmlens import SteeringVector

NEW = 32
TIE = 1e-4


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
