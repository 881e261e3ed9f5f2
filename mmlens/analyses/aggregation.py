"""Causal traces of many questions, aligned by what their positions are, with intervals.

Questions have other lengths, so positions are compared by their role: the image, the constraint,
its last token, the last token of all, ... (Meng et al. 2022 and Basu et al. 2024 average their
traces in this way).

    roles = [role_positions(clean) for clean, _ in pairs]
    traces = causal_trace_many(model, pairs)
    profile = aggregate_traces(traces, roles, clusters=[question.subject for question in questions])
    profile.plot().show()
    profile.compare("mlp_out", "constraint", range(0, 4), range(4, 8))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.metrics import gap
from mmlens.analyses.result import SavedResult, long_table
from mmlens.analyses.trace_result import CausalTrace
from mmlens.inputs.checks import check_one_prompt
from mmlens.inputs.multimodal_inputs import MultimodalInputs
from mmlens.interventions.intervention import site_of
from mmlens.utils.statistics import (
    Clusters,
    MeanInterval,
    bootstrap_mean,
    check_known,
    known_values,
    sign_flip_test,
)

if TYPE_CHECKING:
    import pandas as pd

Roles = Mapping[str, Int[Tensor, " _"]]


OF_WORDS = (
    *("before constraint", "constraint", "constraint first", "constraint last"),
    *("after constraint", "last token"),
)
"""Roles of `role_positions` that are words."""


def role_positions(inputs: MultimodalInputs, constraint: str = "constraint") -> Roles:
    """What the positions of a prompt are: names of roles, and their positions.

    `image`; `before constraint` and `after constraint`, the other words (the last token is not
    among them); `constraint`, and its first and last token; `last token`. A role without positions
    is left out. Roles may overlap: a constraint of one token is its own first and last.

    Args:
        inputs: one prompt.
        constraint: the span that takes the constraint's role.

    Raises:
        UnknownSpanError: (a KeyError) no such span.
        ValueError: a batch.
    """
    check_one_prompt(len(inputs), "role_positions")
    span, last = inputs.span(constraint).cpu(), inputs.span("last").cpu()
    words = inputs.span("text").cpu()
    others = words[~torch.isin(words, torch.cat([span, last]))]
    roles = {
        "image": inputs.is_image[0].cpu().nonzero().flatten(),
        "before constraint": others[others < span.min()],
        "constraint": span,
        "constraint first": span[:1],
        "constraint last": span[-1:],
        "after constraint": others[others > span.min()],
        "last token": last,
    }
    return {role: positions for role, positions in roles.items() if len(positions)}


@dataclass(frozen=True)
class WindowComparison:
    """Whether one set of layers has larger effects than another, over the same questions."""

    difference: float
    """Mean effect of the first set - mean effect of the second."""
    low: float
    high: float
    """Ends of the difference's bootstrap interval."""
    p_value: float
    """Of a paired permutation test of "the first is larger"; see `mmlens.utils.statistics`. Like
    the interval it is NaN where there is one cluster only."""
    n_questions: int


@dataclass(frozen=True, eq=False)
class AggregatedTraces(SavedResult):
    """Effects of every question, and their means with bootstrap intervals.

    Example:
        >>> profile.mean[0, 0].argmax()    # the most causal layer of the first site and role
        >>> profile.low, profile.high      # [site, role, layer]
    """

    SIZES: ClassVar[dict[str, str]] = {
        "clusters": "question",
        "sites": "site",
        "roles": "role",
        "layers": "layer",
    }

    values: Float[Tensor, "question site role layer"]
    """NaN where a question has no positions of a role."""
    sites: tuple[str, ...]
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    """Centres of the windows."""
    window: int
    effect: str
    """Which effect of `CausalTrace` the values are."""
    clusters: tuple[str | int, ...]
    """Whose questions are resampled together."""
    samples: int
    level: float
    seed: int
    metadata: dict[str, Any] = field(default_factory=dict)
    """Models, and mean probabilities in the clean and the corrupted runs."""

    @cached_property
    def _means(self) -> MeanInterval:
        return bootstrap_mean(self.values, self.clusters, **self._resampling)

    @property
    def _resampling(self) -> dict[str, Any]:
        return {"samples": self.samples, "level": self.level, "seed": self.seed}

    @property
    def mean(self) -> Float[Tensor, "site role layer"]:
        """Over the questions that have the role."""
        return self._means.mean

    @property
    def low(self) -> Float[Tensor, "site role layer"]:
        """Lower ends of the intervals."""
        return self._means.low

    @property
    def high(self) -> Float[Tensor, "site role layer"]:
        """Upper ends of the intervals."""
        return self._means.high

    def compare(
        self, site: str, role: str, layers: Iterable[int], others: Iterable[int]
    ) -> WindowComparison:
        """Is one set of layers more causal than another? Mean effects, question by question.

        Raises:
            ValueError: no such site, role or layers; no question has the role.

        Example:
            >>> profile.compare("mlp_out", "constraint", range(0, 4), range(4, 8)).p_value
        """
        cells = self.values[:, at(site, self.sites), at(role, self.roles)]
        first, second = (
            cells[:, [at(layer, self.layers) for layer in each]].mean(dim=1)
            for each in (layers, others)
        )
        difference, clusters = known_values(first - second, self.clusters)
        several = len(set(clusters)) > 1
        p_value = sign_flip_test(difference, clusters, seed=self.seed) if several else math.nan
        mean, low, high = map(float, bootstrap_mean(difference, clusters, **self._resampling))
        return WindowComparison(mean, low, high, p_value, n_questions=len(difference))

    def to_dataframe(self, model: str | None = None) -> pd.DataFrame:
        """One row per site, role and layer: window, number of questions, mean, low, high.

        Args:
            model: a name for the column `model`, by which several profiles are told apart in
                `mmlens.plots.layer_profile`; by default the model's own.
        """
        values = {"n": (~self.values.isnan()).sum(dim=0)}
        values |= self._means._asdict()
        axes = {"site": self.sites, "role": self.roles, "layer": self.layers}
        table = long_table(axes, values)
        table.insert(0, "model", self.metadata.get("model", "") if model is None else model)
        table.insert(4, "window", self.window)
        return table


def aggregate_traces(
    traces: Sequence[CausalTrace],
    roles: Sequence[Roles],
    *,
    effect: str = "indirect_effect",
    clusters: Clusters | None = None,
    right: Sequence[bool] | Sequence[float] | None = None,
    minimum_gap: float | None = None,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> AggregatedTraces:
    """Align traces by role, and put bootstrap intervals around the means.

    A question's effect at a role is that of the group which is exactly the role's positions; where
    there is none, the mean over the groups that lie within it.

    Args:
        traces: of the same sites, layers, window and metric.
        roles: of each, as from `role_positions`; the order of the first is kept. Roles for which no
            trace has a group are left out.
        effect: a property of `CausalTrace`: "indirect_effect", "recovery", "restored".
        clusters: one label per trace (the image's, the subject's): what is resampled together.
            By default every question is its own.
        right: whether each question was answered rightly; the others are left out, and counted in
            `metadata["filters"]`.
        minimum_gap: least clean - corrupted probability (or logit difference; corrupted - clean
            loss or KL divergence); the same.
        samples: resamples.
        level: of the intervals.
        seed: of the resampling.

    Raises:
        ValueError: no traces (or none that pass the filters); other sites, layers, windows or
            metrics; other numbers of roles, clusters or answers; no role has a group; an answer
            that is not 0 or 1; an effect that is NaN; words as roles in a trace of the tower or
            the connector.
    """
    if not traces or len(roles) != len(traces):
        raise ValueError(f"{len(roles)} roles for {len(traces)} traces; there must be some")
    kept, filters = passing_traces(traces, right, minimum_gap)
    labels = list(range(len(traces)) if clusters is None else clusters)
    if len(labels) != len(traces):
        raise ValueError(f"{len(labels)} clusters for {len(traces)} traces")
    traces, roles = [traces[i] for i in kept], [roles[i] for i in kept]
    first = traces[0]
    for trace in traces:
        for name in ("sites", "layers", "window", "metric"):
            if getattr(trace, name) != getattr(first, name):
                raise ValueError(
                    f"traces of other {name}: {getattr(trace, name)} and {getattr(first, name)}"
                )
    check_numbers(traces, effect)
    names = list(dict.fromkeys(name for each in roles for name in each))
    check_places(traces, names)
    rows = [
        torch.stack([effect_at(trace, each.get(name), effect) for name in names], dim=1)
        for trace, each in zip(traces, roles, strict=True)
    ]
    values = torch.stack(rows)
    found = [index for index in range(len(names)) if not values[:, :, index].isnan().all()]
    if not found:
        raise ValueError(f"no trace has groups of positions within {', '.join(names)}")
    return AggregatedTraces(
        values=values[:, :, found],
        sites=first.sites,
        roles=tuple(names[index] for index in found),
        layers=first.layers,
        window=first.window,
        effect=effect,
        clusters=tuple(labels[i] for i in kept),
        samples=samples,
        level=level,
        seed=seed,
        metadata={
            "model": first.metadata.get("model", ""),
            "clean": sum(trace.clean for trace in traces) / len(traces),
            "corrupted": sum(trace.corrupted for trace in traces) / len(traces),
            "filters": filters,
        },
    )


def check_numbers(traces: Sequence[CausalTrace], effect: str) -> None:
    """Raise a ValueError for NaN, which would be left out as that of a role without positions."""
    for number, trace in enumerate(traces):
        if bool(getattr(trace, effect).isnan().any()):
            raise ValueError(
                f"{effect} of a trace that passed (number {number}, counted from 0) is NaN: its "
                "run broke, or nothing lies between its clean and its corrupted run (minimum_gap "
                "leaves such out)"
            )


def check_places(traces: Sequence[CausalTrace], roles: Sequence[str]) -> None:
    """Raise a ValueError where a trace's positions are others than those of the roles.

    The tower counts patches: its position 5 is no word of the prompt.
    """
    places = site_of(traces[0].sites[0]).positions
    if places != "tokens" and (words := [role for role in roles if role in OF_WORDS]):
        raise ValueError(
            f"roles {', '.join(words)} are positions of the prompt, and those of "
            f"{traces[0].sites[0]} are {places}: give roles of your own, with positions of these"
        )
    if any("tiles" in trace.metadata for trace in traces):
        raise ValueError(
            "a trace of single tiles (`InTile`): roles are positions, which every tile has"
        )


def passing_traces(
    traces: Sequence[CausalTrace],
    right: Sequence[bool] | Sequence[float] | None,
    minimum_gap: float | None,
) -> tuple[list[int], dict[str, Any]]:
    """Which traces pass, and a record: what was asked of them, and how many fell to what."""
    if right is not None and len(right) != len(traces):
        raise ValueError(f"{len(right)} answers for {len(traces)} traces")
    if right is not None:
        check_known(right)
    answered = [i for i in range(len(traces)) if right is None or right[i]]
    gaps = [gap(traces[i].metric, traces[i].clean, traces[i].corrupted) for i in answered]
    kept = [
        i
        for i, found in zip(answered, gaps, strict=True)
        if minimum_gap is None or found >= minimum_gap
    ]
    record = {
        "given": len(traces),
        "only right answers": right is not None,
        "wrong": len(traces) - len(answered),
        "minimum gap": minimum_gap,
        "gap too small": len(answered) - len(kept),
    }
    if not kept:
        raise ValueError(f"no trace passes the filters: {record}")
    return kept, record


def effect_at(
    trace: CausalTrace, positions: Int[Tensor, " _"] | None, effect: str
) -> Float[Tensor, "site layer"]:
    """The effect of restoring these positions; NaN where the trace has no group within them."""
    values: Tensor = getattr(trace, effect).double()
    wanted = set() if positions is None else set(positions.tolist())
    within = [index for index, group in enumerate(trace.groups) if set(group) <= wanted]
    exactly = [index for index in within if set(trace.groups[index]) == wanted]
    if not within:
        return values.new_full((len(trace.sites), len(trace.layers)), torch.nan)
    return values[:, exactly[:1] or within].mean(dim=1)


def at(name: Any, names: Sequence[Any]) -> int:
    """Where a name stands; a ValueError lists what is there."""
    if name not in names:
        raise ValueError(f"{name!r} is not among {', '.join(map(str, names))}")
    return names.index(name)
