"""Direct logit attribution: a logit as a sum over everything that was added to the residual stream.

Elhage et al. 2021, with the final norm's scale taken as it is; at every position, visual tokens
included. Where attention has a norm after it (Gemma 2 and 3), a head's part goes through that norm
with its scale in the run, and so the parts still sum to the logit. Where logits are capped (Gemma
2), the parts sum to the logit before the cap c: c tanh(x / c) of it is what the model gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.arguments import Where, check_single_run, positions_of, token_id, token_names
from mmlens.analyses.result import SavedResult, description, long_table
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import hook_name
from mmlens.model.components.norm import float32_or_wider
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.tensors import to_device
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer


FINAL_SCALE = "ln_final.hook_scale"


@dataclass(frozen=True, eq=False)
class DirectLogitAttribution(SavedResult):
    """What each component adds to a logit, at every position.

    Example:
        >>> at_last = attribution.values[:, -1]
        >>> attribution.components[at_last.argmax()]
    """

    SIZES: ClassVar[dict[str, str]] = {
        "components": "component",
        "positions": "position",
        "labels": "position",
    }

    values: Float[Tensor, "component position"]
    """They sum to `logits` over the components."""
    logits: Float[Tensor, " position"]
    """The token's (minus the contrast's) at each position, before they are capped (Gemma 2)."""
    components: tuple[str, ...]
    """"embed", "0.attn_out" (or "0.head_0", ...), "0.mlp_out", ..., "0.deepstack", ... (Qwen3-VL)
    and "bias": what comes from no activation."""
    positions: tuple[int, ...]
    labels: tuple[str, ...]
    token: str
    contrast: str
    """"" where there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model and prompt."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component and position: component, position, value, label."""
        axes = {"component": self.components, "position": self.positions}
        table = long_table(axes, {"value": self.values})
        return table.assign(label=self.labels * len(self.components))


@without_gradients
@on_free_cores
def direct_logit_attribution(
    model: HookedMultimodalTransformer,
    inputs: MultimodalInputs,
    token: str | int | None = None,
    *,
    contrast: str | int | None = None,
    positions: Where | None = None,
    per_head: bool = False,
) -> DirectLogitAttribution:
    """What embeddings, attention (or heads) and MLPs add to a token's logit, at every position.

    Args:
        inputs: one prompt.
        token: an id, or a text (its first token, as it would follow the prompt); by default the
            most probable next token of the prompt.
        contrast: a second token, whose logit is subtracted.
        positions: a span or positions; all by default.
        per_head: heads apart; attention's output bias then counts as "bias". In a model with a norm
            after attention, each is what it adds for that norm's scale in this run.

    Raises:
        UnknownSpanError: (a KeyError) no span of that name.
        ValueError: a batch or samples of noise; positions or tokens that are not there.

    Example:
        >>> direct_logit_attribution(model, inputs, "Paris", contrast="Rome").to_dataframe()
    """
    check_single_run(inputs, "direct_logit_attribution")
    where = positions_of(inputs, positions)
    ids = [token_id(model, inputs, token)]
    ids += [] if contrast is None else [token_id(model, inputs, contrast)]
    direction, constant = reading_direction(model, ids)
    parts = what_is_added(model, direction, per_head)
    weights = {name: (names, each) for name, names, each, _ in parts}
    normalised = {scale for *_, scale in parts if scale} | {FINAL_SCALE}
    kept, caching, _ = model.get_caching_hooks([*weights, *normalised], pos_slice=where.tolist())
    norm: Any = model.ln_final
    with model.hooks(fwd_hooks=caching):  # with the final norm, but without all positions' logits
        resid = norm(model(inputs, stop_at_layer=model.cfg.n_layers))
    scales = {name: kept[name][0, :, 0].cpu() for name in normalised}
    added: dict[str, Tensor] = {}
    for name in kept:  # in the order of the run
        if name in weights:
            added |= products_with(kept[name][0], *weights[name])
    read = to_device(resid[0, where.tolist()], model.unembed.weight.device)
    logits = float32_or_wider(model.unembed.products(read)).cpu()
    rest = constant + torch.zeros(len(where))
    blocks: Any = model.blocks
    n_layers = model.cfg.n_layers
    for (_, of_part, _, scale), layer in zip(
        parts[1 : 2 * n_layers : 2], range(n_layers), strict=True
    ):
        if not per_head:
            continue
        post = scales[scale] if scale else torch.ones(())
        for name in of_part:
            added[name] = added[name] / post
        bias = blocks[layer].written(1, blocks[layer].attn.b_O)
        rest = rest + float(bias @ direction.to(bias.device)) / post / scales[FINAL_SCALE]
    names = token_names(model, ids)
    labels = inputs.labels()
    return DirectLogitAttribution(
        values=torch.stack([*(part / scales[FINAL_SCALE] for part in added.values()), rest]),
        logits=logits[:, ids[0]] - (logits[:, ids[1]] if len(ids) > 1 else 0.0),
        components=(*added, "bias"),
        positions=tuple(where.tolist()),
        labels=tuple(labels[position] for position in where.tolist()),
        token=names[str(ids[0])],
        contrast=names[str(ids[1])] if len(ids) > 1 else "",
        metadata=description(model, inputs),
    )


def products_with(
    activation: Float[Tensor, "position *head width"], names: list[str], weights: Tensor
) -> dict[str, Float[Tensor, " position"]]:
    """Return the products of the parts of an activation with weights, by name, on the CPU."""
    at = float32_or_wider(activation)
    read = (at * weights.to(at.device)).sum(dim=-1).reshape(len(at), -1)
    return dict(zip(names, read.T.cpu(), strict=True))


def reading_direction(
    model: HookedMultimodalTransformer, ids: list[int]
) -> tuple[Float[Tensor, " d_model"], float]:
    """What the stream is multiplied with (then divided by its scale) to give the logit; a rest."""
    norm: Any = model.ln_final
    columns = float32_or_wider(model.W_U[:, ids])
    signs = columns.new_tensor([1.0, -1.0][: len(ids)])
    unembedding = columns @ signs * model.cfg.logits_scale
    constant = float(float32_or_wider(model.b_U[ids]) @ signs) * model.cfg.logits_scale
    unembedding = unembedding.to(norm.w.device)
    direction = float32_or_wider(norm.w) * unembedding
    if model.cfg.normalization_type == "LN":
        constant += float(float32_or_wider(norm.b) @ unembedding)
        # To subtract the stream's mean is to read with a direction without mean.
        direction = direction - direction.mean()
    return direction, constant


def what_is_added(
    model: HookedMultimodalTransformer, direction: Float[Tensor, " d_model"], per_head: bool
) -> list[tuple[str, list[str], Tensor, str]]:
    """Every activation that is added to the stream: attention's and the MLP's, layer by layer, then
    what images add in the first ones.

    Its hook, names of its components, what it is multiplied with, and the hook of the scale that
    this is yet to be divided by ("" where there is none).
    """
    parts = [("hook_input_embed", ["embed"], direction, "")]
    for layer in range(model.cfg.n_layers):
        if per_head:
            block: Any = model.blocks[layer]
            heads = [f"{layer}.head_{head}" for head in range(model.cfg.n_heads)]
            W_O = float32_or_wider(block.attn.W_O)
            weights = W_O @ block.written(1, direction.to(W_O.device))
            scale = hook_name("ln1_post.scale", layer) if model.cfg.post_norms else ""
            parts.append((hook_name("z", layer), heads, weights, scale))
        else:
            name = hook_name("attn_out", layer)
            parts.append((name, [f"{layer}.attn_out"], direction, ""))
        parts.append((hook_name("mlp_out", layer), [f"{layer}.mlp_out"], direction, ""))
    for layer in range(model.cfg.n_deepstack):
        parts.append((hook_name("deepstack", layer), [f"{layer}.deepstack"], direction, ""))
    return parts
