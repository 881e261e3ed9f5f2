"""Tables and figures of a benchmark of editing: methods, layers, sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmlens.editing.bench_settings import Variant
from mmlens.editing.edit_evaluation import EditEvaluation
from mmlens.plots.editing import plot_edit_layers, plot_edits, plot_sequences
from mmlens.reproduce.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

    from mmlens.editing.bench import EditBench

Found = Mapping[Variant, EditEvaluation]


def figures(bench: EditBench, found: Found) -> list[Figure]:
    """`sequences`; or `methods`, and `layers` for those methods that were tried in several."""
    if bench.settings.sequential:
        return [made(bench, "sequences", found)]
    tried = Counter(variant.named for variant in found if isinstance(variant.layer, int))
    swept = {variant: each for variant, each in found.items() if is_swept(variant, tried)}
    others = {variant: each for variant, each in found.items() if variant not in swept}
    groups = (("methods", others), ("layers", swept))
    return [made(bench, name, group) for name, group in groups if group]


def is_swept(variant: Variant, tried: Mapping[str, int]) -> bool:
    """Whether a method was tried in several single layers, of which this is one."""
    return isinstance(variant.layer, int) and tried[variant.named] > 1


def made(bench: EditBench, name: str, found: Found) -> Figure:
    """One figure with its tables."""
    import pandas as pd

    chosen = bench.settings
    summaries = {
        variant: each.summary(samples=chosen.samples, level=chosen.level, seed=chosen.seed)
        for variant, each in found.items()
    }
    table = pd.concat([named(each, variant, name) for variant, each in summaries.items()])
    plots = {
        "methods": (plot_edits, "What edits do, by method"),
        "layers": (plot_edit_layers, "What edits do, by the layer that is edited"),
        "sequences": (plot_sequences, "What edits do when more of them follow"),
    }
    plot, title = plots[name]
    _, counts = bench.chosen
    described = f"{counts['used']} edits of {chosen.data}, {chosen.level:.0%} bootstrap interval"
    return Figure(
        name,
        plot(table, title=title, subtitle=described),
        {
            "table": table,
            "costs": pd.concat([named(each.costs(), v, name) for v, each in found.items()]),
        },
        pd.concat([named(each.to_dataframe(), v, name) for v, each in found.items()]),
        counts,
        {"failed": {v.label: each.metadata["failed"] for v, each in found.items()}},
    )


def named(table: pd.DataFrame, variant: Variant, figure: str) -> pd.DataFrame:
    """With the method, and the layer: a number where layers are an axis."""
    if figure == "layers":
        return table.assign(method=variant.named, layer=variant.layer)
    return table.assign(method=variant.label)
