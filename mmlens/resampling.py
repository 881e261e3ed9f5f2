"""How sure a mean over questions is: a bootstrap, and a permutation test, over clusters.

Questions about one picture are not independent. With `clusters`, whole clusters are drawn (or have
their signs flipped) instead of questions.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

__all__ = ["bootstrap_mean", "sign_flip_test"]

CELLS_AT_ONCE = 2**22
"""Of the resampled values [cell, resample, cluster]: 32 MiB."""


def bootstrap_mean(
    values: Float[Tensor, "question ..."],
    clusters: Sequence[Hashable] | None = None,
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Means over questions, and the percentile intervals of a bootstrap over clusters.

    Args:
        values: NaN where a question has no value; it counts in the other cells.
        clusters: one label per question; by default every question is its own.
        samples: resamples.
        level: of the intervals.
        seed: the same seed and clusters draw the same resamples.

    Returns:
        Mean, low and high in float64. The interval is NaN where there is one cluster only, or where
        values are so few that a resample has none.

    Raises:
        ValueError: no questions, or another number of clusters.

    Example:
        >>> mean, low, high = bootstrap_mean(effects, [question.subject for question in questions])
    """
    sums, counts = per_cluster(values, clusters)
    mean = sums.sum(axis=0) / counts.sum(axis=0)
    low = high = np.full_like(mean, np.nan)
    if len(sums) > 1 and mean.size:
        with warnings.catch_warnings():
            # A cell without values in some resample: its interval is NaN, as documented.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                (sums.T, counts.T),
                ratio_of_sums,
                n_resamples=samples,
                batch=max(1, CELLS_AT_ONCE // sums.size),
                paired=True,
                vectorized=True,
                axis=-1,
                confidence_level=level,
                method="percentile",
                rng=np.random.default_rng(seed),
            ).confidence_interval
        low, high = found.low, found.high
    shape = values.shape[1:]
    return tuple(torch.from_numpy(np.array(x)).reshape(shape) for x in (mean, low, high))  # type: ignore[return-value]


def sign_flip_test(
    differences: Float[Tensor, " question"],
    clusters: Sequence[Hashable] | None = None,
    *,
    samples: int = 9999,
    seed: int = 0,
) -> float:
    """The p value of "the mean difference is positive": a paired permutation test.

    If the two things compared were exchangeable, each cluster's differences could as well have had
    the other sign. All 2^clusters sign changes are tried where they are at most `samples`, else
    random ones.

    Raises:
        ValueError: fewer than two clusters, or another number of clusters than of differences.
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
    """The mean over all questions of the clusters."""
    with np.errstate(invalid="ignore"):
        return sums.sum(axis=axis) / counts.sum(axis=axis)


def per_cluster(
    values: Float[Tensor, "question ..."], clusters: Sequence[Hashable] | None
) -> tuple[Float[np.ndarray, "cluster cells"], Float[np.ndarray, "cluster cells"]]:
    """Sums and numbers of the values that are there, in the order of the clusters' first question.

    Raises:
        ValueError: no questions, or another number of clusters.
    """
    n_questions = len(values)
    labels = range(n_questions) if clusters is None else list(clusters)
    if not n_questions or len(labels) != n_questions:
        raise ValueError(f"{len(labels)} clusters for {n_questions} questions; there must be some")
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    index = [order[label] for label in labels]
    flat = values.double().cpu().reshape(n_questions, -1).numpy()
    there = ~np.isnan(flat)
    sums, counts = np.zeros((2, len(order), flat.shape[1]))
    np.add.at(sums, index, np.where(there, flat, 0.0))
    np.add.at(counts, index, there)
    return sums, counts
