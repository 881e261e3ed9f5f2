"""The direction of a steering vector by its formula, in float64, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.decomposition import PCA


def direction(differences: np.ndarray[Any, Any], method: str) -> np.ndarray[Any, Any]:
    """What differences [pair, d] have in common."""
    if method == "mean_difference":
        return differences.mean(axis=0)
    halves = np.concatenate([differences / 2, -differences / 2])  # centred pair by pair
    component = PCA(n_components=1, svd_solver="full").fit(halves).components_[0]
    return component * (differences @ component).mean()
