"""AlphaEdit: an edit in the null space of what is to stay (Fang et al. 2025, arXiv 2410.02355).

With the projection P onto the null space of the kept keys' K0 K0^T (section 3.2), keys K1 with
residuals R = V1 - W K1, and keys Kp of earlier edits (eq. 14):

    W = W0 + R K1^T P (Kp Kp^T P + K1 K1^T P + I)^-1

P is symmetric and P P = P, so this is the least squares of `mmlens.editing.solve` with the
projected keys P K1, the projected kept keys P Kp, and lam = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.editing.edit import Edit
from mmlens.editing.edit_check import Origin
from mmlens.editing.multedit import down_weight, earlier_keys, one_layer
from mmlens.editing.reference_keys import all_reference_keys
from mmlens.editing.references import References
from mmlens.editing.request import EditRequest, as_requests, how_made
from mmlens.editing.solve import LeastSquares, unlike
from mmlens.editing.value import ValueSettings, find_value, record_prompts, value_site
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import hook_name
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

__all__ = ["alphaedit"]


@on_free_cores
def alphaedit(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs | EditRequest | Sequence[EditRequest],
    target: str | int | None = None,
    *,
    layer: int,
    references: Any = "auto",
    threshold: float = 0.02,
    lam: float = 1.0,
    **settings: Any,
) -> Edit:
    """AlphaEdit's edit of one layer: what it adds does nothing to the keys of references.

    Args:
        inputs: as in `multedit`; the key is at the last token of the span.
        target: as in `multedit`.
        layer: whose down projection is edited.
        references: as in `multedit`: K0 are their keys.
        threshold: eigenvectors of E[k k^T] whose eigenvalue is at most this share of the mean
            eigenvalue span the null space.
        lam: weight of |W - W0|^2; the paper's is 1.
        settings: of `ValueSettings`.

    Raises:
        ValueError: as `multedit`; a threshold that leaves no direction; no references.

    Example:
        >>> edit = alphaedit(model, inputs, "Rome", layer=17)
    """
    requests = as_requests(inputs, target)
    chosen = ValueSettings(**settings)
    layer = one_layer(model, layer)
    known = References.of(references, model)
    if known is None:
        raise ValueError("alphaedit projects on what references leave free: give references")
    basis = null_space(all_reference_keys(model, requests, known, layer), threshold)
    names = [hook_name("post", layer), hook_name(value_site(model), layer)]
    keys, deltas, probabilities = [], [], []
    for request in requests:
        prompts = record_prompts(model, request, names, first_token_only=chosen.first_token_only)
        value = find_value(model, prompts, value_site(model), layer, chosen)
        keys.append(torch.cat([each.at_positions("post", layer) for each in prompts]).T)
        deltas.append(value.delta)
        probabilities.append(value.probability)
    edited = torch.cat(keys, dim=1)
    earlier = torch.cat([edited[:, :0], *(k.to(edited) for k in earlier_keys(model, layer))], 1)
    system = LeastSquares(
        [projected(each, basis) for each in keys],
        lam,
        projected(unlike(earlier, edited), basis),
    )
    used = asdict(chosen) | {"threshold": threshold, "lam": lam, "null_space": basis.shape[1]}
    return Edit.of(
        model,
        {down_weight(layer): system.update(torch.cat(deltas).T)},
        keys={down_weight(layer): edited},
        origin=Origin.of(model, requests, known),
        **how_made("alphaedit", requests, layer, used),
        probability=probabilities,
    )


def null_space(
    keys: Float[Tensor, "d_mlp _"], threshold: float
) -> Float[Tensor, "d_mlp direction"]:
    """Return an orthonormal basis of what keys (nearly) leave free, in float64.

    Args:
        keys: K0.
        threshold: as in `alphaedit`.

    Raises:
        ValueError: they leave nothing free.
    """
    wide = keys.double()
    eigenvalues, vectors = torch.linalg.eigh(wide @ wide.T / keys.shape[1])
    free = eigenvalues <= threshold * eigenvalues.mean()
    if not bool(free.any()):
        raise ValueError(f"threshold={threshold}: the references' keys leave no direction free")
    return vectors[:, free]


def projected(
    keys: Float[Tensor, "d_mlp n"], basis: Float[Tensor, "d_mlp _"]
) -> Float[Tensor, "d_mlp n"]:
    """Return P K, for the projection on the space of an orthonormal basis; in float64."""
    return basis @ (basis.T @ keys.to(basis))
