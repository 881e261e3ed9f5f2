"""A prompt, and how it grows by a token a step.

Prompt -> Continuation: logits -> next token (`mmlens.model.decoding`) -> logits ...
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mmlens.inputs.attention_blocks import attention_blocks
from mmlens.inputs.collation import collate
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.model.components import KeyValueCache
from mmlens.model.decoding import Decoding, Logits
from mmlens.model.hooked_root_module import Intervening
from mmlens.model.run_positions import computing
from mmlens.utils.grad_mode import gradients, without_gradients


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is continued."""

    inputs: MultimodalInputs | None
    embeddings: Float[Tensor, "row pos d_model"] | None
    """Instead of inputs."""
    ids: Int[Tensor, "row n_ids"]
    """None of them where the prompt is embeddings."""
    attention_mask: Bool[Tensor, "row pos"]
    type: Literal["str", "tokens", "embeds"] | None
    """Which of TransformerLens's inputs it was; None for `MultimodalInputs`."""

    @classmethod
    def of(cls, inputs: MultimodalInputs, type: Literal["str", "tokens"] | None) -> Prompt:
        """Return the prompt of some inputs; every sample of noise is a row of its own."""
        if inputs.n_rows != len(inputs):
            noise, alone = inputs.noise, replace(inputs, noise=None)
            inputs = replace(collate([alone] * inputs.n_rows, pad_token_id=0), noise=noise)
        return cls(inputs, None, inputs.tokens, inputs.attention_mask, type)

    @classmethod
    def of_embeddings(
        cls, embeddings: Float[Tensor, "row pos d_model"], attention_mask: Tensor | None
    ) -> Prompt:
        """Return the prompt of what enters the first block."""
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        if attention_mask is not None:
            mask = attention_mask.to(mask)
        no_ids = torch.zeros(len(embeddings), 0, dtype=torch.long, device=embeddings.device)
        return cls(None, embeddings, no_ids, mask, "embeds")

    @property
    def n_pos(self) -> int:
        """Positions of a row, padding included."""
        return self.attention_mask.shape[1]

    def grown(self, new: Int[Tensor, "row new"]) -> MultimodalInputs:
        """Return the inputs with new tokens at the end."""
        assert self.inputs is not None
        return self.inputs.append(new) if new.shape[1] else self.inputs

    def blocks(self, model: Any, new: Int[Tensor, "row new"]) -> Tensor | None:
        """Return the blocks of embeddings with new tokens, in which nobody knows of images."""
        mask = pad(self.attention_mask, (0, new.shape[1]))
        return attention_blocks(model.cfg.attention_blocks, torch.zeros_like(mask), mask)

    def embedded(self, model: Any, new: Int[Tensor, "row new"]) -> Tensor:
        """Return what enters the first block: [row, pos + new, d_model]."""
        before = self.embeddings
        if before is None:
            before = model.input_embeddings(self.inputs)
        return torch.cat([before, model.embed(new).to(before)], dim=1)


class Continuation:
    """A prompt, and the tokens that are added to it step by step.

    Iterating takes the steps, and gives the logits of each.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        how: Decoding,
        return_type: Literal["str", "tokens", "embeds"],
        use_past_kv_cache: bool = True,
        interventions: Sequence[Intervening] = (),
    ) -> None:
        self.model, self.prompt, self.how, self.return_type = model, prompt, how, return_type
        self.interventions = interventions
        self.cache = KeyValueCache(model.cfg.n_layers) if use_past_kv_cache else None
        self.ids = prompt.ids
        self.running = torch.ones(len(prompt.ids), dtype=torch.bool, device=prompt.ids.device)
        self.n_new = torch.zeros_like(self.running, dtype=torch.long)
        """Tokens of each row, its end token included; padding comes after them."""
        self.done = how.max_new_tokens == 0
        longest = int(prompt.attention_mask.sum(dim=1).max())
        self.room = model.cfg.longest_input - longest + 1  # the last token need not be run

    @property
    def new(self) -> Int[Tensor, "row new"]:
        """The tokens that were added."""
        return self.ids[:, self.prompt.ids.shape[1] :]

    def __iter__(self) -> Iterator[Logits]:
        while not self.done:
            yield self.step()

    @without_gradients
    def step(self) -> Logits:
        """Add a token to every row that has not ended, and return the logits it was chosen by."""
        logits = self.next_logits()
        token = self.how.choose(self.ids, logits)
        token = torch.where(self.running, token, self.how.pad_token_id)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        self.n_new = self.n_new + self.running
        self.running = self.running & ~self.how.criteria(self.ids, logits)
        self.done = not bool(self.running.any())
        if not self.done and self.new.shape[1] >= self.room:
            self.done = True
            warnings.warn(
                f"generate ended after {self.new.shape[1]} tokens, at the "
                f"{self.model.cfg.longest_input:,} that the model was made for; set "
                "model.cfg.n_ctx to go on, if you know what the model does there",
                stacklevel=2,
            )
        return logits

    def next_logits(self) -> Logits:
        """Return the logits after the last position, in float32 as transformers takes them."""
        model, prompt, new, cache = self.model, self.prompt, self.new, self.cache
        options = {"stop_at_layer": model.cfg.n_layers, "past_kv_cache": cache}
        total = prompt.n_pos + self.how.max_new_tokens
        with (
            model.hooks(interventions=self.interventions),
            computing(len(cache or ()), total, prompt.n_pos),
        ):
            if new.shape[1] and cache is not None:
                token = new[:, -1:]
                resid = model(token, attention_mask=torch.ones_like(token), **options)
            elif prompt.inputs is not None:
                resid = model(prompt.grown(new), **options)
            else:
                mask = pad(prompt.attention_mask, (0, new.shape[1]), value=True)
                options |= {"attention_mask": mask, "blocks": prompt.blocks(model, new)}
                resid = model(prompt.embedded(model, new), start_at_layer=0, **options)
            logits = model.unembed(model.ln_final(resid)[:, -1:])[:, 0]
        return logits.to(self.ids.device, torch.float32)

    def texts(self) -> list[str]:
        """Return the text of each row, up to its end; that of the prompt first, if it had one."""
        texts = []
        for row, n in enumerate(self.n_new.tolist()):
            ids = self.new[row, :n]
            if self.prompt.type in ("str", "tokens"):
                ids = torch.cat([self.prompt.ids[row][self.prompt.attention_mask[row]], ids])
            texts.append(self.model.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        return texts

    def returned(self) -> Any:
        """Return the text, tokens or embeddings of what there is by now."""
        if self.return_type == "tokens":
            return self.ids
        if self.return_type == "embeds":
            with gradients(False):
                return self.prompt.embedded(self.model, self.new)
        texts = self.texts()
        return texts if len(texts) > 1 else texts[0]
