"""ROME and MEMIT: edits that are small for the keys of a corpus.

ROME (Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.1, eq. 2)
changes one down projection so that W k = v exactly and |(W - W0) k'|^2 over the corpus is least:

    W = W0 + Lambda (C^-1 k)^T,   Lambda = (v - W0 k) / ((C^-1 k)^T k),   C = E[k' k'^T]

MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer", section 4, eq. 14 and 20) spreads
many edits over several layers: at each of them, upwards,

    W = W0 + R K^T (weight C + K K^T)^-1,   r_i = (z_i - h_i) / (layers left)

where z_i is what the residual stream after the last layer is to be at the edit's position, and
h_i what it is by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.arguments import layers_of
from mmlens.editing.applied import applied_in_turn
from mmlens.editing.covariance import KeyCovariance
from mmlens.editing.deltas import LowRank
from mmlens.editing.edit import Edit
from mmlens.editing.edit_check import Origin
from mmlens.editing.multedit import down_weight, one_layer
from mmlens.editing.reference_keys import all_reference_keys
from mmlens.editing.references import References
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.value import ValueSettings, find_value, record_prompts, value_site
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import hook_name
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["memit", "rome"]


@on_free_cores
def rome(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int,
    covariance: KeyCovariance | None = None,
    references: Any = None,
    ridge: float = 1e-4,
    **settings: Any,
) -> Edit:
    """ROME's edit; several requests are edited one after the other.

    Args:
        inputs: as in `multedit`; the mean over a request's prompts is the key.
        target: as in `multedit`.
        layer: whose down projection is edited.
        covariance: of this layer's keys, from `key_covariance`.
        references: in its place, as in `multedit`: the covariance is that of their keys.
        ridge: added to the covariance's diagonal, as a share of its mean: a corpus of fewer tokens
            than d_mlp has a singular one.
        settings: of `ValueSettings`.

    Raises:
        ValueError: as `multedit`; a covariance of other layers; neither that nor references.

    Example:
        >>> covariance = key_covariance(model, texts, layers=[3])
        >>> edit = rome(model, inputs, "Rome", layer=3, covariance=covariance)
    """
    requests = as_requests(inputs, target)
    chosen = ValueSettings(**settings)
    layer = one_layer(model, layer)
    known = References.of(references, model)
    [second], n_tokens = second_moments(model, requests, [layer], covariance, known)
    moment = with_ridge(second, ridge)
    names = [hook_name("post", layer), hook_name(value_site(model), layer)]
    parts: list[LowRank] = []
    with applied_in_turn(model) as apply:
        for index, request in enumerate(requests):
            prompts = record_prompts(
                model, request, names, first_token_only=chosen.first_token_only
            )
            key = torch.cat([each.at_positions("post", layer) for each in prompts]).mean(dim=0)
            value = find_value(model, prompts, value_site(model), layer, chosen)
            parts.append(rank_one(key, value.delta[0], moment))
            if index < len(requests) - 1:
                apply(Edit.of(model, {down_weight(layer): parts[-1]}, method="rome"))
    delta = LowRank(
        torch.cat([part.left for part in parts], dim=1),
        torch.cat([part.right for part in parts], dim=0),
    )
    used = asdict(chosen) | {"ridge": ridge, "covariance_tokens": n_tokens}
    return Edit.of(
        model,
        {down_weight(layer): delta},
        origin=Origin.of(model, requests, known),
        **how_made("rome", requests, layer, used),
    )


def second_moments(
    model: HookedMultimodalTransformer,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    covariance: KeyCovariance | None,
    references: References | None,
) -> tuple[list[Float[Tensor, "d_mlp d_mlp"]], int]:
    """Return E[k k^T] of each layer, of a corpus or of references, and of how many keys it is.

    Raises:
        ValueError: neither is given, or both are.
    """
    if (covariance is None) == (references is None):
        raise ValueError(
            "give either a covariance (key_covariance), or references whose keys it is made of"
        )
    if covariance is not None:
        return [covariance.at(layer) for layer in layers], covariance.n_tokens
    assert references is not None
    found, n_keys = [], 0
    for layer in layers:
        keys = all_reference_keys(model, requests, references, layer).double()
        n_keys = keys.shape[1]
        found.append(keys @ keys.T / n_keys)
    return found, n_keys


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


@on_free_cores
def memit(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int | Sequence[int],
    covariance: KeyCovariance | None = None,
    references: Any = None,
    weight: float = 15000.0,
    **settings: Any,
) -> Edit:
    """MEMIT's edit of several requests at once, spread over several layers.

    Args:
        inputs: as in `multedit`; the mean over a request's prompts is the key.
        target: as in `multedit`.
        layer: the layers that are edited, ascending; values are optimised after the last.
        covariance: of these layers' keys, from `key_covariance`.
        references: in its place, as in `multedit`: the covariance is that of their keys.
        weight: how much the corpus counts beside one edit (the published one for GPT-J by
            default).
        settings: of `ValueSettings`.

    Raises:
        ValueError: as `multedit`; a covariance that lacks a layer; neither that nor references;
            several layers of a model with norms after its MLPs (Gemma 2 and 3).

    Example:
        >>> covariance = key_covariance(model, texts, layers=[2, 3, 4])
        >>> edit = memit(model, requests, layer=[2, 3, 4], covariance=covariance)
    """
    requests = as_requests(inputs, target)
    chosen = ValueSettings(**settings)
    layers = sorted(layers_of(model, [layer] if isinstance(layer, int) else layer))
    if weight <= 0:
        raise ValueError(f"weight={weight}; it must be positive")
    known = References.of(references, model)
    seconds, n_tokens = second_moments(model, requests, layers, covariance, known)
    moments = {
        layer: weight * second.double() for layer, second in zip(layers, seconds, strict=True)
    }
    last, site = layers[-1], goal_site(model, layers)
    # What the stream gets of what an MLP gives.
    factor = model.cfg.residual_scale if site == "resid_post" else 1.0
    goals = []
    for request in requests:
        names = [hook_name(site, last)]
        prompts = record_prompts(model, request, names, first_token_only=chosen.first_token_only)
        value = find_value(model, prompts, site, last, chosen)
        goals.append(mean_at_keys(prompts, site, last).to(value.delta) + value.delta[0])
    goal = torch.stack(goals, dim=1)
    deltas: dict[str, LowRank] = {}
    with applied_in_turn(model) as apply:
        for index, each in enumerate(layers):
            names = [hook_name("post", each), hook_name(site, last)]
            found = [record_prompts(model, request, names) for request in requests]
            keys = torch.stack([mean_at_keys(p, "post", each) for p in found], dim=1)
            there = torch.stack([mean_at_keys(p, site, last) for p in found], dim=1)
            residuals = (goal - there.to(goal)) / (len(layers) - index) / factor
            deltas[down_weight(each)] = memit_update(residuals, keys, moments[each])
            if each != last:
                name = down_weight(each)
                apply(Edit.of(model, {name: deltas[name]}, method="memit"))
    used = asdict(chosen) | {"weight": weight, "covariance_tokens": n_tokens}
    return Edit.of(
        model,
        deltas,
        origin=Origin.of(model, requests, known),
        **how_made("memit", requests, layers, used),
    )


def goal_site(model: HookedMultimodalTransformer, layers: Sequence[int]) -> str:
    """Return where MEMIT's goals are: the stream after the last layer.

    In a model that changes what the MLP of the one layer gives (a norm, a factor), that before it.

    Raises:
        ValueError: several layers of such a model.
    """
    if not model.cfg.changes_outputs or (len(layers) > 1 and not model.cfg.post_norms):
        return "resid_post"
    if len(layers) > 1:
        raise ValueError(
            f"memit of layers {list(layers)} in a model with a norm after each MLP: it fixes the "
            "size of what a layer adds to the stream, so none can write its share of a residual "
            "there. Give one layer, whose update is solved before the norm"
        )
    return value_site(model)


def mean_at_keys(prompts: Sequence[Any], site: str, layer: int) -> Float[Tensor, " width"]:
    """An activation at the key's position, mean over a request's prompts."""
    return torch.cat([prompt.at_positions(site, layer) for prompt in prompts]).mean(dim=0)


def memit_update(
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
