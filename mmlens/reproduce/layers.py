"""Layer profiles: the model that sees against the language model that is told.

The paper's first findings: in LLaVA the MLPs and attention of the first layers are causal at the
constraint (1 to 4 of 32), in Vicuna those a little later (4 to 7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmlens.plots.profile import plot_layer_profile
from mmlens.reproduce.figure import Figure
from mmlens.reproduce.tables import LABELS, early_tests, peaks, raw_effects

if TYPE_CHECKING:
    from mmlens.reproduce.study import Study


def layers(study: Study) -> Figure:
    """The same questions seen and in words alone, restored layer by layer."""
    import pandas as pd

    chosen, counts = study.choose(("seen", "named"))
    profiles = {
        LABELS[kind]: study.trace([each[kind] for each in chosen]) for kind in ("seen", "named")
    }
    table = pd.concat([each.to_dataframe(name) for name, each in profiles.items()])
    subtitle = study.describe(len(chosen), "one layer restored")
    title = "Which layers carry the answer: seeing, and told the name"
    figure = plot_layer_profile(table, title=title, subtitle=subtitle)
    probabilities = {name: each.metadata for name, each in profiles.items()}
    return Figure(
        "layers",
        figure,
        {"table": table, "peaks": peaks(table), "tests": early_tests(profiles)},
        raw_effects(profiles),
        counts,
        {"probabilities": probabilities},
    )
