"""Do attention contributions tell right answers from wrong ones?

Basu et al. 2024 average the contribution of the constraint to the last token over the layers where
right answers have more of it, and compare its AUROC with that of the model's confidence. Layers
chosen by looking at the answers flatter; here they are chosen in other folds than they are scored
in. Questions about one subject are in one fold, and are resampled together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlens.utils.statistics import Clusters, bootstrap_weights, check_known, cluster_of

if TYPE_CHECKING:
    import pandas as pd

Numbers = np.ndarray | Tensor | Sequence[float] | Sequence[bool]


@dataclass(frozen=True)
class Interval:
    """A number and the interval that holds it with the given confidence."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


def auroc(scores: Numbers, right: Numbers) -> float:
    """Return the probability that a right answer scores higher than a wrong one; a tie is half."""
    from sklearn.metrics import roc_auc_score

    score, is_right = _checked(scores, right)
    return float(roc_auc_score(is_right, score))


def _checked(scores: Numbers, right: Numbers) -> tuple[np.ndarray, np.ndarray]:
    score = np.asarray(scores, dtype=np.float64)
    check_known(right)
    is_right = np.asarray(right).astype(bool)
    if score.ndim != 1 or score.shape != is_right.shape or not np.isfinite(score).all():
        raise ValueError(
            f"scores {score.shape} and right {is_right.shape} must be one number per question, "
            "without NaN and infinities"
        )
    if is_right.all() or not is_right.any():
        raise ValueError(
            f"{int(is_right.sum())} of {len(is_right)} answers are right: an AUROC needs both kinds"
        )
    return score, is_right


@dataclass(frozen=True)
class CorrectnessPrediction:
    """How well held-out contributions, and the model's confidence, predict right answers."""

    contribution: Interval
    """AUROC of contributions over layers chosen in the other folds."""
    confidence: Interval
    """AUROC of the model's confidence, on the same questions."""
    difference: Interval
    """contribution - confidence, resampled together."""
    layers: tuple[tuple[int, ...], ...]
    """The layers that each fold was scored with."""
    n_questions: int
    n_right: int
    n_clusters: int
    seed: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per predictor: AUROC, its interval, questions, right ones, clusters."""
        import pandas as pd

        names = ["contribution", "confidence", "difference"]
        found = [getattr(self, name) for name in names]
        return pd.DataFrame(
            {
                "predictor": names,
                "auroc": [each.value for each in found],
                "low": [each.low for each in found],
                "high": [each.high for each in found],
                "n_questions": self.n_questions,
                "n_right": self.n_right,
                "n_clusters": self.n_clusters,
            }
        )


def predict_correctness(
    contributions: Float[np.ndarray, "question layer"] | Float[Tensor, "question layer"],
    confidence: Numbers,
    right: Numbers,
    clusters: Clusters | None = None,
    *,
    width: int = 2,
    folds: int = 5,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> CorrectnessPrediction:
    """Score contributions over layers as a predictor of right answers, against confidence.

    For each fold, the `width` adjacent layers whose mean contribution separates right from wrong
    best in the other folds (in either direction) score its questions; scores are standardised with
    the other folds' mean and deviation, and pooled. A cluster is in one fold only, and folds hold
    right and wrong answers in shares as equal as that allows (scikit-learn's
    `StratifiedGroupKFold`). Intervals are percentiles of a bootstrap over clusters; resamples
    without right or without wrong answers are left out.

    Args:
        contributions: for instance `attention_contribution(model, inputs, "constraint", "last")`
            `.values.mean(dim=(1, 2))` of each question.
        confidence: P(answer) of each.
        right: whether the answer was right.
        clusters: one label per question, such as its subject: questions of one cluster are not
            independent. By default every question is its own.
        width: layers averaged; the paper takes two, 16 and 17.
        folds: at least 2.
        samples: of the bootstrap.
        level: of the intervals.
        seed: of folds and bootstrap.

    Raises:
        ValueError: lengths differ, a number is not finite, fewer clusters with right or with wrong
            answers than folds, or a width that is not among 1 ... number of layers.

    Example:
        >>> found = predict_correctness(received, confidence, right, [q.subject for q in questions])
        >>> found.difference.low, found.difference.high
    """
    layers = np.asarray(contributions, dtype=np.float64)
    sure, is_right = _checked(confidence, right)
    if layers.shape[0] != len(is_right) or not np.isfinite(layers).all():
        raise ValueError(f"contributions {layers.shape} for {len(is_right)} questions, or NaN")
    if not 1 <= width <= layers.shape[1]:
        raise ValueError(f"width={width}; there are {layers.shape[1]} layers")
    cluster = cluster_of(len(is_right), clusters)
    fold = grouped_folds(is_right, cluster, folds, seed)
    windows = np.stack(
        [layers[:, i : i + width].mean(axis=1) for i in range(layers.shape[1] - width + 1)], axis=1
    )
    scores, chosen = held_out_scores(windows, is_right, fold)

    def compared(weights: Float[np.ndarray, " question"]) -> Float[np.ndarray, " 3"]:
        one, other = (weighted_auroc(each, is_right, weights) for each in (scores, sure))
        return np.array([one, other, one - other])

    found = bootstrap_weights(compared, cluster, samples=samples, level=level, seed=seed)
    intervals = [
        Interval(float(value), float(low), float(high), level)
        for value, low, high in zip(*found, strict=True)
    ]
    return CorrectnessPrediction(
        contribution=intervals[0],
        confidence=intervals[1],
        difference=intervals[2],
        layers=tuple(tuple(range(first, first + width)) for first in chosen),
        n_questions=len(is_right),
        n_right=int(is_right.sum()),
        n_clusters=int(cluster.max()) + 1,
        seed=seed,
    )


def weighted_auroc(
    score: Float[np.ndarray, " n"],
    is_right: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
) -> float:
    """Return the AUROC in which each question counts so often; NaN where one kind has none."""
    from sklearn.metrics import roc_auc_score

    if not (weights[is_right].any() and weights[~is_right].any()):
        return np.nan
    return float(roc_auc_score(is_right, score, sample_weight=weights))


def grouped_folds(
    is_right: Bool[np.ndarray, " n"], cluster: Int[np.ndarray, " n"], folds: int, seed: int
) -> Int[np.ndarray, " n"]:
    """Return a fold for every question; clusters stay together."""
    from sklearn.model_selection import StratifiedGroupKFold

    fewest = min(len(np.unique(cluster[kind])) for kind in (is_right, ~is_right))
    if not 2 <= folds <= fewest:
        raise ValueError(
            f"folds={folds}; where {fewest} clusters have answers of a kind it is 2 ... {fewest}"
        )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    fold = np.empty(len(is_right), dtype=int)
    for number, (others, members) in enumerate(splitter.split(is_right, is_right, cluster)):
        fold[members] = number
        if len(np.unique(is_right[others])) < 2:
            raise ValueError(
                f"folds={folds}: all right or all wrong answers are in one fold; take fewer folds, "
                "or more clusters"
            )
    return fold


def held_out_scores(
    windows: Float[np.ndarray, "question window"],
    is_right: Bool[np.ndarray, " question"],
    fold: Int[np.ndarray, " question"],
) -> tuple[Float[np.ndarray, " question"], list[int]]:
    """Return each question's score by the window that is best in the other folds, and these."""
    from sklearn.preprocessing import StandardScaler

    scores = np.empty(len(is_right))
    chosen = []
    for held_out in range(fold.max() + 1):
        test = fold == held_out
        train, right = windows[~test], is_right[~test]
        edges = np.array([auroc(column, right) - 0.5 for column in train.T])
        best = int(np.abs(edges).argmax())
        scale = StandardScaler().fit(train[:, [best]])
        standard = scale.transform(windows[test][:, [best]])[:, 0]
        scores[test] = np.copysign(1.0, edges[best]) * standard
        chosen.append(best)
    return scores, chosen
