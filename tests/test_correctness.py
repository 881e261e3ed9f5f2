"""AUROC, and contributions against confidence as predictors of right answers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mmlens.attribution import auroc, predict_correctness
from mmlens.attribution.correctness import held_out_scores, stratified_folds


def by_pairs(scores, right):
    """The share of (right, wrong) pairs in which the right one scores higher; ties count half."""
    pairs = [
        (a, b)
        for a, r in zip(scores, right, strict=True)
        if r
        for b, s in zip(scores, right, strict=True)
        if not s
    ]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def some_right(n):
    right = [True, False] + [random.random() < 0.5 for _ in range(n - 2)]
    random.shuffle(right)
    return right


def test_auroc_counts_pairs(seed):
    for _ in range(50):
        n = random.randint(2, 40)
        right = some_right(n)
        scores = [random.choice([random.gauss(0, 1), 0.0, 1.0]) for _ in range(n)]
        assert auroc(scores, right) == pytest.approx(by_pairs(scores, right), abs=1e-12)
        assert auroc(np.exp(scores), right) == auroc(
            torch.tensor(scores, dtype=torch.float64), right
        )
        assert auroc(scores, right) + auroc([-x for x in scores], right) == pytest.approx(1)


def test_what_has_no_auroc():
    for scores, right, why in (
        ([1.0, 2.0], [True, True], "2 of 2 answers are right"),
        ([1.0, 2.0], [False, False], "0 of 2 answers are right"),
        ([1.0], [True, False], "one number per question"),
        ([1.0, float("nan")], [True, False], "without NaN"),
    ):
        with pytest.raises(ValueError, match=why):
            auroc(scores, right)


def questions(n=60, n_layers=6, planted=3):
    """Contributions in which one layer separates right from wrong."""
    right = np.array([i % 3 > 0 for i in range(n)])
    layers = np.random.default_rng(random.randrange(2**31)).normal(size=(n, n_layers))
    layers[:, planted] = layers[:, planted].clip(-3, 3) + 100.0 * right
    return layers, right


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_layer_is_found_in_every_fold(seed, sign):
    layers, right = questions()
    sure = np.linspace(0, 1, len(right))
    found = predict_correctness(sign * layers, sure, right, width=1, samples=50, seed=seed)
    assert found.layers == ((3,),) * 5
    assert (found.contribution.value, found.contribution.low, found.contribution.high) == (1, 1, 1)
    assert found.confidence.value == auroc(sure, right)
    assert found.difference.value == pytest.approx(1 - found.confidence.value)
    assert found.confidence.low <= found.confidence.high
    assert (found.n_questions, found.n_right) == (60, 40)
    table = found.to_dataframe()
    assert table.predictor.tolist() == ["contribution", "confidence", "difference"]
    assert table.auroc[0] == 1


def test_the_same_seed_gives_the_same_intervals(seed):
    layers, right = questions()
    noise = torch.randn(len(right))
    first, again = (
        predict_correctness(
            torch.tensor(layers[:, :3]), noise, right, samples=40, folds=3, seed=seed
        )
        for _ in range(2)
    )
    assert first == again
    assert all(len(window) == 2 for window in first.layers) and len(first.layers) == 3


def test_scores_of_a_fold_do_not_see_its_answers(seed):
    """What a fold's answers were changes nothing about how its questions are scored."""
    layers, right = questions(planted=random.randrange(6))
    layers = np.random.default_rng(seed).normal(size=layers.shape)
    fold = stratified_folds(right, 4, np.random.default_rng(seed))
    scores, chosen = held_out_scores(layers, right, fold)
    for held_out in range(4):
        inside = fold == held_out
        other = np.where(inside, ~right, right)
        changed, chosen_again = held_out_scores(layers, other, fold)
        assert np.array_equal(scores[inside], changed[inside])
        assert chosen[held_out] == chosen_again[held_out]


def test_folds_share_right_and_wrong_answers_out(seed):
    right = np.array(some_right(47))
    fold = stratified_folds(right, 5, np.random.default_rng(seed))
    for kind in (right, ~right):
        sizes = np.bincount(fold[kind], minlength=5)
        assert sizes.max() - sizes.min() <= 1


def test_what_cannot_be_predicted():
    layers, right = questions(n=12)
    sure = np.arange(12.0)
    for options, why in (
        ({"width": 0}, "width=0; there are 6 layers"),
        ({"width": 7}, "width=7"),
        ({"folds": 1}, "folds=1; with 4 answers of a kind it is 2 ... 4"),
        ({"folds": 5}, "folds=5"),
    ):
        with pytest.raises(ValueError, match=why):
            predict_correctness(layers, sure, right, **options)
    with pytest.raises(ValueError, match="for 12 questions"):
        predict_correctness(layers[:-1], sure, right)
