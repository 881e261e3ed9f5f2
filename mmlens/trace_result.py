"""`CausalTrace`: the result of `causal_trace`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmlens.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """P(answer) of the clean run, of the corrupted run, and with every cell restored.

    Example:
        >>> trace.recovery[0, 0].argmax()         # the layer whose restoration helps most
        >>> trace.save("trace.safetensors"); trace = CausalTrace.load("trace.safetensors")
    """

    restored: Float[Tensor, "site group layer"]
    """P(answer) with the clean activations of the cell put back."""
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

    @property
    def indirect_effect(self) -> Float[Tensor, "site group layer"]:
        """What the cell brings back of the answer's probability: restored - corrupted."""
        return self.restored - self.corrupted

    @property
    def recovery(self) -> Float[Tensor, "site group layer"]:
        """1 where the cell brings back everything: indirect_effect / (clean - corrupted)."""
        return self.indirect_effect / (self.clean - self.corrupted)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: site, group, label, positions, layer, window and the three effects."""
        import pandas as pd

        rows = [
            {
                "site": site,
                "group": group,
                "label": self.group_labels[group],
                "positions": list(self.groups[group]),
                "layer": layer,
                "window": self.window,
                "restored": float(self.restored[s, group, i]),
                "indirect_effect": float(self.indirect_effect[s, group, i]),
                "recovery": float(self.recovery[s, group, i]),
            }
            for s, site in enumerate(self.sites)
            for group in range(len(self.groups))
            for i, layer in enumerate(self.layers)
        ]
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """A figure with one panel per site; see `mmlens.plots.trace`."""
        from mmlens.plots.trace import plot_trace

        return plot_trace(self)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, which appears only when it is complete."""
        fields = asdict(self)
        del fields["restored"]
        tensors = {"restored": self.restored.contiguous()}
        return write_atomically(path, save(tensors, {"trace": json.dumps(fields)}))

    @classmethod
    def load(cls, path: str | Path) -> CausalTrace:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                fields = json.loads((file.metadata() or {})["trace"])
                restored = file.get_tensor("restored")
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no causal trace") from error
        for name in ("sites", "layers", "group_labels", "answer_tokens"):
            fields[name] = tuple(fields[name])
        fields["groups"] = tuple(tuple(group) for group in fields["groups"])
        return cls(restored=restored, **fields)
