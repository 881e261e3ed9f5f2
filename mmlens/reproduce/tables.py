"""Tables that several figures share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import pandas as pd

from mmlens.analyses.aggregation import AggregatedTraces
from mmlens.analyses.result import long_table

LABELS = {"seen": "sees the image", "named": "told the name, without image"}


def peaks(table: pd.DataFrame) -> pd.DataFrame:
    """The layer with the largest mean of every line; its interval knows nothing of the choice."""
    rows = table.dropna(subset="mean").reset_index(drop=True)
    return rows.loc[rows.groupby(["model", "site", "role"], sort=False)["mean"].idxmax()]


def raw_effects(profiles: Mapping[str, AggregatedTraces]) -> pd.DataFrame:
    """Every question's effects: model, question, cluster, site, role, layer, value."""
    tables = []
    for name, profile in profiles.items():
        axes = {
            "question": range(len(profile.values)),
            "site": profile.sites,
            "role": profile.roles,
            "layer": profile.layers,
        }
        values = long_table(axes, {profile.effect: profile.values})
        values = values.assign(model=name, window=profile.window)
        values["cluster"] = [str(profile.clusters[question]) for question in values["question"]]
        tables.append(values)
    return pd.concat(tables, ignore_index=True)


def early_tests(profiles: Mapping[str, AggregatedTraces]) -> pd.DataFrame:
    """Is the first eighth of the layers (4 of 32) more causal than the second, and than the rest?

    The same for the first eighth without layer 0. Means over the layers, at every role and site;
    permutation tests of "the first is larger", one-sided, not corrected for their number.
    """
    rows = []
    for name, profile in profiles.items():
        n_layers = len(profile.layers)
        eighth = max(1, round(n_layers / 8))
        first, second = profile.layers[:eighth], profile.layers[eighth : 2 * eighth]
        pairs = [(first, second), (first, profile.layers[eighth:])]
        # Layer 0 reads the word itself: what do the others do?
        pairs += [(first[1:], second)] * (eighth > 1)
        for site in profile.sites:
            for role in profile.roles:
                for one, other in pairs:
                    found = profile.compare(site, role, one, other)
                    where = {"model": name, "site": site, "role": role, "layers": span(one)}
                    rows.append({**where, "against": span(other), **asdict(found)})
    return pd.DataFrame(rows)


def span(layers: tuple[int, ...]) -> str:
    """First and last."""
    return f"{layers[0]}-{layers[-1]}"
