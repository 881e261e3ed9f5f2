"""Special tokens and padding around the words of a prompt.

All functions that take text (`prepare`, `to_tokens`, the model, `generate`) use this file, so that
they agree:

- A text gets the special tokens that transformers' `tokenizer(text)` gives it. A tokenizer that
  only names a BOS (Phi-2's, SmolLM2's, Qwen2's) adds none; `prepend_bos=True` and `False` say
  otherwise. A text that begins with BOS itself gets none, as in transformers' processors.
- Padding is told from text as transformers' `generate` does it: ids equal to the padding token at
  the left are padding. Unlike there, one inside of a prompt stays, and a padding token that is also
  the end or the beginning of a text (`pad_token = eos_token`) is padding where the batch shows it.

Public names: `special_tokens_around`, `prompt_ids`, `padding_token`, `filler`, `padding_at`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = [
    "Side",
    "filler",
    "padding_at",
    "padding_token",
    "prompt_ids",
    "special_tokens_around",
]

Side = Literal["left", "right"]


def special_tokens_around(
    tokenizer: Any,
    text: str,
    ids: Sequence[int],
    prepend_bos: bool | None = None,
    *,
    is_complete: bool = False,
) -> tuple[list[int], list[int]]:
    """Return the special tokens in front of a text and after it.

    Args:
        tokenizer: of transformers.
        text: a whole prompt.
        ids: its tokens without any additions.
        prepend_bos: None for what the tokenizer does; True for a BOS, if it has one; False for
            none. Other special tokens, such as an EOS at the end, are the tokenizer's either way.
        is_complete: the text has all special tokens that it needs, as what a tokenizer's chat
            template makes; the tokenizer adds none of its own.

    Example:
        >>> special_tokens_around(llama_tokenizer, "this country", [445, 4234])
        ([1], [])
    """
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:1]) == [bos]:
        return [], []
    if is_complete:
        return [bos] if prepend_bos and bos is not None else [], []
    whole = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    added = list(whole["special_tokens_mask"])
    n_before = added.index(0) if 0 in added else len(added)
    n_after = added[::-1].index(0) if 0 in added else 0
    before = whole["input_ids"][:n_before]
    after = whole["input_ids"][len(added) - n_after :]
    if prepend_bos and bos is not None and bos not in before:
        return [bos, *before], after
    if prepend_bos is False:  # BERT's tokenizer begins with CLS, and has no other BOS
        begin = tokenizer.cls_token_id if bos is None else bos
        before = [token for token in before if token != begin]
    return before, after


def prompt_ids(
    tokenizer: Any, text: str, prepend_bos: bool | None = None, max_length: int | None = None
) -> list[int]:
    """Return the token ids of a text with its special tokens.

    Args:
        tokenizer: of transformers.
        text: a whole prompt.
        prepend_bos: as in `special_tokens_around`.
        max_length: cut the text so that there are at most so many, special tokens included, on the
            tokenizer's `truncation_side`.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    before, after = special_tokens_around(tokenizer, text, ids, prepend_bos)
    if max_length is not None and len(before) + len(ids) + len(after) > max_length:
        n_kept = max(max_length - len(before) - len(after), 0)
        ids = ids[len(ids) - n_kept :] if tokenizer.truncation_side == "left" else ids[:n_kept]
    return [*before, *ids, *after]


def padding_token(tokenizer: Any, cfg: Any) -> int | None:
    """Return the id that rows are padded with, or None where nothing names one.

    The tokenizer's padding token, else the config's, else what ends a text; never the image token,
    since padding would then be images. Without a tokenizer nobody pads with an end token.
    """
    choices: list[int | None] = [getattr(cfg, "pad_token_id", None)]
    if tokenizer is not None:
        ends = [tokenizer.eos_token_id, *getattr(cfg, "eos_token_ids", ())]
        choices = [tokenizer.pad_token_id, *choices, *ends]
    return next((t for t in choices if t is not None and t != cfg.image_token_id), None)


def filler(tokenizer: Any, cfg: Any) -> int:
    """Return an id to put where a mask says that there is nothing: `padding_token`, or any other.

    It may lie outside of the embedding's rows; the model embeds another in its place.
    """
    pad = padding_token(tokenizer, cfg)
    return int(cfg.image_token_id == 0) if pad is None else pad


def padding_at(
    side: Side, tokens: Int[Tensor, "batch pos"], tokenizer: Any, cfg: Any
) -> Bool[Tensor, "batch pos"]:
    """Return where the padding at one side of rows of token ids is, told from the ids alone.

    It is the run of padding tokens at that side; a row keeps its last token in any case. Where
    texts may begin (or, on the right, end) with the padding token themselves, the run is padding up
    to a BOS that follows it, or else as far as it is longer than the shortest run of the batch: the
    longest row of a padded batch has no padding. A single row is then taken as it is, as
    transformers' `generate` does.
    """
    pad = padding_token(tokenizer, cfg)
    if pad is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ids = tokens if side == "left" else tokens.flip(dims=[1])
    n_pos = ids.shape[1]
    run = (ids == pad).long().cumprod(dim=1).sum(dim=1).clamp(max=n_pos - 1)
    bos, ends = _first_and_last(tokenizer, cfg)
    if pad in ends or (side == "left" and pad == bos):
        excess = run - run.min()
        if side == "left" and bos is not None and pad != bos:
            next_is_bos = ids.gather(1, run[:, None])[:, 0] == bos
            excess = torch.where(next_is_bos, run, excess)
        run = excess
    padded = torch.arange(n_pos, device=ids.device) < run[:, None]
    return padded if side == "left" else padded.flip(dims=[1])


def _first_and_last(tokenizer: Any, cfg: Any) -> tuple[int | None, set[int]]:
    """Return the BOS, and the ids that end a text."""
    bos, ends = getattr(cfg, "bos_token_id", None), set(getattr(cfg, "eos_token_ids", ()))
    if tokenizer is not None:
        bos = tokenizer.bos_token_id
        ends |= {tokenizer.eos_token_id} - {None}
    return bos, ends
