"""Autoregressive generation, with or without a cache of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.components import KeyValueCache

if TYPE_CHECKING:
    from mmlens.inputs import MultimodalInputs
    from mmlens.model import HookedMultimodalTransformer


def choose_next(
    logits: Float[Tensor, "batch d_vocab"],
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Tensor, " batch"]:
    """The next token of every row: the most probable one, or a draw (temperature 0: no draw).

    Raises:
        ValueError: a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; it must be positive, or 0 for greedy choice")
    if not do_sample or temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        drop = (before >= top_p).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


@torch.inference_mode()
def generate_tokens(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    max_new_tokens: int,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_at_eos: bool = True,
    use_past_kv_cache: bool = True,
) -> Int[Tensor, "batch new_pos"]:
    """The continuation of every row; rows that have ended are filled with the end token.

    Without the cache every step runs the whole model on everything so far, pictures included.
    """
    ends = model.cfg.eos_token_ids if stop_at_eos else ()
    end_ids = torch.tensor(ends, device=inputs.tokens.device, dtype=torch.long)
    ended: Bool[Tensor, " batch"] = torch.zeros(
        inputs.n_rows, dtype=torch.bool, device=inputs.tokens.device
    )
    cache = KeyValueCache(model.cfg.n_layers) if use_past_kv_cache else None
    placeholder = model.cfg.image_token_id
    new: list[Tensor] = []
    step_input: MultimodalInputs | Tensor = inputs
    for _ in range(max_new_tokens):
        resid = model(step_input, stop_at_layer=model.cfg.n_layers, past_kv_cache=cache)
        logits = model.unembed(model.ln_final(resid[:, -1:]))[:, 0]
        if placeholder is not None and placeholder < logits.shape[-1]:
            logits[:, placeholder] = -torch.inf  # no word, and nothing that could be read back
        token = choose_next(logits, do_sample, temperature, top_k, top_p)
        if ends:
            token = torch.where(ended, end_ids[0], token)
            ended |= torch.isin(token, end_ids)
        new.append(token)
        if ends and bool(ended.all()):
            break
        all_new = torch.stack(new, dim=1)
        step_input = inputs.append(all_new) if cache is None else token[:, None]
    return torch.stack(new, dim=1) if new else ended.new_zeros(inputs.n_rows, 0, dtype=torch.long)
