"""The task `trace`: causal traces, each role of positions restored as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from mmlens.corruptions import swap_span
from mmlens.interventions import split_site
from mmlens.sweeps.task import Asked, Carried, Columns, Task
from mmlens.trace_grid import SITES, layer_centres
from mmlens.trace_result import CausalTrace
from mmlens.tracing import traced

if TYPE_CHECKING:
    from mmlens.model import HookedMultimodalTransformer

ROLES = ("constraint", "constraint last", "after constraint", "last token", "text constraint")


@dataclass(frozen=True, kw_only=True)
class TraceTask(Task):
    """MultiModalCausalTrace of every question: `mmlens.causal_trace` at the roles of positions.

    What comes before the constraint is the same in both runs and cannot matter, so roles in front
    of it are not traced unless they are asked for.
    """

    name: ClassVar[str] = "trace"
    columns: ClassVar[Columns] = {
        "n_positions": pa.int32(),
        "restored": pa.float32(),
        "clean": pa.float32(),
        "corrupted": pa.float32(),
        "indirect_effect": pa.float32(),
    }
    measures: ClassVar[tuple[str, ...]] = ("indirect_effect",)

    sites: tuple[str, ...] = SITES
    """Activations of the decoder, see `mmlens.causal_trace`."""
    windows: tuple[int, ...] = (1,)
    """Widths: how many adjacent layers are restored together."""
    layers: tuple[int, ...] | None = None
    """Centres of the windows; all by default."""
    roles: tuple[str, ...] = ROLES
    """Of positions, see `mmlens.role_positions`; those that a question lacks are left out."""
    corrupt: tuple[str, ...] = ("constraint",)
    """Spans that are replaced in the corrupted run."""
    replacement: str = "Paris"
    """The word whose first token takes their place."""

    def __post_init__(self) -> None:
        self.check_roles(self.roles)
        for site in self.sites:
            split_site(site)
        if not (self.sites and self.roles and self.windows and min(self.windows) > 0):
            raise ValueError(
                f"sites {self.sites}, roles {self.roles} and windows {self.windows}: there must be "
                "some, and windows of at least 1 layer"
            )

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Raise a ValueError where the model lacks what the settings name."""
        layer_centres(model, self.sites, self.layers)

    def rows(
        self, model: HookedMultimodalTransformer, asked: Asked, carried: Carried
    ) -> list[dict[str, Any]]:
        """One row per window, site, role and layer."""
        there = asked.roles()
        roles = {role: there[role] for role in self.roles if role in there}
        if not roles:
            raise ValueError(f"the question has none of the roles {', '.join(self.roles)}")
        corrupted = asked.inputs
        for span in self.corrupt:
            corrupted = swap_span(model, corrupted, span, self.replacement)
        # A constraint of one token is its own last: the same positions are restored once.
        groups = {tuple(positions.tolist()): positions for positions in roles.values()}
        at = {role: list(groups).index(tuple(each.tolist())) for role, each in roles.items()}
        rows = []
        right = self.is_right(model, asked)
        for window in self.windows:
            trace, carried.like = traced(
                model,
                asked.inputs,
                corrupted,
                sites=self.sites,
                layers=self.layers,
                window=window,
                positions=list(groups.values()),
                batch_rows=carried.batch_rows,
                like=carried.like,
            )
            rows += [row | {"is_right": right} for row in rows_of(trace, at)]
        return rows


def rows_of(trace: CausalTrace, at: dict[str, int]) -> list[dict[str, Any]]:
    """A row per cell of a trace; `at` says which group a role's positions are."""
    restored = trace.restored.tolist()
    return [
        {
            "answer": trace.answer,
            "site": site,
            "role": role,
            "layer": layer,
            "window": trace.window,
            "n_positions": len(trace.groups[group]),
            "restored": restored[s][group][i],
            "clean": trace.clean,
            "corrupted": trace.corrupted,
            "indirect_effect": restored[s][group][i] - trace.corrupted,
        }
        for s, site in enumerate(trace.sites)
        for role, group in at.items()
        for i, layer in enumerate(trace.layers)
    ]
