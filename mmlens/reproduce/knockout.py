"""Which attention the answer needs: the causal side of the contributions.

Not a figure of the paper's. Where the constraint's words gather what is seen, cutting their
attention to the visual tokens must cost the answer (Geva et al. 2023).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import torch

from mmlens.analyses.attention_knockout import AttentionKnockout, attention_knockout
from mmlens.analyses.result import long_table
from mmlens.plots.figure_folder import FigureWithTables
from mmlens.plots.layer_profile import plot_layer_profile
from mmlens.reproduce.study import Study, StudyQuestion

WINDOW = 5
EDGES = (("image", "constraint"), ("image", "last"), ("constraint", "last"))


def knocked_out(each: StudyQuestion, **options: Any) -> AttentionKnockout:
    """Return what is left of one answer."""
    return attention_knockout(each.model, each.inputs, **options)


def knockout_figure(study: Study) -> FigureWithTables:
    """What is left of the answer when attention between two spans is cut."""
    chosen, counts = study.choose(corruptions=())
    asked = [each["seen"] for each in chosen]
    n_layers, tables, raws = study.model.cfg.n_layers, [], []
    for source, destination in EDGES:
        name = f"{source} → {destination}"
        cuts = []
        for chosen_layers, window in ((None, WINDOW), ([0], 2 * n_layers)):
            options: dict[str, Any] = {"layers": chosen_layers, "window": window}
            make = partial(knocked_out, source=source, destination=destination, **options)
            found = study.of_each(asked, [name, chosen_layers, window], AttentionKnockout, make)
            cuts.append(torch.stack([each.relative_effect for each in found]))
        values = torch.cat(cuts, dim=1)
        means = study.bootstrap(values, [each.cluster for each in asked])
        layers = [*range(n_layers), "all"]
        lines = {"model": name, "site": "relative change", "role": "", "layer": layers}
        tables.append(pd.DataFrame({**lines, **means}))
        axes = {"question": range(len(asked)), "layer": list(map(str, layers))}
        raws.append(long_table(axes, {"relative_effect": values}).assign(cut=name))
    table = pd.concat(tables)
    figure = plot_layer_profile(
        table[table["layer"] != "all"],
        y_title="change of P(answer)",
        title="Attention that is cut",
        subtitle=study.describe(len(asked), f"{WINDOW} layers cut; −1: nothing is left of it"),
    )
    return FigureWithTables(
        "knockout", figure, {"table": table}, pd.concat(raws), counts, {"window": WINDOW}
    )
