"""Logit lens: the residual stream after every layer, read as logits of the next token.

nostalgebraist 2020; at every position, visual tokens included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.arguments import (
    Where,
    check_single_run,
    layers_of,
    positions_of,
    token_id,
    token_names,
)
from mmlens.analyses.result import SavedResult, description, long_table
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import hook_name
from mmlens.model.components.norm import float32_or_wider
from mmlens.model.hook_points import HookPoint, reading
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer

POSITIONS_AT_ONCE = 64
"""Logits of so many positions are in memory together."""


@dataclass(frozen=True, eq=False)
class LogitLens(SavedResult):
    """What the model would say if it stopped after a layer.

    Example:
        >>> lens.top_strings(layer=3, position=inputs.patch(2, 5))
        >>> lens.log_probs[:, -1, 0].exp()       # P(first token asked for), layer by layer
    """

    SIZES: ClassVar[dict[str, str]] = {
        "layers": "layer",
        "positions": "position",
        "labels": "position",
        "tokens": "token",
    }

    log_probs: Float[Tensor, "layer position token"]
    """Of the tokens asked for, in nats."""
    ranks: Int[Tensor, "layer position token"]
    """How many tokens are more probable than each of them."""
    top_tokens: Int[Tensor, "layer position k"]
    """The most probable tokens, best first."""
    top_log_probs: Float[Tensor, "layer position k"]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    labels: tuple[str, ...]
    """The prompt's tokens at these positions."""
    tokens: tuple[int, ...]
    names: dict[str, str] = field(default_factory=dict)
    """Texts of all tokens that occur, by token id (as text: JSON has no other keys)."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def top_strings(self, layer: int, position: int) -> list[str]:
        """The most probable tokens after a layer at a position of the prompt, best first.

        Raises:
            ValueError: the lens was not asked about that layer or position.
        """
        at = self.layers.index(layer), self.positions.index(position)
        return [self.names[str(token)] for token in self.top_tokens[at].tolist()]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and position: the best token, and each one asked for."""
        values = {"top_prob": self.top_log_probs[..., 0].exp()}
        for index, token in enumerate(self.tokens):
            name = self.names[str(token)]
            values[f"log_prob {name}"] = self.log_probs[..., index]
            values[f"rank {name}"] = self.ranks[..., index]
        table = long_table({"layer": self.layers, "position": self.positions}, values)
        table.insert(2, "label", self.labels * len(self.layers))
        best = self.top_tokens[..., 0].flatten().tolist()
        table.insert(3, "top", [self.names[str(token)] for token in best])
        return table


@without_gradients
@on_free_cores
def logit_lens(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    *,
    layers: Iterable[int] | None = None,
    positions: Where | None = None,
    tokens: Sequence[str | int] | None = None,
    top: int = 5,
) -> LogitLens:
    """Read the residual stream after every layer with the final norm and the unembedding.

    After the last layer it is what the model says.

    Args:
        inputs: one prompt.
        layers: after which; all by default.
        positions: a span ("image") or positions; all by default.
        tokens: whose probabilities are followed: ids, or texts (their first token, as it would
            follow the prompt). By default the most probable next token of the whole prompt.
        top: how many of the most probable tokens are kept.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch or samples of noise; positions, layers or tokens that are not there.

    Example:
        >>> lens = logit_lens(model, inputs, positions="image", tokens=["Paris"])
    """
    check_single_run(inputs, "logit_lens")
    chosen = layers_of(model, layers)
    where = positions_of(inputs, positions)
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top={top}; the model knows {model.cfg.d_vocab} tokens")
    asked: Sequence[str | int | None] = [None] if tokens is None else tokens
    wanted = [token_id(model, inputs, token) for token in asked]
    found: dict[str, list[Tensor]] = {}

    def read(resid: Tensor, hook: HookPoint) -> None:
        at = resid[0, where.to(resid.device)]
        parts = [
            read_logits(model.unembed(model.ln_final(part[None]))[0], wanted, top)
            for part in at.split(POSITIONS_AT_ONCE)
        ]
        found[str(hook.name)] = [torch.cat(each).cpu() for each in zip(*parts, strict=True)]

    names = [hook_name("resid_post", layer) for layer in chosen]
    with model.hooks(fwd_hooks=[(name, reading(read)) for name in names]):
        model(inputs, stop_at_layer=max(chosen) + 1)
    stacked = (torch.stack(each) for each in zip(*(found[name] for name in names), strict=True))
    log_probs, ranks, top_tokens, top_log_probs = stacked
    labels = inputs.labels()
    return LogitLens(
        log_probs=log_probs,
        ranks=ranks,
        top_tokens=top_tokens,
        top_log_probs=top_log_probs,
        layers=tuple(chosen),
        positions=tuple(where.tolist()),
        labels=tuple(labels[position] for position in where.tolist()),
        tokens=tuple(wanted),
        names=token_names(model, [*wanted, *top_tokens.unique().tolist()]),
        metadata=description(model, inputs),
    )


def read_logits(
    logits: Float[Tensor, "position d_vocab"], tokens: list[int], top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities and ranks of tokens, and the best tokens with theirs."""
    log_probs = float32_or_wider(logits).log_softmax(dim=-1)
    asked = log_probs[:, tokens]
    ranks = torch.stack([(log_probs > each[:, None]).sum(dim=-1) for each in asked.T], dim=-1)
    best = log_probs.topk(top, dim=-1)
    return asked, ranks, best.indices, best.values
