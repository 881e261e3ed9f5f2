"""Attribution patching: a whole causal trace, estimated by one gradient.

    effect of a cell  ~  (clean activation - corrupted activation) . d metric / d activation

with the gradient in the corrupted run (Nanda 2023, "Attribution patching"). It is the first order
of what `causal_trace` measures, so two forward passes and one backward pass stand for thousands;
how far it is off is for `AttributionPatching.error` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.answers import with_answer
from mmlens.attribution.knockout import record_with_answer
from mmlens.hook_points import HookPoint
from mmlens.inputs import MultimodalInputs
from mmlens.interventions import hook_name
from mmlens.results import SavedResult
from mmlens.trace_grid import SITES, Group, check_pair, layer_centres, position_groups
from mmlens.trace_result import CausalTrace

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model import HookedMultimodalTransformer
    from mmlens.plots.figure import Figure

Metric = Callable[[Float[Tensor, "row n d_vocab"]], Float[Tensor, " row"]]


@dataclass(frozen=True)
class PatchingError:
    """How far estimates are from exact effects, over all cells."""

    largest: float
    """Largest absolute difference."""
    mean: float
    """Mean absolute difference."""
    relative: float
    """Mean absolute difference, over the mean absolute effect."""
    correlation: float
    """Pearson's, between estimates and effects."""


@dataclass(frozen=True, eq=False)
class AttributionPatching(SavedResult):
    """Estimated indirect effects of every cell, in `CausalTrace`'s form.

    Example:
        >>> estimate = attribution_patching(model, clean, corrupted)
        >>> estimate.error(causal_trace(model, clean, corrupted))
    """

    indirect_effect: Float[Tensor, "site group layer"]
    clean: float
    """The metric in the clean run."""
    corrupted: float
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    group_labels: tuple[str, ...]
    answer: str
    answer_tokens: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model and prompt."""

    def error(self, exact: CausalTrace) -> PatchingError:
        """The difference from the trace that it estimates.

        Raises:
            ValueError: a trace of other cells or another answer, or one of windows.
        """
        if exact.window != 1:
            raise ValueError(f"the trace restores {exact.window} layers together, this is of one")
        for name in ("sites", "layers", "groups", "answer_tokens"):
            if getattr(self, name) != getattr(exact, name):
                raise ValueError(
                    f"the trace has other {name}: {getattr(exact, name)} instead of "
                    f"{getattr(self, name)}"
                )
        effects = exact.indirect_effect.double().flatten()
        estimates = self.indirect_effect.double().flatten()
        off = (estimates - effects).abs()
        return PatchingError(
            largest=off.max().item(),
            mean=off.mean().item(),
            relative=(off.mean() / effects.abs().mean()).item(),
            correlation=torch.corrcoef(torch.stack([estimates, effects]))[0, 1].item(),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: site, group, label, positions, layer, indirect_effect."""
        import pandas as pd

        rows = [
            {
                "site": site,
                "group": group,
                "label": self.group_labels[group],
                "positions": list(self.groups[group]),
                "layer": layer,
                "indirect_effect": float(self.indirect_effect[s, group, i]),
            }
            for s, site in enumerate(self.sites)
            for group in range(len(self.groups))
            for i, layer in enumerate(self.layers)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """A figure with one panel per site; see `mmlens.plots.trace`."""
        from mmlens.plots.trace import plot_patching

        return plot_patching(self)


def attribution_patching(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    *,
    sites: Sequence[str] = SITES,
    layers: Iterable[int] | None = None,
    positions: Sequence[Group] | None = None,
    answer: str | int | None = None,
    metric: Metric | None = None,
) -> AttributionPatching:
    """Estimate `causal_trace`'s indirect effects by the gradient in the corrupted run.

    Arguments are `causal_trace`'s, sites those of the decoder. There are no windows: what one of
    their layers does through the next would be counted twice.

    Args:
        metric: a number for each row from the logits that predict the answer's tokens
            [row, token, d_vocab]; by default the answer's probability.

    Raises:
        ValueError: as `causal_trace`; sites of the vision tower.

    Example:
        >>> attribution_patching(model, clean, corrupted).indirect_effect   # [site, group, layer]
    """
    clean, corrupted = model.to_inputs(clean), model.to_inputs(corrupted)
    check_pair(clean, corrupted)
    chosen = layer_centres(model, sites, layers)
    if sites[0].startswith("vision."):
        raise ValueError(f"attribution patching is for sites of the decoder, not {sites}")
    groups, labels = position_groups(model, clean, corrupted, sites, positions)
    recording, target = record_with_answer(model, clean, answer)
    measure = target.probability if metric is None else metric
    names = [hook_name(site, layer) for site in sites for layer in chosen]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            with_answer(clean, target), names_filter=names, stop_at_layer=model.cfg.n_layers
        )
        clean_value = measure(recording.logits(target.positions)).mean().item()
    activations, gradients, corrupted_value = corrupted_gradients(
        model, with_answer(corrupted, target), names, measure, target.positions
    )
    first_order = {
        name: per_position((cache[name] - activations[name]) * gradients[name]) for name in names
    }
    effects = [
        first_order[hook_name(site, layer)][group.to(model.device)].sum()
        for site in sites
        for group in groups
        for layer in chosen
    ]
    return AttributionPatching(
        indirect_effect=torch.stack(effects).view(len(sites), len(groups), len(chosen)).cpu(),
        clean=clean_value,
        corrupted=corrupted_value,
        sites=tuple(sites),
        layers=tuple(chosen),
        groups=tuple(tuple(group.tolist()) for group in groups),
        group_labels=tuple(labels),
        answer=target.text,
        answer_tokens=tuple(target.tokens.tolist()),
        metadata={
            "model": model.cfg.model_name,
            "prompt": clean.texts[0] if clean.texts else "",
        },
    )


def corrupted_gradients(
    model: HookedMultimodalTransformer,
    corrupted: MultimodalInputs,
    names: list[str],
    metric: Metric,
    positions: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Activations of the corrupted run, the mean metric's gradients there, and the metric.

    Each row is a sample of the noise (or the only one): the gradient of the mean has the mean over
    the rows in it.
    """
    activations: dict[str, Tensor] = {}

    def begin(resid: Tensor, hook: HookPoint) -> Tensor:
        return resid.detach().requires_grad_()

    def keep(activation: Tensor, hook: HookPoint) -> None:
        activations[str(hook.name)] = activation

    hooks = [("hook_input_embed", begin), *((name, keep) for name in names)]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        resid = model(corrupted, stop_at_layer=model.cfg.n_layers)
        value = metric(model.unembed(model.ln_final(resid)[:, positions])).mean()
        found = torch.autograd.grad(value, [activations[name] for name in names], allow_unused=True)
    gradients = {
        name: torch.zeros_like(activations[name]) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }
    return {name: x.detach() for name, x in activations.items()}, gradients, value.item()


def per_position(product: Float[Tensor, "row position *rest"]) -> Float[Tensor, " position"]:
    """The dot product at every position, summed over the rows."""
    return product.flatten(2).sum(dim=(0, 2))
