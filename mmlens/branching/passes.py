"""Which branches are computed together, and how many fit.

A pass takes branches with close first positions: in attention each gets as much room as the longest
of its pass, elsewhere only what it needs. Within a pass they are ordered by the layer at which they
join, and a pass ends where it holds as much as is fast, or as fits into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmlens.branching.schedule import Start
from mmlens.utils.memory import free_memory

if TYPE_CHECKING:
    from mmlens.model.transformer import HookedMultimodalTransformer

# Positions of one pass beyond which it gets no faster per position. On two CPU cores, products with
# SmolLM2-135M's weights reach 139, 177, 188 and 190 GFLOP/s at 22, 200, 612 and 2048 positions.
# That of a GPU is an estimate: enough rows to fill its kernels with a 7B model's weights.
FAST = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Pass:
    """Branches that are computed together."""

    indices: tuple[int, ...]
    """Which branches, in the order in which they join."""
    wide: int
    """Positions that the longest of them computes, in all rows of the recording."""
    is_plain: bool = False
    """Whether they are run from the beginning instead."""

    @property
    def size(self) -> int:
        """Positions of all branches, were all as long as the longest."""
        return self.wide * len(self.indices)

    def within(self, size: int) -> list[Pass]:
        """The same branches in passes of at most this size, but at least one branch each."""
        n = max(1, size // self.wide)
        parts = [self.indices[i : i + n] for i in range(0, len(self.indices), n)]
        return [Pass(part, self.wide, self.is_plain) for part in parts]


def passes(
    starts: Sequence[Start | None],
    n_pos: int,
    n_rows: int,
    model: HookedMultimodalTransformer,
    batch_rows: int | None,
) -> list[Pass]:
    """Passes over all branches, whose starts are given (None: must be run from the beginning).

    Raises:
        ValueError: `batch_rows` is no whole number above 0, and not None.
    """
    if batch_rows is not None and (not isinstance(batch_rows, int) or batch_rows < 1):
        raise ValueError(
            f"batch_rows={batch_rows!r}; it is a whole number of rows, at least 1, or None"
        )
    result = [
        Pass((index,), n_pos * n_rows, is_plain=True)
        for index, start in enumerate(starts)
        if start is None
    ]
    known = {index: start for index, start in enumerate(starts) if start is not None}
    order = sorted(known, key=lambda index: (known[index].first, known[index].layer))
    most = len(order) if batch_rows is None else max(1, batch_rows // n_rows)
    while order:
        suffix = n_pos - known[order[0]].first
        wide = suffix * n_rows
        n = max(1, min(most, size_limit(model, suffix) // wide))
        chosen, order = order[:n], order[n:]
        result.append(Pass(tuple(sorted(chosen, key=lambda i: known[i].layer)), wide))
    return result


def size_limit(model: HookedMultimodalTransformer, suffix: int) -> int:
    """How many positions a pass may compute, from free memory and the speed of the device."""
    cfg, device = model.cfg, model.device
    # Residual stream, its norm and an output; queries, keys and values before and after the rotary
    # embedding; what the MLP holds; scores in float32 and what softmax makes of them. Half of the
    # memory is left to readouts and fragmentation.
    widths = 6 * cfg.d_model + 4 * (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head + 4 * cfg.d_mlp
    per_position = widths * model.W_E.element_size() + 16 * cfg.n_heads * suffix
    return min(FAST.get(device.type, FAST["cpu"]), free_memory(device) // (2 * per_position))
