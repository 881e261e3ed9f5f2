"""Four families for the functions and analyses: one prompt with an image, and torch's hooks.

One whose images are tiles, one with rotary positions of rows and columns, and two that do not
attend causally. In float64, but for norms, rotary angles and eager attention's softmax, which
transformers takes in float32: logits are held to what they are held to in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import MADE, Made
from textbook_patching import PlainHooks
from torch import Tensor
from transformers import LogitsProcessor

LOGITS = 1e-4
LOG_PROBS = 2 * LOGITS
"""A logit, and the logarithm of the sum, may each be off by `LOGITS`; so P is off by no more."""
FAMILIES = ("LLaVA-NeXT", "Qwen2.5-VL", "Gemma 3", "PaliGemma")
EVERY = pytest.mark.parametrize("family", FAMILIES)

Place = tuple[int, str, bool]
"""A layer, a module of transformers' block, and whether it is the module's input."""
Edit = tuple[int, str, bool, Callable[[Tensor], Any]]

PLACES = {
    "resid_pre": ("", True),
    "resid_post": ("", False),
    "z": ("self_attn.o_proj", True),
    "post": ("mlp.down_proj", True),
    "q": ("self_attn.q_proj", False),
    "k": ("self_attn.k_proj", False),
    "v": ("self_attn.v_proj", False),
    "attn_out": ("self_attn", False),
    "resid_mid": ("post_attention_layernorm", True),
    "mlp_in": ("post_attention_layernorm", True),
    "mlp_out": ("mlp", False),
}
"""Of sites: the module of transformers' block, and whether it is its input (heads side by side)."""
WITH_POST_NORMS = {
    "attn_out": ("post_attention_layernorm", False),
    "resid_mid": ("pre_feedforward_layernorm", True),
    "mlp_in": ("pre_feedforward_layernorm", True),
    "mlp_out": ("post_feedforward_layernorm", False),
}
"""Those that are elsewhere where what attention and MLP add is normalised first."""


class Case:
    """One prompt with an image, the same with two words exchanged, and hooks on transformers."""

    def __init__(self, family: str, seed: int, folder: Path) -> None:
        self.family = family
        made: Made = MADE[family](seed, folder, images=[1])
        self.made, self.hf, self.model = made, made.hf, made.model
        tokens = made.batch["input_ids"]
        self.inputs = made.inputs()
        ids = tokens[0].tolist()
        self.words = [at for at in self.inputs.span("text").tolist()[1:] if ids[at] >= 2]
        """Positions of the text, but for its beginning and for special tokens."""
        first, second = next(
            (a, b) for b in self.words[::-1] for a in self.words if a < b and ids[a] != ids[b]
        )
        self.exchanged = [first, second]
        changed = tokens.clone()
        changed[0, [first, second]] = tokens[0, [second, first]]
        self.batches = [made.batch, {**made.batch, "input_ids": changed}]
        self.other = made.inputs(self.batches[1])
        self.hooks = PlainHooks(made.hf, "model.language_model", made.model.cfg.d_head)
        self.chance = random.Random(seed)

    def layer(self, least: int = 0) -> int:
        return self.chance.randrange(least, self.model.cfg.n_layers)

    def place(self, site: str, layer: int) -> Place:
        """Where transformers computes a site."""
        own = WITH_POST_NORMS if self.model.cfg.post_norms else {}
        return (layer, *(own.get(site) or PLACES[site]))

    def theirs(self, edits: Sequence[Edit], batch: dict[str, Any] | None = None) -> Tensor:
        """Transformers' logits [pos, d_vocab] of a prompt."""
        return self.hooks.run(self.batches[0] if batch is None else batch, edits)[0]

    def kept_of(self, batch: dict[str, Any], places: Sequence[tuple[str, int]]) -> list[Tensor]:
        """Activations of transformers [1, pos, width] in one run."""
        named = [self.place(*each) for each in places]
        found = self.hooks.kept(batch, named)
        return [found[each] for each in named]

    def kept(self, run: int, site: str, layer: int) -> Tensor:
        """An activation of transformers in one of the two prompts: [1, pos, width]."""
        return self.kept_of(self.batches[run], [(site, layer)])[0]

    def cut(
        self,
        layers: Sequence[int],
        queries: Any,
        keys: Any,
        heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    ) -> Tensor:
        """Transformers' logits with attention of some heads (in a layer) cut in its mask."""
        n_heads = self.model.cfg.n_heads
        alike = range(n_heads) if heads is None else heads
        by_layer = alike if isinstance(alike, Mapping) else dict.fromkeys(layers, alike)

        def edit(module: Any, args: Any, kwargs: Any, chosen: Any) -> Any:
            mask = kwargs["attention_mask"].expand(-1, n_heads, -1, -1).clone()
            for head in chosen:
                mask[0, head, torch.tensor(queries)[:, None], torch.tensor(keys)] = torch.finfo(
                    mask.dtype
                ).min
            return args, {**kwargs, "attention_mask": mask}

        self.hf.set_attn_implementation("eager")
        with ExitStack() as stack:
            for layer in layers:
                attention = self.hooks.module(layer, "self_attn")

                def hook(module: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
                    return edit(module, args, kwargs, by_layer.get(layer, ()))

                handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            found = self.theirs([])
        self.hf.set_attn_implementation("sdpa")
        return found

    def read(self, resid: Tensor) -> Tensor:
        """Log probabilities [..., d_vocab] of transformers' last norm and unembedding."""
        decoder: Any = self.hf.get_submodule("model.language_model")
        return self.hf.lm_head(decoder.norm(resid)).double().log_softmax(-1)

    def continued(
        self,
        n: int,
        edits: Sequence[Edit] = (),
        *,
        forced: Sequence[int] = (),
        of_every_pass: bool = False,
        run: int = 0,
    ) -> tuple[list[int], list[Tensor]]:
        """What transformers generates after a prompt, and its logits [d_vocab] of each step.

        The edits are of the prompt's own pass, or of every one. Tokens of an answer can be forced.
        """
        n_pos, never = self.inputs.n_pos, self.model.cfg.image_token_id

        def of_prompt(edit: Any) -> Any:
            return lambda x: edit(x) if of_every_pass or x.shape[1] == n_pos else None

        class Forced(LogitsProcessor):
            def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
                wanted = forced[ids.shape[1] - n_pos]
                return torch.full_like(scores, -torch.inf).index_fill(
                    1, torch.tensor([wanted]), 0.0
                )

        options: dict[str, Any] = {"logits_processor": [Forced()]} if forced else {}
        ends = list(self.model.cfg.eos_token_ids) or [-1]
        found = self.hooks.call(
            lambda: self.hf.generate(
                **self.batches[run],
                max_new_tokens=n,
                do_sample=False,
                suppress_tokens=[] if forced else [never],
                eos_token_id=[-1] if forced else ends,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            ),
            [(*each[:3], of_prompt(each[3])) for each in edits],
        )
        tokens = found.sequences[0, n_pos:].tolist()
        return tokens, [step[0] for step in found.logits]

    def assert_said(self, said: str, tokens: list[int], logits: list[Tensor]) -> None:
        """What is said is what transformers says, unless two words were about as probable."""
        never = torch.tensor([self.model.cfg.image_token_id])
        best = torch.stack(logits).index_fill(1, never, -torch.inf).topk(2).values
        if bool((best[:, 0] - best[:, 1] > 2 * LOGITS).all()):
            assert said == self.model.tokenizer.decode(tokens, skip_special_tokens=True)


def probability(logits: Tensor, token: int) -> float:
    """P(token) at the last position."""
    return float(logits[-1].softmax(-1)[token])


def edited(at: Sequence[int], put: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit of some positions of an activation [1, pos, width]."""
    index = torch.as_tensor(at)
    return lambda x: x.index_copy(1, index, put(x[:, index]).to(x))


def assert_ranks(ranks: Tensor, expected: Tensor, tokens: Tensor) -> None:
    """Ranks [..., token] are those of log probabilities [..., d_vocab], up to near ties."""
    own = expected[..., tokens]
    for at in range(len(tokens)):
        above = expected - own[..., at : at + 1]
        # Either of two may be off by LOGITS; what they are normalised by is the same.
        assert bool(((above > 2 * LOGITS).sum(-1) <= ranks[..., at]).all())
        assert bool((ranks[..., at] <= (above > -2 * LOGITS).sum(-1)).all())
