"""A figure and all that it is made of, in a folder of its own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.files import write_atomically
from mmlens.plots.save import FigureNotSaved, save_figure

if TYPE_CHECKING:
    import pandas as pd
    from plotly import graph_objects as go

    from mmlens.editing.bench import EditBench
    from mmlens.editing.bench_settings import BenchSettings
    from mmlens.reproduce.settings import Settings
    from mmlens.reproduce.study import Study

SETTINGS = "settings.json"
PACKAGES = ("mmlens", "torch", "transformers", "transformer_lens", "numpy", "scipy")


@dataclass(frozen=True, eq=False)
class Figure:
    """What a reproduction gives."""

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


def write(made: Figure, study: Study | EditBench, out: str | Path) -> list[Path]:
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
        content = table.round(6).to_csv(index=False)
        written.append(write_atomically(folder / f"{name}.csv", content))
    raw = made.raw.to_parquet(index=False)
    written.append(write_atomically(folder / "raw.parquet", raw))
    record = {
        **stamp(made.name, study.settings),
        "questions": made.counts,
        **made.notes,
        **remarks,
        "device": str(study.model.device),
        "files": sorted(path.name for path in written),
    }
    written.append(write_atomically(folder / SETTINGS, json.dumps(record, indent=2) + "\n"))
    return written


def stamp(name: str, settings: Settings | BenchSettings) -> dict[str, Any]:
    """What says whether a figure is that of these settings."""
    return {
        "figure": name,
        "settings": json.loads(json.dumps(asdict(settings))),
        "versions": {package: version(package) for package in PACKAGES},
    }


def is_complete(name: str, settings: Settings, out: str | Path) -> bool:
    """Whether `out` holds this figure already, made with the same settings and versions."""
    folder = Path(out) / name
    try:
        record = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    same = all(record.get(key) == value for key, value in stamp(name, settings).items())
    return same and all((folder / file).is_file() for file in record["files"])
