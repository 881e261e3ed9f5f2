"""Means of a sweep over its questions, with bootstrap intervals: tables and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from mmlens.analyses.metrics import FALLING, gap
from mmlens.sweeps.task import ROLES
from mmlens.utils.csv_files import write_csv
from mmlens.utils.files import write_atomically
from mmlens.utils.statistics import bootstrap_mean

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class Summary:
    """What `summarize` gives."""

    table: pd.DataFrame
    """One row per measure and cell (site, role, layer, window): n, mean, low, high."""
    peaks: pd.DataFrame
    """Of these, the layer with the largest mean (the lowest, of a loss or a KL divergence, which
    restoring makes smaller); its interval knows nothing of the choice."""
    figures: dict[str, Figure]
    """One per measure: a panel per site and role, layers to the right, a line per window."""
    counts: dict[str, Any]
    """Questions: used here, and why others are not; of a `Sweep`, planned, done, failed and why."""
    metric: str = "probability"
    """What traces follow."""

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
            written.append(write_csv(table.round(6), folder / f"{name}.csv"))
        counts = json.dumps(self.counts | remarks, indent=2) + "\n"
        return [*written, write_atomically(folder / "counts.json", counts)]


def columns_of(manifest: Mapping[str, Any], with_gap: bool) -> list[str]:
    """The columns that `summarize` needs; with a gap, the clean and corrupted probabilities."""
    gap = ["clean", "corrupted"] if with_gap else []
    if not set(gap) <= manifest["columns"].keys():
        raise ValueError("minimum_gap is for traces; this sweep has no corrupted runs")
    return ["question", "cluster", "is_right", *manifest["keys"], *manifest["measures"], *gap]


def metric_of(manifest: Mapping[str, Any]) -> str:
    """Return what the traces of a sweep follow; "probability" for every other task."""
    identity = manifest["identity"]
    settings = identity.get("settings", {}) if identity.get("task") == "trace" else {}
    return str(settings.get("metric", "probability"))


def summarize(
    rows: pd.DataFrame,
    manifest: Mapping[str, Any],
    *,
    only_right: bool = False,
    minimum_gap: float | None = None,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Means over the questions that are done, with intervals of a bootstrap over clusters.

    Questions about the same subject, or the same image where none is named, are resampled
    together.

    Args:
        rows: of the questions, with `columns_of` the manifest.
        manifest: of the sweep; see `Sweep.manifest`.
        only_right: leave out questions that are not known to be answered rightly.
        minimum_gap: leave out traces whose clean - corrupted probability is smaller (or logit
            difference; or corrupted - clean loss or KL divergence).
        samples: resamples.
        level: of the intervals.
        seed: of the resampling.

    Raises:
        ValueError: no rows are there, or none that pass the filters.

    Example:
        >>> sweep = Sweep("runs/trace")
        >>> summarize(sweep.results(), sweep.manifest, minimum_gap=0.05).table
    """
    keys, measures = manifest["keys"], manifest["measures"]
    rows = rows[columns_of(manifest, minimum_gap is not None)]
    metric = metric_of(manifest)
    rows, dropped = passing_questions(rows, only_right, minimum_gap, metric)
    rows = rows.sort_values("question", kind="stable")
    tables = []
    for measure in measures:
        values, cells, clusters = as_matrix(rows, keys, measure)
        found = bootstrap_mean(values, clusters, samples=samples, seed=seed, level=level)
        numbers = {name: x.numpy() for name, x in found._asdict().items()}
        n = (~values.isnan()).sum(dim=0).numpy()
        tables.append(in_order(cells.assign(measure=measure, n=n, **numbers)))
    table = pd.concat(tables, ignore_index=True)
    there = [key for key in keys if key != "layer"]
    best = table.dropna(subset="mean").groupby([*there, "measure"], sort=False, observed=True)
    means = best["mean"]
    peak = means.idxmin() if metric in FALLING else means.idxmax()
    peaks = table.loc[peak].reset_index(drop=True)
    n_used = int(rows["question"].nunique())
    subtitle = f"{manifest['model']['name']}, {n_used} questions, {level:.0%} bootstrap interval"
    figures = {measure: draw_measure(table, measure, subtitle, metric) for measure in measures}
    return Summary(table, peaks, figures, {**dropped, "used": n_used}, metric)


def passing_questions(
    rows: pd.DataFrame, only_right: bool, minimum_gap: float | None, metric: str
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows of questions that pass, and how many questions do not."""
    dropped: dict[str, int] = {}

    def kept(rows: pd.DataFrame, passes: pd.Series, why: str) -> pd.DataFrame:
        before = rows["question"].nunique()
        rows = rows[passes]
        dropped[why] = int(before - rows["question"].nunique())
        return rows

    if only_right:
        rows = kept(rows, rows["is_right"].fillna(False).astype(bool), "not known to be right")
    if minimum_gap is not None:
        found = gap(metric, rows["clean"], rows["corrupted"])
        rows = kept(rows, found >= minimum_gap, "gap too small")
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


def draw_measure(table: pd.DataFrame, measure: str, subtitle: str, metric: str) -> Figure:
    """A panel per site and role (or group of questions), a line per window (or method)."""
    from mmlens.plots.layer_profile import plot_layer_profile
    from mmlens.plots.trace import SHORT

    points = table[table["measure"] == measure].copy()
    for name in ("site", "role"):
        points[name] = points[name].astype(str)
    if "source_role" in points:
        points["role"] = points["source_role"].astype(str) + " to " + points["role"]
    points["model"] = "window " + points["window"].astype(str)
    if "scale" in points:
        points["model"] = "scale " + points["scale"].map("{:g}".format)
    if "method" in points:
        points["model"] = points["method"].astype(str)
        points["role"] = points["group"].astype(str)
    followed = "" if metric == "probability" else f" ({SHORT.get(metric, metric)})"
    title = measure.replace("_", " ") + followed
    return plot_layer_profile(points, y_title=title, subtitle=subtitle)
