"""Which attention the answer needs: the causal side of the contributions.

Not a figure of the paper's. Where the constraint's words gather what is seen, cutting their
attention to the visual tokens must cost the answer (Geva et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmlens.attribution import attention_knockout
from mmlens.plots.profile import plot_layer_profile
from mmlens.reproduce.figure import Figure

if TYPE_CHECKING:
    from mmlens.reproduce.study import Study

WINDOW = 5
EDGES = (("image", "constraint"), ("image", "last"), ("constraint", "last"))


def knockout(study: Study) -> Figure:
    """What is left of the answer when attention between two spans is cut."""
    import pandas as pd

    chosen, counts = study.choose(corruptions=())
    asked = [each["seen"] for each in chosen]
    n_layers, tables, raws = study.model.cfg.n_layers, [], []
    for source, destination in EDGES:
        name = f"{source} → {destination}"
        rows = []
        for each in study.progress(asked, name):
            pair = (study.model, each.inputs, source, destination)
            cut = attention_knockout(*pair, window=WINDOW)
            everywhere = attention_knockout(*pair, layers=[0], window=2 * n_layers)
            rows.append(torch.cat([cut.relative_effect, everywhere.relative_effect]))
        values = torch.stack(rows)
        means = study.bootstrap(values, [each.cluster for each in asked])
        layers = [*range(n_layers), "all"]
        lines = {"model": name, "site": "relative change", "role": "", "layer": layers}
        tables.append(pd.DataFrame({**lines, **means}))
        index = pd.MultiIndex.from_product(
            [range(len(asked)), map(str, layers)], names=["question", "layer"]
        )
        raw = pd.DataFrame({"relative_effect": values.flatten().numpy()}, index=index)
        raws.append(raw.reset_index().assign(cut=name))
    table = pd.concat(tables)
    figure = plot_layer_profile(
        table[table["layer"] != "all"],
        y_title="change of P(answer)",
        title="Attention that is cut",
        subtitle=study.describe(len(asked), f"{WINDOW} layers cut; −1: nothing is left of it"),
    )
    return Figure("knockout", figure, {"table": table}, pd.concat(raws), counts, {"window": WINDOW})
