"""How many layers have to be restored together: windows of 1, 3, 5 and 6.

The paper: one layer is enough in LLaVA; in Vicuna effects show with five or more.
"""

from __future__ import annotations

import pandas as pd

from mmlens.plots.figure_folder import FigureWithTables
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.reproduce.study import Study
from mmlens.reproduce.tables import LABELS, peaks, raw_effects

SITES = ("attn_out", "mlp_out")
ROWS = {"seen": "sees the image", "named": "told the name"}


def windows_figure(study: Study) -> FigureWithTables:
    """Windows as lines, at the constraint; seeing above, told below."""
    chosen, counts = study.choose(("seen", "named"))
    tables, profiles = [], {}
    for kind in ("seen", "named"):
        for window in study.settings.windows:
            asked = [each[kind] for each in chosen]
            profile = study.trace(asked, sites=SITES, roles=("constraint",), window=window)
            layers = "1 layer" if window == 1 else f"{window} layers"
            profiles[f"{LABELS[kind]}, {layers}"] = profile
            tables.append(profile.to_dataframe(layers).assign(role=ROWS[kind]))
    table = pd.concat(tables)
    subtitle = study.describe(len(chosen), "restored at the constraint")
    figure = plot_layer_profile(
        table, title="How many layers are restored together", subtitle=subtitle
    )
    return FigureWithTables(
        "windows",
        figure,
        {"table": table, "peaks": peaks(table)},
        raw_effects(profiles),
        counts,
    )
