"""Logit lens: the residual stream in every layer, read as logits of the next token.

nostalgebraist 2020; at every position, visual tokens included (Neo et al. 2024).
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
from mmlens.interventions.intervention import hook_names, site_of
from mmlens.model.components.norm import float32_or_wider
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer

POSITIONS_AT_ONCE = 64
"""Logits of so many positions are in memory together."""


@dataclass(frozen=True, eq=False)
class LogitLens(SavedResult):
    """What the model would say if it stopped after (or before, or within) a layer.

    Example:
        >>> lens.top_strings(layer=3, position=inputs.patch(2, 5))
        >>> lens.patch_words(layer=3)            # what every patch says
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
    site: str = "resid_post"
    """What was read."""
    patches: tuple[tuple[int, int, int, int], ...] = ()
    """(image, view, row, column) of each position, -1 where it is none (see
    `MultimodalInputs.grid`)."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def top_strings(self, layer: int, position: int) -> list[str]:
        """The most probable tokens after a layer at a position of the prompt, best first.

        Raises:
            ValueError: the lens was not asked about that layer or position.
        """
        at = self.layers.index(layer), self.positions.index(position)
        return [self.names[str(token)] for token in self.top_tokens[at].tolist()]

    def patch_words(self, layer: int, *, image: int = 0) -> pd.DataFrame:
        """Return what every patch of an image says: one row for each of its visual tokens.

        The columns are position, view, row and column (-1 of a visual token that is no patch),
        words, a list with the most probable token first, and the probability of that one.

        Raises:
            ValueError: the lens was not asked about that layer, or about tokens of that image.
        """
        import pandas as pd

        at = self.layers.index(layer)
        chosen = [i for i, patch in enumerate(self.patches) if patch[0] == image]
        if not chosen:
            raise ValueError(f"none of the positions is a visual token of image {image}")
        return pd.DataFrame(
            [
                {
                    "position": self.positions[i],
                    **dict(zip(("view", "row", "column"), self.patches[i][1:], strict=True)),
                    "words": self.top_strings(layer, self.positions[i]),
                    "probability": float(self.top_log_probs[at, i, 0].exp()),
                }
                for i in chosen
            ]
        )

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
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
    positions: Where | None = None,
    tokens: Sequence[str | int] | None = None,
    top: int = 5,
) -> LogitLens:
    """Read the residual stream in every layer with the final norm and the unembedding.

    After the last layer it is what the model says.

    Args:
        inputs: one prompt.
        site: what is read: the residual stream after a layer, before it ("resid_pre") or between
            attention and MLP ("resid_mid"); what enters the first layer ("input_embed", with the
            visual tokens in it); or what a layer adds ("attn_out", "mlp_out").
        layers: which; all by default. A site without layers is layer 0 of the result.
        positions: a span ("image") or positions; all by default.
        tokens: whose probabilities are followed: ids, or texts (their first token, as it would
            follow the prompt). By default the most probable next token of the whole prompt.
        top: how many of the most probable tokens are kept.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch or samples of noise; positions, layers or tokens that are not there; a
            site that is no vector of the residual stream, or that the model does not have.

    Example:
        >>> lens = logit_lens(model, inputs, positions="image", tokens=["Paris"])
    """
    check_single_run(inputs, "logit_lens")
    names = residual_hooks(model, site, layers)
    where = positions_of(inputs, positions)
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top={top}; the model knows {model.cfg.d_vocab} tokens")
    if tokens is not None and not len(tokens):
        raise ValueError("tokens=[]; give at least one, or None for the most probable next token")
    asked: Sequence[str | int | None] = [None] if tokens is None else tokens
    wanted = [token_id(model, inputs, token) for token in asked]
    _, cache = model.run_with_cache(
        inputs, names_filter=list(names.values()), stop_at_layer=max(names) + 1, return_type=None
    )
    found = []
    for name in names.values():
        at = cache[name][0, where.to(cache[name].device)].to(model.device)
        parts = [
            read_logits(model.unembed(model.ln_final(part[None]))[0], wanted, top)
            for part in at.split(POSITIONS_AT_ONCE)
        ]
        found.append([torch.cat(each).cpu() for each in zip(*parts, strict=True)])
    stacked = (torch.stack(each) for each in zip(*found, strict=True))
    log_probs, ranks, top_tokens, top_log_probs = stacked
    labels = inputs.labels()
    return LogitLens(
        log_probs=log_probs,
        ranks=ranks,
        top_tokens=top_tokens,
        top_log_probs=top_log_probs,
        layers=tuple(names),
        positions=tuple(where.tolist()),
        labels=tuple(labels[position] for position in where.tolist()),
        tokens=tuple(wanted),
        names=token_names(model, [*wanted, *top_tokens.unique().tolist()]),
        site=site,
        patches=tuple(map(tuple, inputs.grid[0].cpu()[where].tolist())),
        metadata=description(model, inputs),
    )


def residual_hooks(
    model: HookedMultimodalTransformer, site: str, layers: Iterable[int] | None
) -> dict[int, str]:
    """Return the hook points of vectors of the residual stream, by their layers.

    Raises:
        ValueError: another kind of site, one that the model does not have, or layers that are not
            there.
    """
    where = site_of(site)
    # What norms give, and attention and MLP before theirs, has the stream's width only.
    if where.stack != "decoder" or where.is_of_part or where.axes != ["batch", "pos", "d_model"]:
        raise ValueError(
            f"site={site!r}; the lens reads vectors of the residual stream, such as resid_pre, "
            "resid_mid, resid_post, attn_out, mlp_out and input_embed"
        )
    if not where.is_layered and layers is not None:
        raise ValueError(f"site {site!r} has no layers; leave them out")
    chosen = layers_of(model, layers, site) if where.is_layered else [0]
    names = hook_names(site, chosen if where.is_layered else None)
    if missing := [name for name in names if name not in model.hook_dict]:
        raise ValueError(f"site={site!r}: this model has no {missing[0]}")
    return dict(zip(chosen, names, strict=True))


def read_logits(
    logits: Float[Tensor, "position d_vocab"], tokens: list[int], top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities and ranks of tokens, and the best tokens with theirs."""
    log_probs = float32_or_wider(logits).log_softmax(dim=-1)
    asked = log_probs[:, tokens]
    ranks = torch.stack([(log_probs > each[:, None]).sum(dim=-1) for each in asked.T], dim=-1)
    best = log_probs.topk(top, dim=-1)
    return asked, ranks, best.indices, best.values
