"""Greedy continuations of prompts that were run, found by checking drafts in one pass.

A draft is what is likely to be said: the expected answer, or what was said before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import StopStringCriteria

from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.inputs.rope_positions import counted
from mmlens.model.components import KeyValueCache
from mmlens.model.components.norm import float32_or_wider


@dataclass(frozen=True, eq=False)
class FinishedPrompt:
    """A prompt that was run: what is needed to go on after it."""

    inputs: MultimodalInputs
    past: KeyValueCache
    logits: Float[Tensor, " d_vocab"]
    """Of the next token."""

    @classmethod
    def of(cls, recording: Any) -> FinishedPrompt:
        """Return that of a `mmlens.branching.recording.Recording`."""
        return cls(recording.inputs, recording.past, float32_or_wider(recording.logits()[0, 0]))


class GreedyContinuations:
    """What a model says after some prompts, and after what it is told to have said there."""

    def __init__(self, model: Any, prompts: Sequence[FinishedPrompt]) -> None:
        self.model, self.prompts = model, prompts
        self.choices = [model.greedy_decoding(prompt.inputs) for prompt in prompts]
        self.stops = [
            [each for each in choice.criteria if isinstance(each, StopStringCriteria)]
            for choice in self.choices
        ]
        self.best: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        """The greedy choice after each continuation that was followed."""
        self.follow([()] * len(prompts))

    def follow(
        self, tokens: Sequence[tuple[int, ...]]
    ) -> list[Float[Tensor, "n_and_next d_vocab"]]:
        """Each prompt's logits, and those after each of the tokens that follow it.

        In one pass of the prompts that something follows.
        """
        logits = [prompt.logits[None] for prompt in self.prompts]
        if rows := [row for row, told in enumerate(tokens) if told]:
            width = max(map(len, tokens))
            # What fills up the shorter ones comes after them, which they do not attend to.
            filler = int(self.model.cfg.image_token_id == 0)
            filled = [[*tokens[row], *[filler] * (width - len(tokens[row]))] for row in rows]
            ids = torch.tensor(filled)
            inputs = self.model.inputs_from_tokens(ids, attention_mask=torch.ones_like(ids))
            resid = self.model(
                inputs,
                past_kv_cache=side_by_side([self.prompts[row].past for row in rows]),
                stop_at_layer=self.model.cfg.n_layers,
            )
            new = self.model.unembed(self.model.ln_final(resid))
            for row, after in zip(rows, new.to(logits[0]), strict=True):
                logits[row] = torch.cat([logits[row], after[: len(tokens[row])]])
        for row, (found, told) in enumerate(zip(logits, tokens, strict=True)):
            for n, token in enumerate(self._chosen(row, found, told)):
                self.best[row][told[:n]] = token
        return logits

    def _chosen(
        self, row: int, logits: Float[Tensor, "n_and_next d_vocab"], told: tuple[int, ...]
    ) -> list[int]:
        """Return the greedy choice after the prompt and after each of the tokens."""
        prompt, choice = self.prompts[row].inputs.tokens, self.choices[row]
        if not choice.processors:  # nothing depends on what came before
            return choice.choose(prompt.expand(len(logits), -1), logits.float()).tolist()
        ids = torch.cat([prompt, prompt.new_tensor([told])], dim=1)
        ends = range(prompt.shape[1], ids.shape[1] + 1)
        each = zip(ends, logits.float().split(1), strict=True)
        return [int(choice.choose(ids[:, :end], step)) for end, step in each]

    def _goes_on(self, row: int, said: tuple[int, ...], most: int) -> bool:
        """Whether more may be said: a stop string of the checkpoint's settings ends it, too."""
        if not said or not self.stops[row] or len(said) >= most:
            return len(said) < most
        prompt = self.prompts[row].inputs.tokens
        ids = torch.cat([prompt, prompt.new_tensor([said])], dim=1)
        return not any(bool(each(ids, None).any()) for each in self.stops[row])

    def greedy(
        self, lengths: Sequence[int], drafts: Sequence[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """At most so many tokens each, the greedy ones, without an end token.

        As `model.generate(..., do_sample=False)`; where a draft is right it takes one pass.
        """
        said: list[tuple[int, ...]] = [()] * len(self.prompts)
        while True:
            wanted: list[tuple[int, ...]] = [()] * len(said)
            for row, (n, draft) in enumerate(zip(lengths, drafts, strict=True)):
                tokens, best, ends = said[row], self.best[row], self.choices[row].ends
                while self._goes_on(row, tokens, n) and best.get(tokens, -1) not in (-1, *ends):
                    tokens += (best[tokens],)
                said[row] = tokens
                if self._goes_on(row, tokens, n) and tokens not in best:
                    guess = draft[: n - 1]
                    wanted[row] = guess if guess[: len(tokens)] == tokens else tokens
            if not any(wanted):
                return said
            self.follow(wanted)


def side_by_side(pasts: Sequence[KeyValueCache]) -> KeyValueCache:
    """The keys and values of several prompts as one frozen batch, padded on the left."""
    longest = max(map(len, pasts))

    def padded(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, 0, 0, 0, longest - tensor.shape[1], 0))

    entries = []
    for layer in zip(*(past.entries for past in pasts), strict=True):
        keys, values = zip(*filter(None, layer), strict=True)
        entries.append((torch.cat([*map(padded, keys)]), torch.cat([*map(padded, values)])))
    device = entries[0][0].device
    # A prompt out of a batch has padding of its own.
    masks = [pad(real_keys(past).to(device), (longest - len(past), 0)) for past in pasts]
    rotary = None  # where one counts them; else an image's tokens have its rows and columns
    if any(past.rope_positions is not None for past in pasts):
        rotary = torch.cat([places_of(past, longest).to(device) for past in pasts], dim=1)
    return KeyValueCache.holding(entries, torch.cat(masks), rotary)


def real_keys(past: KeyValueCache) -> Bool[Tensor, "1 pos"]:
    """Return which positions of one prompt are no padding."""
    if past.key_mask is None:
        return torch.ones(1, len(past), dtype=torch.bool)
    return past.key_mask


def places_of(past: KeyValueCache, n_pos: int) -> Int[Tensor, "axis 1 pos"]:
    """The rotary positions of one prompt, padded on the left."""
    found = past.rope_positions
    if found is None:
        found = counted(real_keys(past))[None].expand(3, -1, -1)
    return pad(found, (n_pos - len(past), 0))
