"""ROME and MEMIT: edits that are small for the keys of a corpus.

ROME (Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.1, eq. 2)
changes one down projection so that W k = v exactly and |(W - W0) k'|^2 over the corpus is least:

    W = W0 + Lambda (C^-1 k)^T,   Lambda = (v - W0 k) / ((C^-1 k)^T k),   C = E[k' k'^T]

MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer", section 4, eq. 14 and 20) spreads
many edits over several layers: at each of them, upwards,

    W = W0 + R K^T (weight C + K K^T)^-1,   r_i = (z_i - h_i) / (layers left)

where z_i is what the residual stream behind the last layer is to be at the edit's position, and
h_i what it is by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.attribution.where import layers_of
from mmlens.editing.covariance import KeyCovariance
from mmlens.editing.edit import Edit, LowRank
from mmlens.editing.multedit import down_weight, one_layer
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.value import ValueSettings, find_value, record_prompts
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import hook_name

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

__all__ = ["memit", "rome"]


def rome(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int,
    covariance: KeyCovariance,
    ridge: float = 1e-4,
    **settings: Any,
) -> Edit:
    """ROME's edit; several requests are edited one after the other.

    Args:
        inputs: as in `multedit`; the mean over a request's prompts is the key.
        target: as in `multedit`.
        layer: whose down projection is edited.
        covariance: of this layer's keys, from `key_covariance`.
        ridge: added to the covariance's diagonal, as a share of its mean: a corpus of fewer tokens
            than d_mlp has a singular one.
        settings: of `ValueSettings`.

    Raises:
        ValueError: as `multedit`; a covariance of other layers.

    Example:
        >>> covariance = key_covariance(model, texts, layers=[3])
        >>> edit = rome(model, inputs, "Rome", layer=3, covariance=covariance)
    """
    requests = as_requests(inputs, target)
    chosen = ValueSettings(**settings)
    layer = one_layer(model, layer)
    moment = with_ridge(covariance.at(layer), ridge)
    names = [hook_name("post", layer), hook_name("mlp_out", layer)]
    parts: list[LowRank] = []
    with ExitStack() as applied:
        for index, request in enumerate(requests):
            prompts = record_prompts(
                model, request, names, first_token_only=chosen.first_token_only
            )
            key = torch.cat([each.at_positions("post", layer) for each in prompts]).mean(dim=0)
            value = find_value(model, prompts, "mlp_out", layer, chosen)
            parts.append(rank_one(key, value.delta[0], moment))
            if index < len(requests) - 1:
                step = Edit.of(model, {down_weight(layer): parts[-1]}, method="rome")
                applied.enter_context(step.applied(model))
    delta = LowRank(
        torch.cat([part.left for part in parts], dim=1),
        torch.cat([part.right for part in parts], dim=0),
    )
    used = asdict(chosen) | {"ridge": ridge, "covariance_tokens": covariance.n_tokens}
    return Edit.of(model, {down_weight(layer): delta}, **how_made("rome", requests, layer, used))


def rank_one(
    key: Float[Tensor, " d_mlp"],
    residual: Float[Tensor, " d_model"],
    moment: Float[Tensor, "d_mlp d_mlp"],
) -> LowRank:
    """ROME's update W - W0: Lambda (C^-1 k)^T. Solved in float64, without an inverse.

    Args:
        residual: v - W0 k.
        moment: C, positive definite.
    """
    wide = key.to(moment)
    direction = torch.cholesky_solve(wide[:, None], torch.linalg.cholesky(moment))[:, 0]
    left = residual.to(moment) / (direction @ wide)
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return LowRank(left[:, None].to(dtype), direction[None].to(dtype))


def with_ridge(moment: Float[Tensor, "d_mlp d_mlp"], ridge: float) -> Tensor:
    """A covariance in float64 with a share of its mean added to the diagonal."""
    if ridge < 0:
        raise ValueError(f"ridge={ridge}; it is a share of the covariance's diagonal, 0 or more")
    wide = moment.double()
    return wide + ridge * wide.diagonal().mean() * torch.eye(len(wide)).to(wide)


def memit(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int | Sequence[int],
    covariance: KeyCovariance,
    weight: float = 15000.0,
    **settings: Any,
) -> Edit:
    """MEMIT's edit of several requests at once, spread over several layers.

    Args:
        inputs: as in `multedit`; the mean over a request's prompts is the key.
        target: as in `multedit`.
        layer: the layers that are edited, ascending; values are optimised behind the last.
        covariance: of these layers' keys, from `key_covariance`.
        weight: how much the corpus counts beside one edit (the published one for GPT-J by
            default).
        settings: of `ValueSettings`.

    Raises:
        ValueError: as `multedit`; a covariance that lacks a layer.

    Example:
        >>> covariance = key_covariance(model, texts, layers=[2, 3, 4])
        >>> edit = memit(model, requests, layer=[2, 3, 4], covariance=covariance)
    """
    requests = as_requests(inputs, target)
    chosen = ValueSettings(**settings)
    layers = sorted(layers_of(model, [layer] if isinstance(layer, int) else layer))
    if weight <= 0:
        raise ValueError(f"weight={weight}; it must be positive")
    moments = {layer: weight * covariance.at(layer).double() for layer in layers}
    last = layers[-1]
    goals = []
    for request in requests:
        names = [hook_name("resid_post", last)]
        prompts = record_prompts(model, request, names, first_token_only=chosen.first_token_only)
        value = find_value(model, prompts, "resid_post", last, chosen)
        goals.append(mean_at_keys(prompts, "resid_post", last).to(value.delta) + value.delta[0])
    goal = torch.stack(goals, dim=1)
    deltas: dict[str, LowRank] = {}
    with ExitStack() as applied:
        for index, each in enumerate(layers):
            names = [hook_name("post", each), hook_name("resid_post", last)]
            found = [record_prompts(model, request, names) for request in requests]
            keys = torch.stack([mean_at_keys(p, "post", each) for p in found], dim=1)
            there = torch.stack([mean_at_keys(p, "resid_post", last) for p in found], dim=1)
            residuals = (goal - there.to(goal)) / (len(layers) - index)
            deltas[down_weight(each)] = spread(residuals, keys, moments[each])
            if each != last:
                step = Edit.of(
                    model, {down_weight(each): deltas[down_weight(each)]}, method="memit"
                )
                applied.enter_context(step.applied(model))
    used = asdict(chosen) | {"weight": weight, "covariance_tokens": covariance.n_tokens}
    return Edit.of(model, deltas, **how_made("memit", requests, layers, used))


def mean_at_keys(prompts: Sequence[Any], site: str, layer: int) -> Float[Tensor, " width"]:
    """An activation at the key's position, mean over a request's prompts."""
    return torch.cat([prompt.at_positions(site, layer) for prompt in prompts]).mean(dim=0)


def spread(
    residuals: Float[Tensor, "d_model edit"],
    keys: Float[Tensor, "d_mlp edit"],
    moment: Float[Tensor, "d_mlp d_mlp"],
) -> LowRank:
    """MEMIT's update of one layer: R K^T (weight C + K K^T)^-1, in float64.

    Args:
        moment: weight C; only its sum with K K^T has to be positive definite.

    Raises:
        ValueError: it is not.
    """
    wide = keys.to(moment)
    factor, failed = torch.linalg.cholesky_ex(moment + wide @ wide.T)
    if bool(failed):
        raise ValueError(
            "the covariance of the keys is singular: estimate it from more tokens than "
            f"d_mlp={len(moment)}"
        )
    rows = torch.cholesky_solve(wide, factor).T
    dtype = torch.promote_types(residuals.dtype, torch.float32)
    return LowRank(residuals.to(dtype), rows.to(dtype))
