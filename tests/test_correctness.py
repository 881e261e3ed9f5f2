"""AUROC, and contributions against confidence as predictors of right answers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mmlens.analyses.correctness import auroc, grouped_folds, held_out_scores, predict_correctness
from mmlens.utils.statistics import bootstrap_weights, cluster_of


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
        ([1.0, float("inf")], [True, False], "without NaN and infinities"),
    ):
        with pytest.raises(ValueError, match=why):
            auroc(scores, right)


@pytest.mark.parametrize("unknown", [float("nan"), float("inf")])
def test_an_answer_that_is_not_known_is_refused(seed, unknown):
    right = [1.0, 0.0, *some_right(6)]
    at = random.randrange(2, 8)
    right[at] = unknown
    scores = np.random.default_rng(seed).normal(size=8)
    with pytest.raises(ValueError, match=rf"right\[{at}\] is {unknown}.*1 of 8 are not finite"):
        auroc(scores, right)
    with pytest.raises(ValueError, match="neither right nor wrong"):
        predict_correctness(np.stack([scores, scores], axis=1), scores, right, width=1, folds=2)


@pytest.mark.parametrize("partly", [0.3, -1, 2.0])
def test_an_answer_that_is_partly_right_is_refused(seed, partly):
    """Whatever was not 0 counted as right, a VQA accuracy of 0.3 and a wrong answer's -1 too."""
    right = [1.0, 0.0, *map(float, some_right(6))]
    at = random.randrange(2, 8)
    right[at] = partly
    scores = np.random.default_rng(seed).normal(size=8)
    with pytest.raises(ValueError, match=rf"right\[{at}\] is {partly}.*1 of 8 are not 0 or 1"):
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
    ends = (found.contribution.value, found.contribution.low, found.contribution.high)
    assert ends == pytest.approx((1, 1, 1))
    assert found.confidence.value == pytest.approx(by_pairs(sure, right))
    assert found.difference.value == pytest.approx(1 - found.confidence.value)
    assert found.confidence.low <= found.confidence.high
    assert (found.n_questions, found.n_right) == (60, 40)
    table = found.to_dataframe()
    assert table.predictor.tolist() == ["contribution", "confidence", "difference"]
    assert table.auroc[0] == pytest.approx(1)


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
    fold = grouped_folds(right, np.arange(len(right)), 4, seed)
    scores, chosen = held_out_scores(layers, right, fold)
    for held_out in range(4):
        inside = fold == held_out
        other = np.where(inside, ~right, right)
        changed, chosen_again = held_out_scores(layers, other, fold)
        assert np.array_equal(scores[inside], changed[inside])
        assert chosen[held_out] == chosen_again[held_out]


def test_folds_share_right_and_wrong_answers_out(seed):
    right = np.array(some_right(47))
    fold = grouped_folds(right, np.arange(47), 5, seed)
    for kind in (right, ~right):
        sizes = np.bincount(fold[kind], minlength=5)
        assert sizes.max() - sizes.min() <= 1


def subjects(n_questions, n_clusters):
    """A label for each question; each is there."""
    labels = [f"country {i % n_clusters}" for i in range(n_questions)]
    random.shuffle(labels)
    return labels


def test_no_cluster_is_in_two_folds(seed):
    right = np.array([i % 2 > 0 for i in range(60)])
    cluster = cluster_of(60, subjects(60, 17))
    fold = grouped_folds(right, cluster, 5, seed)
    assert set(fold) == set(range(5))
    for one in range(17):
        assert len(set(fold[cluster == one])) == 1


def test_questions_of_one_cluster_are_not_independent(seed):
    """What is the same for all 6 questions of 40 clusters has 40 values, not 240.

    Its interval is wider by about the root of 6, which is 2.4; by 1.5 in any case.
    """
    n_clusters, each = 40, 6
    cluster = np.repeat(np.arange(n_clusters), each)
    right = np.repeat(np.random.default_rng(seed).permutation(n_clusters) % 2 > 0, each)
    sure = np.repeat(np.random.default_rng(seed + 1).normal(size=n_clusters), each)
    together, apart = (interval_of(sure, right, x) for x in (cluster, np.arange(len(right))))
    assert together.value == apart.value
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def interval_of(scores, right, cluster, samples=150):
    """Of the AUROC of scores, by predict_correctness: they are its confidence."""
    layers = np.random.default_rng(0).normal(size=(len(right), 2))
    return predict_correctness(
        layers, scores, right, list(cluster), width=1, samples=samples
    ).confidence


def test_intervals_are_those_of_resampled_clusters(seed):
    """Against resamples that are drawn and put together by hand."""
    n, n_clusters, samples = 50, 12, 500
    labels = subjects(n, n_clusters)
    right = np.array(some_right(n))
    sure = np.round(np.random.default_rng(seed).normal(size=n), 1)  # with ties
    found = interval_of(sure, right, labels, samples)
    members = {label: [i for i in range(n) if labels[i] == label] for label in set(labels)}
    by_hand = []
    for _ in range(samples):
        drawn = [
            i for label in random.choices(sorted(members), k=n_clusters) for i in members[label]
        ]
        if len(set(right[drawn])) == 2:
            by_hand.append(by_pairs(sure[drawn], right[drawn]))
    assert found.value == pytest.approx(by_pairs(sure, right), abs=1e-12)
    # The 2.5 % quantile of 500 resamples is known to 0.12 of their deviation: the root of
    # 0.025 x 0.975 / 500 over the normal density there, 0.058. Two such differ by 0.17; 6 times.
    spread = 6 * 0.17 * np.std(by_hand)
    assert found.low == pytest.approx(np.quantile(by_hand, 0.025), abs=spread)
    assert found.high == pytest.approx(np.quantile(by_hand, 0.975), abs=spread)


def test_a_statistic_that_some_resamples_lack(seed):
    """It is left out of their interval; without any value there is none."""
    cluster = np.array([0, 0, 1, 2])

    def statistic(weights):
        return np.array([weights.sum(), weights[3] or np.nan, np.nan])

    value, low, high = bootstrap_weights(statistic, cluster, samples=300, seed=seed)
    assert value[:2].tolist() == [4, 1] and np.isnan(value[2])
    assert 3 <= low[0] < high[0] <= 6  # three clusters of 2, 1 and 1
    assert low[1] == 1 <= high[1] <= 3
    assert np.isnan([low[2], high[2]]).all()


def test_labels_of_clusters_are_compared_by_their_values(seed):
    """Two elements of a tensor are two objects, whatever they hold; NaN is no label."""
    subject = np.random.default_rng(seed).integers(0, 5, 40)
    names = [f"country {number}" for number in subject.tolist()]
    for labels in (subject, subject.tolist(), names, torch.tensor(subject), subject.astype(float)):
        found = cluster_of(40, labels)
        assert len(set(zip(found.tolist(), subject.tolist(), strict=True))) == len(set(names))
        assert found.max() + 1 == len(set(names))
    missing = np.where(subject == subject[7], np.nan, subject)
    for labels in (missing, missing.tolist(), torch.tensor(missing)):
        with pytest.raises(ValueError, match="NaN"):
            cluster_of(40, labels)


def test_what_cannot_be_predicted():
    layers, right = questions(n=12)
    sure = np.arange(12.0)
    for options, why in (
        ({"width": 0}, "width=0; there are 6 layers"),
        ({"width": 7}, "width=7"),
        ({"folds": 1}, "folds=1; where 4 clusters have answers of a kind it is 2 ... 4"),
        ({"clusters": [i // 6 for i in range(12)], "folds": 3}, "where 2 clusters have answers"),
        ({"clusters": list(range(11))}, "11 clusters for 12 questions"),
        ({"folds": 5}, "folds=5"),
    ):
        with pytest.raises(ValueError, match=why):
            predict_correctness(layers, sure, right, **options)
    with pytest.raises(ValueError, match="for 12 questions"):
        predict_correctness(layers[:-1], sure, right)
