"""Do attention contributions tell right answers from wrong ones?

Basu et al. 2024 average the contribution of the constraint to the last token over the layers where
right answers have more of it, and compare its AUROC with that of the model's confidence. Layers
chosen by looking at the answers flatter; here they are chosen in other folds than they are scored
in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

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
    """The probability that a right answer scores higher than a wrong one; ties count half.

    Exact, by ranks (the Mann-Whitney statistic).

    Args:
        scores: one per question, the higher the more likely right.
        right: whether it was.

    Raises:
        ValueError: lengths differ, NaN, or answers all right or all wrong.

    Example:
        >>> auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
        0.75
    """
    score, is_right = _checked(scores, right)
    return _auroc(score, is_right)


def _auroc(score: Float[np.ndarray, " n"], is_right: Bool[np.ndarray, " n"]) -> float:
    wrong = np.sort(score[~is_right])
    below = np.searchsorted(wrong, score[is_right], side="left")
    not_above = np.searchsorted(wrong, score[is_right], side="right")
    return float((below + not_above).mean() / (2 * len(wrong)))


def _checked(scores: Numbers, right: Numbers) -> tuple[np.ndarray, np.ndarray]:
    score = np.asarray(scores, dtype=np.float64)
    is_right = np.asarray(right).astype(bool)
    if score.ndim != 1 or score.shape != is_right.shape or np.isnan(score).any():
        raise ValueError(
            f"scores {score.shape} and right {is_right.shape} must be one number per question, "
            "without NaN"
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
    seed: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per predictor: AUROC, its interval, questions, right ones."""
        import pandas as pd

        rows = {
            "contribution": self.contribution,
            "confidence": self.confidence,
            "difference": self.difference,
        }
        return pd.DataFrame(
            [
                {"predictor": name, "auroc": each.value, "low": each.low, "high": each.high}
                | {"n_questions": self.n_questions, "n_right": self.n_right}
                for name, each in rows.items()
            ]
        )


def predict_correctness(
    contributions: Float[np.ndarray, "question layer"] | Float[Tensor, "question layer"],
    confidence: Numbers,
    right: Numbers,
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
    the other folds' mean and deviation, and pooled. Folds hold right and wrong answers in equal
    shares. Intervals are percentiles of a bootstrap over questions, right and wrong ones apart.

    Args:
        contributions: for instance `attention_contribution(model, inputs, "constraint", "last")`
            `.values.mean(dim=(1, 2))` of each question.
        confidence: P(answer) of each.
        right: whether the answer was right.
        width: layers averaged; the paper takes two, 16 and 17.
        folds: at least 2.
        samples: of the bootstrap.
        level: of the intervals.
        seed: of folds and bootstrap.

    Raises:
        ValueError: lengths differ, NaN, fewer right or wrong answers than folds, a width that is
            not among 1 ... number of layers.
    """
    layers = np.asarray(contributions, dtype=np.float64)
    sure, is_right = _checked(confidence, right)
    if layers.shape[0] != len(is_right) or np.isnan(layers).any():
        raise ValueError(f"contributions {layers.shape} for {len(is_right)} questions, or NaN")
    if not 1 <= width <= layers.shape[1]:
        raise ValueError(f"width={width}; there are {layers.shape[1]} layers")
    fewest = int(min(is_right.sum(), (~is_right).sum()))
    if not 2 <= folds <= fewest:
        raise ValueError(f"folds={folds}; with {fewest} answers of a kind it is 2 ... {fewest}")
    rng = np.random.default_rng(seed)
    fold = stratified_folds(is_right, folds, rng)
    windows = np.stack(
        [layers[:, i : i + width].mean(axis=1) for i in range(layers.shape[1] - width + 1)], axis=1
    )
    scores, chosen = held_out_scores(windows, is_right, fold)
    drawn = [resampled(is_right, rng) for _ in range(samples)]
    pairs = np.array([[_auroc(s[i], is_right[i]) for s in (scores, sure)] for i in drawn])
    found = np.array([_auroc(s, is_right) for s in (scores, sure)])

    def interval(value: float, each: np.ndarray) -> Interval:
        low, high = np.quantile(each, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(value), float(low), float(high), level)

    return CorrectnessPrediction(
        contribution=interval(found[0], pairs[:, 0]),
        confidence=interval(found[1], pairs[:, 1]),
        difference=interval(found[0] - found[1], pairs[:, 0] - pairs[:, 1]),
        layers=tuple(tuple(range(first, first + width)) for first in chosen),
        n_questions=len(is_right),
        n_right=int(is_right.sum()),
        seed=seed,
    )


def stratified_folds(
    is_right: Bool[np.ndarray, " n"], folds: int, rng: np.random.Generator
) -> np.ndarray:
    """A fold for every question; right and wrong answers are dealt out apart."""
    fold = np.empty(len(is_right), dtype=int)
    for kind in (is_right, ~is_right):
        members = rng.permutation(np.flatnonzero(kind))
        fold[members] = np.arange(len(members)) % folds
    return fold


def held_out_scores(
    windows: Float[np.ndarray, "question window"],
    is_right: Bool[np.ndarray, " question"],
    fold: np.ndarray,
) -> tuple[Float[np.ndarray, " question"], list[int]]:
    """A score for every question by the window that is best in the other folds; which it was."""
    scores = np.empty(len(is_right))
    chosen = []
    for held_out in range(fold.max() + 1):
        test = fold == held_out
        train, right = windows[~test], is_right[~test]
        edges = np.array([_auroc(column, right) - 0.5 for column in train.T])
        best = int(np.abs(edges).argmax())
        spread = train[:, best].std() or 1.0
        standard = (windows[test, best] - train[:, best].mean()) / spread
        scores[test] = np.copysign(1.0, edges[best]) * standard
        chosen.append(best)
    return scores, chosen


def resampled(is_right: Bool[np.ndarray, " n"], rng: np.random.Generator) -> np.ndarray:
    """Questions drawn with replacement, as many right and wrong ones as there are."""
    return np.concatenate(
        [
            rng.choice(members, len(members))
            for members in map(np.flatnonzero, (is_right, ~is_right))
        ]
    )
