"""The sweep of edits: its rows are the means of `evaluate`, edit by edit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sweep_cases import assert_same, in_order, made_model, made_questions

from mmlens.data import edit_cases
from mmlens.editing import METHODS, Edit
from mmlens.editing.evaluation import evaluate
from mmlens.sweeps import OtherSettings, Sweep, sweep

WEIGHT = "blocks.{}.mlp.down.weight"


def pushed(model, request, *, layer, size=0.1):
    """An edit that is the same whenever it is made."""
    if layer == 1 and request.target == "no":
        raise ValueError("this one cannot be made")
    weight = model.get_parameter(WEIGHT.format(layer))
    generator = torch.Generator().manual_seed(len(str(request.target)))
    return Edit.of(
        model, {WEIGHT.format(layer): size * torch.randn(weight.shape, generator=generator)}
    )


@pytest.fixture
def cases(tmp_path):
    questions = [
        replace(each, answers=("a",), extra={"target": target})
        for each, target in zip(
            made_questions(tmp_path, n=4), ("yes", "no", "four", "it"), strict=True
        )
    ]
    return edit_cases(questions, n_neighbours=2)


@pytest.mark.slow
def test_rows_are_means_of_evaluations(seed, cases, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "pushed", pushed)
    model = made_model(seed)
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {"methods": ("pushed",), "method_settings": {"pushed": {"size": 0.2}}}
    found = sweep("edit", model, cases, tmp_path / "out", progress=False, shard_size=3, **options)
    assert found.n_failed == 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    rows = in_order(found)
    n_rows = 0
    for row, case in enumerate(cases):
        for layer in range(model.cfg.n_layers):
            here = rows[(rows["question"] == row) & (rows["layer"] == layer)].set_index("group")
            if layer == 1 and case.target == "no":
                assert not here["edited"].any() and (here["drift"].abs() < 1e-6).all()
                n_rows += len(here)
                continue
            assert here["edited"].all()
            made = evaluate(
                model,
                lambda case, at=layer: pushed(model, case_request(case), layer=at, size=0.2),
                [case],
            )
            means = made.to_dataframe().groupby("group")[
                ["probability", "probability_before", "drift"]
            ]
            for name, expected in means.mean().items():
                np.testing.assert_allclose(here[name].loc[expected.index], expected, atol=1e-5)
            n_rows += len(here)
    assert n_rows == len(rows)
    again = sweep("edit", model, cases, tmp_path / "out", progress=False, shard_size=3, **options)
    assert_same(again, found)
    summary = found.summarize(samples=20)
    assert set(summary.figures) == {"probability", "score", "unchanged", "drift"}
    means = rows.groupby(["group", "layer"])["drift"].mean()
    table = summary.table[summary.table["measure"] == "drift"].astype({"group": str})
    np.testing.assert_allclose(
        table.set_index(["group", "layer"])["mean"].loc[means.index], means, rtol=1e-4, atol=1e-6
    )


def case_request(case):
    """As much of a request as `pushed` looks at."""

    class Request:
        target = case.target

    return Request()


def test_what_cannot_be_edited(seed, tmp_path):
    model = made_model(seed)
    found = sweep("edit", model, made_questions(tmp_path, n=1), tmp_path / "out", progress=False)
    assert "no target" in found.failures()["message"][0]
    for options, message in [
        ({"methods": ("magic",)}, "magic"),
        ({"methods": ("rome",)}, "covariance"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweep("edit", model, [], tmp_path / "other", **options)


def test_settings_that_are_left_out_are_other_settings(seed, cases, tmp_path, monkeypatch):
    """They are refused, before anything that is there is thrown away."""
    monkeypatch.setitem(METHODS, "pushed", pushed)
    given, out = {"methods": ("pushed",), "layers": (0,), "progress": False}, tmp_path / "out"
    model = made_model(seed)
    found = sweep("edit", model, cases, out, method_settings={"pushed": {"size": 0.2}}, **given)
    rows = in_order(found)
    with pytest.raises(OtherSettings, match="method_settings.pushed was .*size.* and is now None"):
        sweep("edit", model, cases, out, **given)
    assert in_order(Sweep(out)).equals(rows)
