"""The sweep `trace` with other metrics: rows against whole runs and formulas; and summaries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_inputs, small_model
from sweep_cases import in_order, made_model, made_questions, swept
from test_trace_effects import words_swapped
from torch import Tensor

from mmlens import aggregate_traces, causal_trace, hook_name, role_positions, swap_span
from mmlens.sweeps import TraceTask


@pytest.fixture
def model(seed: int) -> Any:
    return made_model(seed)


@pytest.fixture
def questions(tmp_path: Path) -> Any:
    return made_questions(tmp_path)[:3]


def by_formula(metric: str, clean: Tensor, run: Tensor, answer: int, other: int) -> float:
    """A metric of the next token's logits [d_vocab] of a run."""
    log_probs, of_clean = run.double().log_softmax(-1), clean.double().log_softmax(-1)
    return {
        "loss": lambda: -float(log_probs[answer]),
        "logit_diff": lambda: float(run[answer] - run[other]),
        "kl": lambda: float((of_clean.exp() * (of_clean - log_probs)).sum()),
    }[metric]()


@pytest.mark.parametrize("metric", ["loss", "logit_diff", "kl"])
def test_rows_are_the_metric_of_whole_runs(
    model: Any, questions: Any, tmp_path: Path, metric: str
) -> None:
    found = swept(model, questions, tmp_path / "out", metric=metric)
    failed = set(found.failures()["question"].tolist())
    rows = in_order(found) if len(failed) < len(questions) else None
    for number, question in enumerate(questions):
        inputs = model.prepare(
            question.prompt(), question.open_images(), spans=question.spans(), template="auto"
        )
        corrupted = swap_span(model, inputs, "constraint", "Paris")
        logits, cache = model.run_with_cache(inputs)
        clean, changed = logits[0, -1], model(corrupted)[0, -1]
        answer, other = int(clean.argmax()), int(changed.argmax())
        if metric == "logit_diff" and answer == other:
            assert number in failed
            continue
        assert number not in failed and rows is not None
        of_question = rows[rows["question"] == number]
        assert set(of_question["metric"]) == {metric}
        if metric == "logit_diff":
            assert set(of_question["contrast"]) == {model.to_str_tokens([other])[0]}
        else:
            assert of_question["contrast"].isna().all()
        roles = role_positions(inputs)
        for row in of_question.itertuples():
            assert row.clean == pytest.approx(
                by_formula(metric, clean, clean, answer, other), abs=1e-5
            )
            assert row.corrupted == pytest.approx(
                by_formula(metric, clean, changed, answer, other), abs=1e-5
            )
            if row.role not in roles:
                continue
            name, at = hook_name(row.site, row.layer), roles[row.role]

            def put_back(x: Tensor, hook: Any, at: Any = at, kept: Any = cache[name]) -> Tensor:
                return x.index_copy(1, at, kept[:, at])

            run = model.run_with_hooks(corrupted, fwd_hooks=[(name, put_back)])[0, -1]
            expected = by_formula(metric, clean, run, answer, other)
            assert row.restored == pytest.approx(expected, abs=1e-5)


def test_a_contrast_of_ones_own(model: Any, questions: Any, tmp_path: Path) -> None:
    found = swept(model, questions, tmp_path / "out", metric="logit_diff", contrast="Paris")
    assert not found.n_failed
    assert set(found.results()["contrast"]) == {"Paris"}


def test_runs_that_say_the_same_are_failures(model: Any, questions: Any, tmp_path: Path) -> None:
    """Where the unembedding knows one word."""
    torch.nn.init.zeros_(model.unembed.W_U)
    model.unembed.b_U.data[7] = 1.0
    found = swept(model, questions, tmp_path / "out", metric="logit_diff")
    assert found.n_failed == len(questions)
    assert set(found.failures()["reason"]) == {"cannot be asked"}
    assert "both runs say" in found.failures()["message"][0]


@pytest.mark.parametrize("metric", ["loss", "kl", "probability", "logit_diff"])
def test_summaries_know_which_way_is_better(
    model: Any, questions: Any, tmp_path: Path, metric: str
) -> None:
    options = {"contrast": "Paris"} if metric == "logit_diff" else {}
    found = swept(model, questions, tmp_path / "out", metric=metric, windows=(1, 2), **options)
    falls = metric in ("loss", "kl")
    summary = found.summarize(samples=20)
    cells = summary.table.groupby(["site", "role", "window"], observed=True)["mean"]
    best = cells.min() if falls else cells.max()
    assert sorted(summary.peaks["mean"]) == sorted(best)
    firsts = in_order(found).drop_duplicates("question")
    gaps = (firsts["corrupted"] - firsts["clean"]) * (1 if falls else -1)
    least = float(np.median(gaps))
    assert found.summarize(minimum_gap=least, samples=20).counts["used"] == (gaps >= least).sum()
    title = summary.figures["indirect_effect"].layout.yaxis.title.text
    words = {"loss": "(loss)", "kl": "(KL divergence)", "logit_diff": "(logit difference)"}
    assert title == " ".join(["indirect effect", words.get(metric, "")]).strip()


def test_the_gap_of_traces_that_fall(seed: int) -> None:
    model = small_model(seed)
    clean = small_inputs(model, seed)
    trace = causal_trace(
        model, clean, words_swapped(clean, seed), sites=("mlp_out",), layers=[0], metric="loss"
    )
    traces = [replace(trace, clean=0.6, corrupted=0.6 + gap) for gap in (0.5, 0.01, -0.2)]
    roles = [{"last": torch.tensor([clean.n_pos - 1])}] * 3
    found = aggregate_traces(traces, roles, clusters="abc", minimum_gap=0.1)
    assert found.clusters == ("a",)


def test_what_is_given_wrongly(model: Any, questions: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric 'nll'; there are probability"):
        TraceTask(metric="nll")
    with pytest.raises(ValueError, match="a contrast is for the metric logit_diff"):
        TraceTask(metric="loss", contrast="Rome")
