"""Bootstraps and a permutation test over clusters of questions.

Questions about one image are not independent. With `clusters`, whole clusters are drawn (or have
their signs flipped) instead of questions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

CELLS_AT_ONCE = 2**22
"""Of the resampled values [cell, resample, cluster]: 32 MiB."""

Clusters = Sequence[Hashable] | np.ndarray | Tensor
"""One label for each question; NaN is none."""


class MeanInterval(NamedTuple):
    """Means (or ratios), and the ends of their intervals, in float64; see `bootstrap_mean`."""

    mean: Float[Tensor, "*cell"]
    low: Float[Tensor, "*cell"]
    high: Float[Tensor, "*cell"]


def check_known(right: Any) -> None:
    """Refuse answers of which it is not known whether they are right: NaN would count as right.

    So would a score between 0 and 1, and a -1 that stands for a wrong answer.

    Raises:
        ValueError: a value that is not finite, or not 0 or 1.
    """
    values = np.asarray(right, dtype=np.float64)
    for unknown, what, advice in (
        (~np.isfinite(values), "finite", "leave these questions out"),
        ((values != 0) & (values != 1), "0 or 1", "say which count as right, such as score >= 0.5"),
    ):
        found = np.flatnonzero(unknown)
        if len(found):
            raise ValueError(
                f"right[{found[0]}] is {right[int(found[0])]}, which is neither right nor wrong "
                f"({len(found)} of {values.size} are not {what}): {advice}"
            )


def bootstrap_mean(
    values: Float[Tensor, "question ..."],
    clusters: Clusters | None = None,
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> MeanInterval:
    """Return means over questions, and the percentile intervals of a bootstrap over clusters.

    A question whose value is NaN counts in the other cells. The interval is NaN where there is one
    cluster only, or where values are so few that a resample has none.

    Example:
        >>> mean, low, high = bootstrap_mean(effects, [question.subject for question in questions])
    """
    sums, counts = per_cluster(values, clusters)
    mean = sums.sum(axis=0) / counts.sum(axis=0)
    low = high = np.full_like(mean, np.nan)
    if len(sums) > 1 and mean.size:
        batch = max(1, CELLS_AT_ONCE // sums.size)
        data, options = (sums.T, counts.T), {"paired": True, "batch": batch}
        found = bootstrap(data, ratio_of_sums, samples, level, seed, **options)
        low, high = found.confidence_interval
    shape = values.shape[1:]
    return MeanInterval(*(torch.from_numpy(np.array(x)).reshape(shape) for x in (mean, low, high)))


def bootstrap_ratio(
    above: Float[Tensor, "question cell"],
    below: Float[Tensor, "question cell"],
    clusters: Clusters | None = None,
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> MeanInterval:
    """Return ratios of sums over questions, and percentile intervals of a bootstrap over clusters.

    A precision is such a ratio: right answers yes, of all answers yes. It is NaN where nothing is
    below. Resamples in which nothing is do not count. The interval is NaN where there is one
    cluster only.

    Example:
        >>> precision, low, high = bootstrap_ratio(says * wanted, says, images)
    """
    sums, totals = (per_cluster(each, clusters)[0] for each in (above, below))
    ratio = ratio_of_sums(sums, totals, axis=0)
    low, high = np.full((2, len(ratio)), np.nan)
    there = ~np.isnan(ratio)
    if len(sums) > 1 and there.any():
        data = (sums[:, there].T, totals[:, there].T)
        batch = max(1, CELLS_AT_ONCE // data[0].size)
        options: dict[str, Any] = {"paired": True, "batch": batch}
        found = bootstrap(data, ratio_of_sums, samples, level, seed, **options)
        ends = [(1 - level) / 2, (1 + level) / 2]
        low[there], high[there] = np.nanquantile(found.bootstrap_distribution, ends, axis=-1)
    return MeanInterval(*map(torch.from_numpy, (ratio, low, high)))


def known_values(
    values: Float[Tensor, " question"], clusters: Clusters
) -> tuple[Float[Tensor, " known"], list[Hashable]]:
    """Return the values that are not NaN, and their clusters: a resample then has some always."""
    known = (~values.isnan()).nonzero().flatten().tolist()
    return values[known], [clusters[question] for question in known]


def bootstrap_weights(
    statistic: Callable[[Float[np.ndarray, " question"]], Float[np.ndarray, " value"]],
    cluster: Int[np.ndarray, " question"],
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " value"], Float[np.ndarray, " value"], Float[np.ndarray, " value"]]:
    """Return statistics, and the percentile intervals of a bootstrap over clusters.

    Args:
        statistic: takes a weight for each question (how often a resample has it), and gives some
            numbers; NaN where the resample has none, and then it does not count.
        cluster: the number of each question's cluster, as `cluster_of` gives it.
    """
    n_clusters = int(cluster.max()) + 1

    def of_resamples(drawn: np.ndarray, axis: int) -> np.ndarray:
        rows = np.atleast_2d(drawn)  # the clusters as they are, or one resample in each row
        counts = [np.bincount(row, minlength=n_clusters)[cluster].astype(float) for row in rows]
        found = np.stack([statistic(weights) for weights in counts], axis=-1)
        return found[:, 0] if drawn.ndim == 1 else found

    data = (np.arange(n_clusters),)
    drawn = bootstrap(data, of_resamples, samples, level, seed).bootstrap_distribution
    there = ~np.isnan(drawn).all(axis=-1)
    low, high = np.full((2, len(drawn)), np.nan)
    ends = [(1 - level) / 2, (1 + level) / 2]
    low[there], high[there] = np.nanquantile(drawn[there], ends, axis=-1)
    return statistic(np.ones(len(cluster))), low, high


def bootstrap(
    data: Any, statistic: Callable, samples: int, level: float, seed: int, **options: Any
) -> Any:
    """Return scipy's percentile bootstrap; resamples may lack values, as their users document."""
    if not 0 < level < 1:
        raise ValueError(f"level={level}; that of an interval lies between 0 and 1, such as 0.95")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        return stats.bootstrap(
            data,
            statistic,
            n_resamples=samples,
            vectorized=True,
            axis=-1,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
            **options,
        )


def sign_flip_test(
    differences: Float[Tensor, " question"],
    clusters: Clusters | None = None,
    *,
    samples: int = 9999,
    seed: int = 0,
) -> float:
    """Return the p value of "the mean difference is positive": a paired permutation test.

    If the two things compared were exchangeable, each cluster's differences could as well have had
    the other sign. All 2^clusters sign changes are tried where they are at most `samples`, else
    random ones.
    """
    sums, _ = per_cluster(differences[:, None], clusters)
    if len(sums) < 2:
        raise ValueError(f"a permutation test of {len(sums)} cluster(s); it needs at least 2")
    found = stats.permutation_test(
        (sums[:, 0],),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=samples,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean over all questions of the clusters, or another ratio."""
    with np.errstate(invalid="ignore"):
        return sums.sum(axis=axis) / counts.sum(axis=axis)


def per_cluster(
    values: Float[Tensor, "question ..."], clusters: Clusters | None
) -> tuple[Float[np.ndarray, "cluster cells"], Float[np.ndarray, "cluster cells"]]:
    """Return sums and counts of the values that exist, by the clusters' first questions."""
    n_questions = len(values)
    index = cluster_of(n_questions, clusters)
    flat = values.double().cpu().reshape(n_questions, -1).numpy()
    there = ~np.isnan(flat)
    sums, counts = np.zeros((2, int(index.max()) + 1, flat.shape[1]))
    np.add.at(sums, index, np.where(there, flat, 0.0))
    np.add.at(counts, index, there)
    return sums, counts


def cluster_of(n_questions: int, clusters: Clusters | None) -> Int[np.ndarray, " question"]:
    """Return the number of each question's cluster, in the order of their first questions.

    Args:
        clusters: one label per question; by default every question is its own cluster. Labels of
            a tensor are its numbers.

    Raises:
        ValueError: no questions, another number of labels, or NaN among them, which is equal to no
            label.
    """
    given = clusters.tolist() if isinstance(clusters, Tensor) else clusters
    labels = list(range(n_questions) if given is None else given)
    if not n_questions or len(labels) != n_questions:
        raise ValueError(f"{len(labels)} clusters for {n_questions} questions; there must be some")
    without = [index for index, label in enumerate(labels) if label != label]
    if without:
        raise ValueError(
            f"the clusters of questions {without[:5]} are NaN, and of {len(without)} questions in "
            "all: give each its label, or leave them out"
        )
    order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return np.array([order[label] for label in labels])
