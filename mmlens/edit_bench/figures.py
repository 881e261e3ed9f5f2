"""Tables and figures of a benchmark of editing: methods, layers, sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pandas as pd

from mmlens.edit_bench.settings import BenchSettings, Variant
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.plots.editing import plot_edit_layers, plot_edits, plot_sequences
from mmlens.plots.figure_folder import FigureWithTables

Found = Mapping[Variant, EditEvaluation]


def figures(
    chosen: BenchSettings, counts: Mapping[str, int], found: Found
) -> list[FigureWithTables]:
    """`sequences`; or `methods`, and `layers` for those methods that were tried in several.

    Args:
        counts: of the cases: considered, left out (and why), used.
    """
    if chosen.sequential:
        return [made(chosen, counts, "sequences", found)]
    tried = Counter(variant.named for variant in found if isinstance(variant.layer, int))
    others, swept = dict(found), {}
    for variant in found:
        if isinstance(variant.layer, int) and tried[variant.named] > 1:
            swept[variant] = others.pop(variant)
    groups = (("methods", others), ("layers", swept))
    return [made(chosen, counts, name, group) for name, group in groups if group]


def made(
    chosen: BenchSettings, counts: Mapping[str, int], name: str, found: Found
) -> FigureWithTables:
    """One figure with its tables."""
    summaries = {
        variant: each.summary(samples=chosen.samples, level=chosen.level, seed=chosen.seed)
        for variant, each in found.items()
    }
    table = pd.concat([labelled(each, variant, name) for variant, each in summaries.items()])
    plots = {
        "methods": (plot_edits, "What edits do, by method"),
        "layers": (plot_edit_layers, "What edits do, by the layer that is edited"),
        "sequences": (plot_sequences, "What edits do when more of them follow"),
    }
    plot, title = plots[name]
    described = f"{counts['used']} edits of {chosen.data}, {chosen.level:.0%} bootstrap interval"
    return FigureWithTables(
        name,
        plot(table, title=title, subtitle=described),
        {
            "table": table,
            "costs": pd.concat([labelled(each.costs(), v, name) for v, each in found.items()]),
        },
        pd.concat([labelled(each.to_dataframe(), v, name) for v, each in found.items()]),
        dict(counts),
        {"failed": {v.label: each.metadata["failed"] for v, each in found.items()}},
    )


def labelled(table: pd.DataFrame, variant: Variant, figure: str) -> pd.DataFrame:
    """With the method, and the layer: a number where layers are an axis."""
    if figure == "layers":
        return table.assign(method=variant.named, layer=variant.layer)
    return table.assign(method=variant.label)
