"""Attribution patching: a whole causal trace, estimated by one gradient.

    effect of a cell  ~  (clean activation - corrupted activation) . d metric / d activation

with the gradient in the corrupted run (Nanda 2023, "Attribution patching"). It is the first order
of what `causal_trace` measures, so two forward passes and one backward pass stand for thousands;
how far it is off is for `AttributionPatching.error` to say. With several `steps` the gradient is
the mean of those on the way from the corrupted to the clean embeddings (integrated gradients;
Sundararajan et al. 2017; for activations Hanna et al. 2024, "Have Faith in Faithfulness", EAP-IG).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.metrics import (
    Metric,
    MetricFunction,
    check_metric,
    check_one_number,
    metric_of,
    name_of,
)
from mmlens.analyses.result import SavedResult, description
from mmlens.analyses.targets import given_answer, record_with_answer, with_answer
from mmlens.analyses.trace_grid import SITES, Group, check_pair, layer_centres, position_groups
from mmlens.analyses.trace_result import CausalTrace, table_of_cells
from mmlens.branching.recording import Recording
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.functions import add
from mmlens.interventions.intervention import Intervention, site_of
from mmlens.utils.grad_mode import gradients
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.model.transformer import HookedMultimodalTransformer

Place = tuple[str, int | None]
"""A site and its layer; None where the site has no layers."""


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

    SIZES: ClassVar[dict[str, str]] = CausalTrace.SIZES

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
    metric: str = "probability"
    """What was measured: a name of `mmlens.analyses.metrics`, or a function's."""
    contrast: str = ""
    """The answer whose logit "logit_diff" subtracts."""

    def error(self, exact: CausalTrace) -> PatchingError:
        """The difference from the trace that it estimates.

        Raises:
            ValueError: a trace of other cells, another answer or metric, or one of windows.
        """
        if exact.window != 1:
            raise ValueError(f"the trace restores {exact.window} layers together, this is of one")
        compared = ["sites", "layers", "groups", "answer_tokens", "metric"]
        if self.metric == "logit_diff":  # a trace may follow a contrast beside another metric
            compared.append("contrast")
        for name in compared:
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
        return table_of_cells(self, {"indirect_effect": self.indirect_effect})


@on_free_cores
def attribution_patching(
    model: HookedMultimodalTransformer,
    clean: MultimodalInputs,
    corrupted: MultimodalInputs,
    *,
    sites: Sequence[str] = SITES,
    layers: Iterable[int] | None = None,
    positions: Sequence[Group] | None = None,
    answer: str | int | None = None,
    metric: Metric = "probability",
    contrast: str | int | None = None,
    steps: int = 1,
) -> AttributionPatching:
    """Estimate `causal_trace`'s indirect effects by the gradient in the corrupted run.

    Arguments are `causal_trace`'s, sites those of the decoder. There are no windows: what one of
    their layers does through the next would be counted twice.

    Args:
        metric: "probability" of the answer, "logit_diff", "kl" (from the clean run), "loss", or a
            function of the logits [row, n, d_vocab] that predict the answer's tokens, which returns
            a number for each row.
        contrast: the answer whose logit "logit_diff" subtracts.
        steps: how many gradients are averaged, each in a run of its own, whose embeddings are the
            share 0, 1 / steps, ... of the way from the corrupted to the clean ones. 1 takes the
            corrupted run's.

    Raises:
        ValueError: as `causal_trace`; sites of the vision tower; a metric without a gradient;
            fewer than 1 step.

    Example:
        >>> attribution_patching(model, clean, corrupted).indirect_effect   # [site, group, layer]
    """
    if steps < 1:
        raise ValueError(f"steps={steps}; there must be 1 or more")
    clean, corrupted = model.to_inputs(clean), model.to_inputs(corrupted)
    check_pair(clean, corrupted)
    check_metric(metric, contrast)
    chosen = layer_centres(model, sites, layers)
    if site_of(sites[0]).stack != "decoder":
        raise ValueError(f"attribution patching is for sites of the decoder, not {sites}")
    groups = position_groups(model, clean, corrupted, sites, positions)
    for site in sites:
        model.SITES[site]  # an error for units: the gradient is that of the whole activation
    columns = chosen if site_of(sites[0]).is_layered else [None]
    places: list[Place] = [(site, layer) for site in sites for layer in columns]
    entries = entries_of(model) if steps > 1 else []
    recording, target = record_with_answer(model, clean, answer, [*places, *entries])
    other_answer = None if contrast is None else given_answer(model, clean, contrast)
    measure = metric_of(metric, target, other_answer, recording)
    clean_value = measure(recording.logits(target.positions))
    check_one_number(metric, clean_value, recording.n_rows)
    other = recording.record(with_answer(corrupted, target), [*places, *entries])
    way = {each: difference(recording[each], other[each]) for each in entries}
    shares = [step / steps for step in range(steps)]
    derivatives, corrupted_value = mean_derivatives(
        other, places, measure, target.positions, way, shares
    )
    first_order = {}  # dot products at every position; the mean over rows is in the gradient
    for each in places:
        product = difference(recording[each], other[each]) * derivatives[each]
        by_position = product.movedim(site_of(each[0]).position_axis, 1)
        first_order[each] = by_position.flatten(2).sum(dim=(0, 2))
    effects = [
        first_order[site, layer][torch.tensor(group.numbers, device=model.device)].sum()
        for site in sites
        for group in groups
        for layer in columns
    ]
    return AttributionPatching(
        indirect_effect=torch.stack(effects).view(len(sites), len(groups), len(chosen)).cpu(),
        clean=clean_value.mean().item(),
        corrupted=corrupted_value,
        sites=tuple(sites),
        layers=tuple(chosen),
        groups=tuple(group.numbers for group in groups),
        group_labels=tuple(group.label for group in groups),
        answer=target.text,
        answer_tokens=tuple(target.tokens.tolist()),
        metadata=description(model, clean),
        metric=name_of(metric),
        contrast="" if other_answer is None else other_answer.text,
    )


def difference(clean: Tensor, corrupted: Tensor) -> Tensor:
    """Return clean - corrupted: 0 where both are the same, also where scores are masked (-inf)."""
    return torch.where(clean == corrupted, 0.0, clean - corrupted)


def entries_of(model: HookedMultimodalTransformer) -> list[Place]:
    """Return where prompts enter the stream: embeddings, and what images add in first blocks."""
    return [("input_embed", None), *(("deepstack", i) for i in range(model.cfg.n_deepstack))]


def mean_derivatives(
    recording: Recording,
    places: Sequence[Place],
    metric: MetricFunction,
    positions: Tensor,
    way: Mapping[Place, Tensor],
    shares: Sequence[float],
) -> tuple[dict[Place, Tensor], float]:
    """Return the mean of `derivatives_at` shares of a way, and the metric at the first of them."""
    total: dict[Place, Tensor] = {}
    values = []
    for share in shares:
        moved = [Intervention(*each, None, add(share * step)) for each, step in way.items()]
        found, value = derivatives_at(recording, places, metric, positions, moved)
        values.append(value)
        total = {each: total.get(each, 0) + found[each] / len(shares) for each in places}
    return total, values[0]


def derivatives_at(
    recording: Recording,
    places: Sequence[Place],
    metric: MetricFunction,
    positions: Tensor,
    moved: Sequence[Intervention] = (),
) -> tuple[dict[Place, Tensor], float]:
    """Return the gradients of the mean metric at activations of a run, and the metric.

    Nothing is added to each activation, and the gradient is that of what is added.

    Args:
        recording: of the run.
        places: site and layer of the activations.
        metric: of logits.
        positions: whose logits those are.
        moved: what the run has beside what was recorded.
    """
    model = recording.model
    with gradients(True):
        added = {each: torch.zeros_like(recording[each], requires_grad=True) for each in places}
        branch = [Intervention(*each, None, add(value)) for each, value in added.items()]
        branch = [*moved, *branch]
        with model.hooks(interventions=branch):
            resid = model(recording.inputs, stop_at_layer=model.cfg.n_layers)
            value = metric(model.unembed(model.ln_final(resid)[:, positions])).mean()
        if not value.requires_grad:
            raise ValueError(
                "the metric has no gradient (it counts or compares, as a rank or an argmax does); "
                "causal_trace follows it"
            )
        found = torch.autograd.grad(
            value, list(added.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(places, found, strict=True)), value.item()
