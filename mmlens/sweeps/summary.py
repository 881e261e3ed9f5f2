"""Means of a sweep over its questions, with bootstrap intervals: tables and figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmlens.files import write_atomically
from mmlens.resampling import bootstrap_mean
from mmlens.sweeps.task import ROLES

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from mmlens.sweeps.results import Sweep

__all__ = ["Summary", "summarize"]


@dataclass(frozen=True, eq=False)
class Summary:
    """What `summarize` gives."""

    table: pd.DataFrame
    """One row per measure and cell (site, role, layer, window): n, mean, low, high."""
    peaks: pd.DataFrame
    """Of these, the layer with the largest mean; its interval knows nothing of the choice."""
    figures: dict[str, Figure]
    """One per measure: a panel per site and role, layers to the right, a line per window."""
    counts: dict[str, Any]
    """Questions: planned, done, failed and why, used here and why the others are not."""

    def write(self, out: str | Path) -> list[Path]:
        """Write `table.csv`, `peaks.csv`, `counts.json` and every figure as html and png.

        Without a browser there is no png.
        """
        from mmlens.plots.save import FigureNotSaved, save_figure

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        written, remarks = [], {}
        for name, figure in self.figures.items():
            written.append(save_figure(figure, folder / f"{name}.html"))
            try:
                written.append(save_figure(figure, folder / f"{name}.png"))
            except FigureNotSaved as error:
                remarks[f"no {name}.png"] = str(error)
        for name, table in (("table", self.table), ("peaks", self.peaks)):
            content = table.round(6).to_csv(index=False)
            written.append(write_atomically(folder / f"{name}.csv", content))
        counts = json.dumps(self.counts | remarks, indent=2) + "\n"
        return [*written, write_atomically(folder / "counts.json", counts)]


def summarize(
    sweep: Sweep,
    *,
    only_right: bool = False,
    minimum_gap: float | None = None,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Means over the questions that are done, with intervals of a bootstrap over clusters.

    Questions about the same subject, or the same picture where none is named, are resampled
    together.

    Args:
        only_right: leave out questions that are not known to be answered rightly.
        minimum_gap: leave out traces whose clean - corrupted probability is smaller.
        samples: resamples.
        level: of the intervals.
        seed: of the resampling.

    Raises:
        ValueError: no rows are there, or none that pass the filters.

    Example:
        >>> summarize(Sweep("runs/trace"), minimum_gap=0.05).table
    """
    import pandas as pd

    keys, measures = sweep.manifest["keys"], sweep.manifest["measures"]
    gap = ["clean", "corrupted"] if minimum_gap is not None else []
    if not set(gap) <= sweep.manifest["columns"].keys():
        raise ValueError("minimum_gap is for traces; this sweep has no corrupted runs")
    rows = sweep.results(["question", "cluster", "is_right", *keys, *measures, *gap])
    rows, dropped = filtered(rows, only_right, minimum_gap)
    rows = rows.sort_values("question", kind="stable")
    tables = []
    for measure in measures:
        values, cells, clusters = as_matrix(rows, keys, measure)
        found = bootstrap_mean(values, clusters, samples=samples, seed=seed, level=level)
        numbers = {name: x.numpy() for name, x in zip(("mean", "low", "high"), found, strict=True)}
        n = (~values.isnan()).sum(dim=0).numpy()
        tables.append(in_order(cells.assign(measure=measure, n=n, **numbers)))
    table = pd.concat(tables, ignore_index=True)
    there = [key for key in keys if key != "layer"]
    best = table.dropna(subset="mean").groupby([*there, "measure"], sort=False, observed=True)
    peaks = table.loc[best["mean"].idxmax()].reset_index(drop=True)
    n_used = int(rows["question"].nunique())
    reasons = sweep.failures()["reason"].value_counts()
    counts = {
        "planned": sweep.n_questions,
        "done": sweep.n_done,
        "failed": sweep.n_failed,
        "why": {str(reason): int(n) for reason, n in reasons.items()},
        **dropped,
        "used": n_used,
    }
    model = sweep.manifest["model"]["name"]
    subtitle = f"{model}, {n_used} questions, {level:.0%} bootstrap interval"
    figures = {measure: draw(table, measure, subtitle) for measure in measures}
    return Summary(table, peaks, figures, counts)


def filtered(
    rows: pd.DataFrame, only_right: bool, minimum_gap: float | None
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows of questions that pass, and how many questions do not.

    Raises:
        ValueError: none passes.
    """
    dropped: dict[str, int] = {}

    def kept(rows: pd.DataFrame, passes: pd.Series, why: str) -> pd.DataFrame:
        before = rows["question"].nunique()
        rows = rows[passes]
        dropped[why] = int(before - rows["question"].nunique())
        return rows

    if only_right:
        rows = kept(rows, rows["is_right"].fillna(False).astype(bool), "not known to be right")
    if minimum_gap is not None:
        rows = kept(rows, rows["clean"] - rows["corrupted"] >= minimum_gap, "gap too small")
    if not len(rows):
        raise ValueError(f"no question has results, or passes the filters: {dropped}")
    return rows, dropped


def as_matrix(
    rows: pd.DataFrame, keys: list[str], measure: str
) -> tuple[torch.Tensor, pd.DataFrame, list[str]]:
    """Values [question, cell], NaN where there are none; what the cells are; clusters."""
    cell = rows.groupby(keys, sort=False, observed=True, dropna=False).ngroup().to_numpy()
    _, first = np.unique(cell, return_index=True)
    cells = rows[keys].iloc[first].reset_index(drop=True)
    questions, first, question = np.unique(
        rows["question"].to_numpy(), return_index=True, return_inverse=True
    )
    values = np.full((len(questions), len(cells)), np.nan)
    values[question, cell] = rows[measure].to_numpy(dtype=float)
    return torch.from_numpy(values), cells, list(rows["cluster"].iloc[first])


def in_order(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells with the roles as they stand in a prompt; others as they came."""
    place = {role: index for index, role in enumerate(ROLES)}
    return cells.sort_values(
        "role",
        kind="stable",
        key=lambda roles: roles.astype(str).map(lambda role: place.get(role, len(place))),
    )


def draw(table: pd.DataFrame, measure: str, subtitle: str) -> Figure:
    """A panel per site and role (or group of questions), a line per window (or method)."""
    from mmlens.plots.profile import plot_layer_profile

    points = table[table["measure"] == measure].copy()
    for name in ("site", "role"):
        points[name] = points[name].astype(str)
    if "source_role" in points:
        points["role"] = points["source_role"].astype(str) + " to " + points["role"]
    points["model"] = "window " + points["window"].astype(str)
    if "method" in points:
        points["model"] = points["method"].astype(str)
        points["role"] = points["group"].astype(str)
    return plot_layer_profile(points, y_title=measure.replace("_", " "), subtitle=subtitle)
