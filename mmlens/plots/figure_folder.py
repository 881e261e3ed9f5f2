"""A figure and all that it is made of, in a folder of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.plots.save import FigureNotSaved, save_figure
from mmlens.utils.csv_files import write_csv
from mmlens.utils.files import write_atomically
from mmlens.utils.resumable import agrees, as_json, versions

if TYPE_CHECKING:
    import pandas as pd
    from plotly import graph_objects as go

SETTINGS = "settings.json"
PACKAGES = ("mmlens", "torch", "transformers", "transformer_lens", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True, eq=False)
class FigureWithTables:
    """A figure of a reproduction, with the numbers that it shows."""

    name: str
    figure: go.Figure
    tables: dict[str, pd.DataFrame]
    """What the figure shows ("table"), and further ones ("tests", "peaks")."""
    raw: pd.DataFrame
    """One row per question and number."""
    counts: dict[str, Any]
    """Questions: considered, dropped (and why), used."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Further settings of this figure."""


def write(made: FigureWithTables, settings: Any, device: object, out: str | Path) -> list[Path]:
    """Write `NAME/` in `out`: figure.html and .png, tables as csv, raw.parquet, settings.json.

    The settings come last: where they are, the rest is complete. Without a browser there is no png.
    """
    folder = Path(out) / made.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    written = [save_figure(made.figure, folder / "figure.html")]
    remarks = {}
    try:
        written.append(save_figure(made.figure, folder / "figure.png"))
    except FigureNotSaved as error:
        remarks["no figure.png"] = str(error)
    for name, table in made.tables.items():
        written.append(write_csv(table.round(6), folder / f"{name}.csv"))
    raw = made.raw.to_parquet(index=False)
    written.append(write_atomically(folder / "raw.parquet", raw))
    record = {
        **stamp(made.name, settings),
        "questions": made.counts,
        **made.notes,
        **remarks,
        "device": str(device),
        "files": sorted(path.name for path in written),
    }
    written.append(write_atomically(folder / SETTINGS, json.dumps(record, indent=2) + "\n"))
    return written


def stamp(name: str, settings: Any) -> dict[str, Any]:
    """Return a text that tells whether a figure was made with these settings and versions."""
    return {
        "figure": name,
        "settings": as_json(asdict(settings)),
        "versions": versions(PACKAGES),
    }


def is_complete(name: str, settings: Any, out: str | Path) -> bool:
    """Return whether `out` holds this figure already, made with the same settings and versions."""
    folder = Path(out) / name
    try:
        record = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        same = agrees(record, stamp(name, settings))
        return same and all((folder / file).is_file() for file in record["files"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # no record of ours
        return False
