"""Patching: a metric of many branches of one run, cell by cell.

    cells = {(layer, head): [Intervention(f"z[{head}]", layer, None, zero())] for ...}
    patched = mmlens.patch(model.record(inputs), cells, "probability", axes=("layer", "head"))
    patched.effect          # [layer, head]

A cell is a branch, a list of interventions, with its coordinates. Whatever an experiment does to a
run is a function of what `Recording.run` shares among the cells, so `causal_trace`,
`attention_knockout`, `ablation_scan` and `path_patch` are grids of cells that `patch` evaluates.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlens.analyses.metrics import Followed, Metric, followed
from mmlens.analyses.result import SavedResult, description, long_table
from mmlens.branching.joined import Branch
from mmlens.branching.recording import Recording
from mmlens.utils.grad_mode import without_gradients
from mmlens.utils.progress import Progress
from mmlens.utils.threads import on_free_cores

if TYPE_CHECKING:
    import pandas as pd

Coordinate = str | int


@dataclass(frozen=True, eq=False)
class Patched(SavedResult):
    """A metric with each cell's interventions, over the axes of the cells.

    Example:
        >>> patched.effect[3, 5]                  # of the cell (3, 5), where axes count from 0
        >>> patched.to_dataframe()                # a row for every cell
    """

    values: Float[Tensor, "*axis"]
    """The metric with the interventions of each cell, the mean over the recording's rows. NaN where
    there is no cell. A metric of several numbers has one more axis, the last."""
    baseline: float | tuple[float, ...]
    """The metric without interventions."""
    axes: tuple[str, ...]
    coordinates: tuple[tuple[Coordinate, ...], ...]
    """Of every axis."""
    metric: str
    answer: str = ""
    """The answer that the metric follows, where it follows one."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model and prompt."""

    @property
    def effect(self) -> Float[Tensor, "*axis"]:
        """What the interventions change: values - baseline."""
        return self.values - torch.tensor(self.baseline, dtype=self.values.dtype)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: its coordinates, value, effect."""
        table = long_table(self.named_axes(), {"value": self.values, "effect": self.effect})
        return table.dropna(subset="value", ignore_index=True)

    def named_axes(self) -> dict[str, Sequence[Coordinate]]:
        """Return the coordinates by the names of the axes, one of measures included."""
        axes: dict[str, Sequence[Coordinate]] = dict(zip(self.axes, self.coordinates, strict=True))
        if isinstance(self.baseline, tuple):
            axes["measure"] = range(len(self.baseline))
        return axes


@without_gradients
@on_free_cores
def patch(
    recording: Recording,
    cells: Mapping[Any, Branch],
    metric: Metric = "probability",
    *,
    axes: Sequence[str] | None = None,
    answer: str | int | None = None,
    contrast: str | int | None = None,
    positions: Int[Tensor, " read"] | Sequence[int] | None = None,
    reference: Recording | None = None,
    batch_rows: int | None = None,
    progress: Progress | None = None,
    plain: bool = False,
) -> Patched:
    """Evaluate a metric of every cell, each a branch of one recorded run.

    Args:
        recording: `model.record(inputs)`; rows (samples of noise, a batch) are averaged over.
        cells: by its coordinates (a number or a text, or a tuple of them), what each cell changes:
            a list of interventions.
        metric: "probability", "logit_diff", "kl" or "loss" (see `mmlens.analyses.metrics`), or a
            function of the logits [row, n, d_vocab] that returns a number, or several, for each
            row.
        axes: names of the coordinates.
        answer: which answer a named metric follows: a text, a token id, or None for the recorded
            run's most probable next token.
        contrast: the answer whose logit "logit_diff" subtracts.
        positions: where a function reads logits; by default at the last position, or where the
            tokens of `answer` are predicted.
        reference: the run whose next token (after its own last position) "kl" compares with, of one
            row or of as many as the recording; by default the recorded run.
        batch_rows: the most rows computed at once; None takes what fits into free memory.
        progress: called with (cells done, cells in all).
        plain: make every cell a full hooked run, the reference for the others.

    Raises:
        ValueError: no cells, coordinates that do not match `axes`, a metric that lacks something.

    Example:
        >>> recording = model.record(inputs, sites=[("mlp_out", range(4))])
        >>> cells = {(layer, at): [Intervention("mlp_out", layer, at, zero())]
        ...          for layer in range(4) for at in inputs.span("image").tolist()}
        >>> mmlens.patch(recording, cells, "loss", axes=("layer", "position"), answer="Rome")
    """
    if not cells:
        raise ValueError("no cells to patch")
    keys = [tuple(map(as_coordinate, key if isinstance(key, tuple) else (key,))) for key in cells]
    names = axis_names(keys, axes)
    what = followed(recording, metric, answer, contrast, positions, reference)
    found = evaluated(
        what, list(cells.values()), batch_rows=batch_rows, progress=progress, plain=plain
    )
    base = what.baseline().tolist()
    coordinates = [tuple(dict.fromkeys(axis)) for axis in zip(*keys, strict=True)]
    return Patched(
        values=on_axes(found, keys, coordinates),
        baseline=tuple(base) if isinstance(base, list) else base,
        axes=names,
        coordinates=tuple(coordinates),
        metric=what.name,
        answer="" if what.answer is None else what.answer.text,
        metadata=description(recording.model, recording.inputs),
    )


def evaluated(
    what: Followed, branches: Sequence[Branch], **options: Any
) -> Float[Tensor, "cell ..."]:
    """Return a metric of branches, on the CPU, the mean over the recording's rows.

    Where it is NaN, which is what tables take for a cell that is not there, a warning says so.
    """
    run = what.recording.run(branches, what.function, positions=what.positions, **options)
    found: Tensor = run.mean(dim=1).cpu()
    broken = found.isnan().view(len(found), -1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        warnings.warn(
            f"{what.name!r} is NaN in {len(broken)} of {len(found)} runs (the first: number "
            f"{broken[0]}, counted from 0): did an activation overflow? Tables leave these out",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def as_coordinate(coordinate: Any) -> Coordinate:
    """Return a coordinate as files hold it, where it is a number of numpy's or torch's."""
    found: Coordinate = coordinate.item() if hasattr(coordinate, "item") else coordinate
    return found


def axis_names(
    keys: Sequence[tuple[Coordinate, ...]], axes: Sequence[str] | None
) -> tuple[str, ...]:
    """Return a name for each coordinate; a ValueError where cells have other numbers of them."""
    n = len(keys[0])
    names = tuple(axes) if axes is not None else tuple(f"axis_{i}" for i in range(n))
    wrong = [key for key in keys if len(key) != len(names)]
    if wrong or isinstance(axes, str):
        raise ValueError(
            f"axes={axes!r}, but a cell has the coordinates {wrong[0] if wrong else keys[0]}; "
            "every cell has one for each axis"
        )
    return names


def on_axes(
    found: Float[Tensor, "cell ..."],
    keys: Sequence[tuple[Coordinate, ...]],
    coordinates: Sequence[tuple[Coordinate, ...]],
) -> Float[Tensor, "*axis"]:
    """Return values of cells on the grid of their coordinates, NaN where there is none."""
    sizes = [len(axis) for axis in coordinates]
    index = [{each: i for i, each in enumerate(axis)} for axis in coordinates]
    grid = found.new_full((*sizes, *found.shape[1:]), torch.nan)
    places = [[axis[each] for axis, each in zip(index, key, strict=True)] for key in keys]
    grid[tuple(torch.tensor(places).T)] = found
    return grid
