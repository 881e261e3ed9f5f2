"""`CausalTrace`: the result of `causal_trace`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from mmlens.analyses.result import SavedResult, long_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class CausalTrace(SavedResult):
    """A metric of the clean run, of the corrupted run, and with every cell restored.

    It is P(answer), unless the trace was asked for another one.

    Example:
        >>> trace.recovery[0, 0].argmax()         # the layer whose restoration helps most
        >>> trace.save("trace.safetensors"); trace = CausalTrace.load("trace.safetensors")
    """

    SIZES: ClassVar[dict[str, str]] = {
        "sites": "site",
        "groups": "group",
        "group_labels": "group",
        "layers": "layer",
    }

    restored: Float[Tensor, "site group layer"]
    """The metric with the clean activations of the cell put back."""
    clean: float
    corrupted: float
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    """Centres of the windows."""
    window: int
    """Layers restored together."""
    groups: tuple[tuple[int, ...], ...]
    """Positions restored together."""
    group_labels: tuple[str, ...]
    answer: str
    answer_tokens: tuple[int, ...]
    method: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model, prompt, tokens, samples, seconds: whatever JSON can hold."""
    metric: str = "probability"
    """What was measured: a name of `mmlens.analyses.metrics`, or a function's."""
    contrast: str = ""
    """The answer whose logit is subtracted in `logit_difference`."""
    logit_difference: Float[Tensor, "site group layer"] | None = None
    """Logit of the answer - logit of the contrast (their first tokens), with each cell restored."""
    clean_logit_difference: float | None = None
    corrupted_logit_difference: float | None = None
    kl: Float[Tensor, "site group layer"] | None = None
    """KL(clean || restored) of the next token after the prompt, in nats."""
    corrupted_kl: float | None = None
    """KL(clean || corrupted)."""

    @property
    def indirect_effect(self) -> Float[Tensor, "site group layer"]:
        """What the cell brings back of the metric: restored - corrupted.

        It is negative where a loss or a divergence gets smaller.
        """
        return self.restored - self.corrupted

    @property
    def recovery(self) -> Float[Tensor, "site group layer"]:
        """1 where the cell brings back everything: indirect_effect / (clean - corrupted)."""
        return self.indirect_effect / (self.clean - self.corrupted)

    @property
    def logit_difference_effect(self) -> Float[Tensor, "site group layer"]:
        """What the cell brings back of the logit difference: restored - corrupted.

        Raises:
            ValueError: the trace was made without `contrast`.
        """
        if self.logit_difference is None or self.corrupted_logit_difference is None:
            raise ValueError("no logit differences: causal_trace(contrast=...) computes them")
        return self.logit_difference - self.corrupted_logit_difference

    @property
    def kl_effect(self) -> Float[Tensor, "site group layer"]:
        """How much nearer to the clean run's distribution the cell brings: KL corrupted - restored.

        Raises:
            ValueError: the trace was made without `kl=True`.
        """
        if self.kl is None or self.corrupted_kl is None:
            raise ValueError("no KL: causal_trace(kl=True) computes it")
        return self.corrupted_kl - self.kl

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: site, group, label, positions, layer, window, and what was measured."""
        names = ["restored", "indirect_effect", "recovery"]
        names += [name for name in ("logit_difference", "kl") if getattr(self, name) is not None]
        table = table_of_cells(self, {name: getattr(self, name) for name in names})
        table.insert(5, "window", self.window)
        return table


def table_of_cells(
    result: Any, values: dict[str, Float[Tensor, "site group layer"]]
) -> pd.DataFrame:
    """Return a row per cell: site, group, label, positions, layer, and the values by column."""
    groups = range(len(result.groups))
    table = long_table({"site": result.sites, "group": groups, "layer": result.layers}, values)
    table.insert(2, "label", [result.group_labels[group] for group in table["group"]])
    table.insert(3, "positions", [list(result.groups[group]) for group in table["group"]])
    return table
