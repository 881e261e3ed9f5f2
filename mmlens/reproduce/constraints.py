"""One constraint against two: a visual one, and a text constraint that narrows the answer.

The paper traces questions with a text constraint at that constraint, six layers together, and finds
early and middle layers. Here either constraint is replaced, in questions where that matters.
"""

from __future__ import annotations

import pandas as pd

from mmlens.data import VisualQuestion
from mmlens.plots.figure_folder import FigureWithTables
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.reproduce.study import Study
from mmlens.reproduce.tables import early_tests, peaks, raw_effects

SITES = ("attn_out", "mlp_out")
ROLES = ("constraint", "text constraint", "last token")
WINDOW = 6
LINES = {
    "one constraint": (),
    "two: visual replaced": ("constraint",),
    "two: text replaced": ("text_constraint",),
}


def constraints_figure(study: Study) -> FigureWithTables:
    """Questions with and without a text constraint, restored at either constraint."""

    def has_two(question: VisualQuestion) -> bool:
        return bool(question.text_constraints)

    profiles, counts = {}, {}
    for name, replaced in LINES.items():
        corrupt = replaced or ("constraint",)
        chosen, counts[name] = study.choose(
            suits=(has_two if replaced else lambda question: not has_two(question)),
            corruptions=[corrupt],
        )
        asked = [each["seen"] for each in chosen]
        profiles[name] = study.trace(
            asked, sites=SITES, roles=ROLES, window=WINDOW, corrupt=corrupt
        )
    table = pd.concat([each.to_dataframe(name) for name, each in profiles.items()])
    table = table.sort_values("role", key=lambda roles: roles.map(ROLES.index), kind="stable")
    n_used = " / ".join(str(len(profile.values)) for profile in profiles.values())
    figure = plot_layer_profile(
        table.assign(role=table["role"].replace("constraint", "visual constraint")),
        title="One constraint and two",
        subtitle=study.describe(n_used, f"{WINDOW} layers restored"),
    )
    return FigureWithTables(
        "constraints",
        figure,
        {"table": table, "peaks": peaks(table), "tests": early_tests(profiles)},
        raw_effects(profiles),
        counts,
        {"window": WINDOW},
    )
