"""The task `contributions`: what positions receive from others through attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import torch

from mmlens.analyses.arguments import layers_of
from mmlens.analyses.attention_contribution import attention_contribution
from mmlens.analyses.contribution_measures import measures
from mmlens.model.transformer import HookedMultimodalTransformer
from mmlens.sweeps.task import Asked, Carried, Columns, Task
from mmlens.utils.grad_mode import gradients

MEASURED = ("total", "late_share", "largest_share", "tokens_for_half", "layer_share")
"""Names of `mmlens.analyses.contribution_measures.MEASURES` as columns."""


@dataclass(frozen=True, kw_only=True)
class ContributionsTask(Task):
    """Attention contributions of every question, summed over the sources.

    `total` is the sum over the source's positions, `late_share` what the last sixteenth of them
    holds of it, `largest_share` what the largest sixteenth does, `tokens_for_half` how many of the
    largest hold half, `layer_share` the layer's part of the sum over the layers; each of the mean
    over the destination's positions (`mmlens.analyses.contribution_measures`).
    """

    name: ClassVar[str] = "contributions"
    columns: ClassVar[Columns] = {
        "source_role": pa.string(),
        "confidence": pa.float32(),
        **dict.fromkeys(MEASURED, pa.float32()),
    }
    measures: ClassVar[tuple[str, ...]] = ("total", "late_share", "largest_share", "layer_share")
    keys: ClassVar[tuple[str, ...]] = ("source_role", "site", "role", "layer", "window")

    pairs: tuple[tuple[str, str], ...] = (("image", "constraint"), ("constraint", "last token"))
    """Roles of source and destination, like "image>constraint" (see `mmlens.role_positions`)."""
    layers: tuple[int, ...] | None = None
    """All by default."""

    def __post_init__(self) -> None:
        self.check_roles(role for pair in self.pairs for role in pair)

    def check(self, model: HookedMultimodalTransformer) -> None:
        """Raise a ValueError where the model lacks what the settings name."""
        layers_of(model, self.layers)

    def rows(
        self, model: HookedMultimodalTransformer, asked: Asked, carried: Carried
    ) -> list[dict[str, Any]]:
        """One row per pair and layer."""
        there = asked.roles()
        pairs = [pair for pair in self.pairs if set(pair) <= there.keys()]
        if not pairs:
            raise ValueError(f"the question has none of the pairs of roles {self.pairs}")
        carried.earlier.clear()
        with gradients(False):
            most = model(asked.inputs)[0, -1].float().softmax(dim=-1).max(dim=-1)
        common = {
            "answer": model.to_string(most.indices[None]),
            "is_right": self.is_right(model, asked),
            "confidence": float(most.values),
            "site": "attn_out",
            "window": 1,
        }
        rows: list[dict[str, Any]] = []
        for source, destination in pairs:
            rows += [
                common | {"source_role": source, "role": destination} | each
                for each in self.measured(model, asked, there[source], there[destination])
            ]
        return rows

    def measured(
        self,
        model: HookedMultimodalTransformer,
        asked: Asked,
        source: torch.Tensor,
        destination: torch.Tensor,
    ) -> list[dict[str, Any]]:
        """The numbers of every layer; shares of nothing are None."""
        found = attention_contribution(model, asked.inputs, source, destination, layers=self.layers)
        rows = []
        values = measures(found.values.double().mean(dim=1)).tolist()
        for layer, (total, *rest) in zip(found.layers, values, strict=True):
            shares = [None if total == 0 else value for value in rest]
            rows.append({"layer": layer, **dict(zip(MEASURED, [total, *shares], strict=True))})
        return rows
