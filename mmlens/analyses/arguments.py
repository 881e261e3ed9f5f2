"""Positions, layers and tokens, as the analyses of this package take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from mmlens.analyses.targets import given_answer, record_with_answer
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import n_layers_of, site_of
from mmlens.utils.tensors import flat_positions, listed_numbers

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

Where = str | int | Sequence[int] | Int[Tensor, " _"]
"""A span of the inputs by its name, or positions."""


def positions_of(inputs: MultimodalInputs, where: Where | None) -> Int[Tensor, " n"]:
    """The positions that a name or numbers stand for, on the CPU and in order; all by default."""
    if isinstance(where, str):
        return inputs.span(where).cpu()
    given = range(inputs.n_pos) if where is None else where
    positions = flat_positions(given)
    if not len(positions) or not 0 <= int(positions.min()) <= int(positions.max()) < inputs.n_pos:
        raise ValueError(
            f"positions {positions.tolist()} are not among 0 ... {inputs.n_pos - 1}; there must be "
            "at least one"
        )
    if len(positions.unique()) < len(positions):
        raise ValueError(f"positions {positions.tolist()} hold one of them twice")
    return positions


def layers_of(
    model: HookedMultimodalTransformer, layers: Iterable[int] | None, *sites: str
) -> list[int]:
    """The layers that are asked for, in the order given; all by default.

    Args:
        sites: those are meant that have them; without any, the decoder's.
    """
    layered = [site for site in sites if site_of(site).is_layered]
    n_layers = min([n_layers_of(site, model) for site in layered] or [model.cfg.n_layers])
    chosen = listed_numbers(range(n_layers) if layers is None else layers)
    outside = [layer for layer in chosen if not 0 <= layer < n_layers]
    if outside or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"layers {outside or chosen}: they must be among 0 ... {n_layers - 1}, each once, and "
            "at least one" + (f" ({', '.join(layered)})" if layered else "")
        )
    return chosen


def check_single_run(inputs: MultimodalInputs, what: str) -> None:
    """Raise a ValueError for anything that runs as several rows: a batch, samples of noise."""
    check_one_prompt(len(inputs), what)
    if inputs.noise is not None and len(inputs.noise) > 1:
        raise ValueError(f"{what} takes one run; these inputs have {len(inputs.noise)} of noise")


def token_id(
    model: HookedMultimodalTransformer, inputs: MultimodalInputs, token: str | int | None
) -> int:
    """An id, the first token of a text after the prompt, or (None) the most probable next token."""
    if token is None:
        return int(record_with_answer(model, inputs, None)[1].tokens[0])
    return int(given_answer(model, inputs, token).tokens[0])


def token_names(model: HookedMultimodalTransformer, tokens: Iterable[int]) -> dict[str, str]:
    """Texts of tokens by their ids, both as text; the ids themselves without a tokenizer."""
    ids = sorted(set(tokens))
    texts = [str(token) for token in ids] if model.tokenizer is None else model.to_str_tokens(ids)
    return {str(token): text for token, text in zip(ids, texts, strict=True)}
