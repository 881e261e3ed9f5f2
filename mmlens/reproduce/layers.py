"""Layer profiles: the model that sees against the language model that is told.

The paper's first findings: in LLaVA the MLPs and attention of the first layers are causal at the
constraint (1 to 4 of 32), in Vicuna those a little later (4 to 7).
"""

from __future__ import annotations

import pandas as pd

from mmlens.plots.figure_folder import FigureWithTables
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.reproduce.study import Study
from mmlens.reproduce.tables import LABELS, early_tests, peaks, raw_effects


def layers_figure(study: Study) -> FigureWithTables:
    """The same questions seen and in words alone, restored layer by layer."""
    chosen, counts = study.choose(("seen", "named"))
    profiles = {
        LABELS[kind]: study.trace([each[kind] for each in chosen]) for kind in ("seen", "named")
    }
    table = pd.concat([each.to_dataframe(name) for name, each in profiles.items()])
    subtitle = study.describe(len(chosen), "one layer restored")
    title = "Which layers carry the answer: seeing, and told the name"
    figure = plot_layer_profile(table, title=title, subtitle=subtitle)
    probabilities = {name: each.metadata for name, each in profiles.items()}
    return FigureWithTables(
        "layers",
        figure,
        {"table": table, "peaks": peaks(table), "tests": early_tests(profiles)},
        raw_effects(profiles),
        counts,
        {"probabilities": probabilities},
    )
