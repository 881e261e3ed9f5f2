"""The residual stream read as words: the logit lens, and what adds to a logit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmlens.plots.figure import Figure
from mmlens.plots.folding import Visual
from mmlens.plots.heatmap import heatmap
from mmlens.plots.labels import visible
from mmlens.plots.trace import subtitle_of

if TYPE_CHECKING:
    from mmlens.analyses.direct_logit_attribution import DirectLogitAttribution
    from mmlens.analyses.logit_lens import LogitLens


COMPONENT_TITLES = {"attn_out": "attention", "mlp_out": "MLP"}


def plot_lens(lens: LogitLens, *, visual: Visual = "folded", title: str | None = None) -> Figure:
    """Draw each requested token's probability after every layer, at every position.

    A folded image shows the patch where the token is most probable. The pointer tells what the
    model would say there instead.

    Args:
        lens: the result of `mmlens.logit_lens`.
        visual: how visual tokens are shown, see `mmlens.plots.heatmap`.
        title: instead of the tokens asked for.

    Example:
        >>> logit_lens(model, inputs, tokens=[" Rome"]).plot().save("lens.html")
    """
    names = [visible(lens.names[str(token)].strip()) for token in lens.tokens]
    tops = np.empty(tuple(lens.top_tokens.shape[1::-1]), dtype=object)
    for layer, row in enumerate(lens.top_tokens[..., :3].tolist()):
        for position, tokens in enumerate(row):
            said = ", ".join(lens.names[str(token)].strip() for token in tokens)
            tops[position, layer] = f"says: {said}"
    return heatmap(
        lens.log_probs.float().exp().permute(2, 1, 0),
        rows=lens.labels,
        columns=lens.layers,
        panels=[f"“{name}”" for name in names],
        value_title="probability of the token",
        visual=visual,
        texts=[tops.tolist()] * len(names),
        title=title or f"P({', '.join(f'“{name}”' for name in names)}) after every layer",
        subtitle=subtitle_of(lens.metadata),
    )


def plot_logit_attribution(
    attribution: DirectLogitAttribution, *, visual: Visual = "folded", title: str | None = None
) -> Figure:
    """Draw how much attention and MLPs add to the logit, layer by layer, at every position.

    Where heads are apart they are the rows, at the last of the positions.

    Args:
        attribution: the result of `mmlens.direct_logit_attribution`.
        visual: how visual tokens are shown, see `mmlens.plots.heatmap`.
        title: instead of the tokens.

    Example:
        >>> direct_logit_attribution(model, inputs, " Rome", contrast=" Paris").plot()
    """
    layered = [name.partition(".") for name in attribution.components if "." in name]
    kinds = list(dict.fromkeys(kind for _, _, kind in layered))
    layers = list(dict.fromkeys(int(layer) for layer, _, _ in layered))
    at = {name: index for index, name in enumerate(attribution.components)}
    order = [[at[f"{layer}.{kind}"] for layer in layers] for kind in kinds]
    values = attribution.values.float().numpy()[np.array(order)]  # [kind, layer, position]
    asked = f"“{visible(attribution.token.strip())}”"
    if attribution.contrast:
        asked += f" rather than “{visible(attribution.contrast.strip())}”"
    names = [COMPONENT_TITLES.get(kind, kind.replace("_", " ")) for kind in kinds]
    per_head = "attn_out" not in kinds
    where = f"at “{visible(attribution.labels[-1].strip())}”"
    return heatmap(
        values[..., -1] if per_head else values.transpose(0, 2, 1),
        rows=names if per_head else attribution.labels,
        columns=layers,
        panels=[where] if per_head else names,
        value_title="added to the logit",
        visual=visual,
        title=title or f"what speaks for {asked}",
        subtitle=subtitle_of(attribution.metadata),
    )
