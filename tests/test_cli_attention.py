"""`mmlens contributions` and `mmlens knockout` print and save what the library gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_checkpoint import write_tiny_llava

import mmlens
from mmlens.analyses.attention_contribution import AttentionContribution, attention_contribution
from mmlens.analyses.attention_knockout import AttentionKnockout, attention_knockout
from mmlens.cli import main
from mmlens.cli.errors import UserError
from mmlens.cli.options import layer_list
from mmlens.plots import save

QUESTION = "the capital of this country is the city of"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process, without a browser: exit code, stdout, stderr."""

    def fail(*_: object) -> bytes:
        raise save.FigureNotSaved("no browser here")

    monkeypatch.setattr(save, "render", fail)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def prepared(checkpoint, picture, **spans):
    model = mmlens.HookedMultimodalTransformer.from_pretrained(checkpoint, device="cpu")
    return model, model.prepare(QUESTION, str(picture), spans=spans)


@pytest.mark.parametrize("heads", [False, True])
def test_contributions(run, checkpoint, picture, tmp_path, heads):
    common = ("--model", checkpoint, "--device", "cpu", "--constraint", "this country")
    options = ("--to", "constraint", "--layers", "1", "--top", "2", "--out", tmp_path)
    code, out, err = run(
        "contributions", picture, QUESTION, *common, *options, *(["--heads"] * heads)
    )
    assert code == 0, err
    model, inputs = prepared(checkpoint, picture, constraint="this country")
    expected = attention_contribution(
        model, inputs, "image", "constraint", layers=[1], per_head=heads
    )
    saved = AttentionContribution.load(tmp_path / "contributions.safetensors")
    assert torch.allclose(saved.values, expected.values, atol=1e-6)
    table = pd.read_csv(tmp_path / "contributions.csv")
    assert len(table) == expected.values.numel()
    totals = saved.values.mean(dim=-2).sum(dim=-1).flatten().tolist()
    assert all(f"{total:.3f}" in out for total in totals)
    best = saved.values.mean(dim=-2).flatten(0, -2)[0].argmax()
    assert expected.source_labels[best].strip("<>") in out
    assert (tmp_path / "contributions.html").exists() and "no browser here" in err


def test_words_of_the_question_as_spans(run, checkpoint, picture, tmp_path):
    code, out, err = run(
        *("contributions", picture, QUESTION, "--model", checkpoint, "--device", "cpu"),
        *("--from", "the capital", "--to", "the city", "--out", tmp_path),
    )
    assert code == 0, err
    model, inputs = prepared(checkpoint, picture, a="the capital", b="the city")
    expected = attention_contribution(model, inputs, "a", "b")
    saved = AttentionContribution.load(tmp_path / "contributions.safetensors")
    assert torch.allclose(saved.values, expected.values, atol=1e-6)
    assert "received by the city from the capital" in out


def test_knockout(run, checkpoint, picture, tmp_path):
    code, out, err = run(
        *("knockout", picture, QUESTION, "--model", checkpoint, "--device", "cpu"),
        *("--from", "image", "--to", "last", "--window", "2", "--answer", "country"),
        *("--layers", "0-1", "--out", tmp_path),
    )
    assert code == 0, err
    model, inputs = prepared(checkpoint, picture)
    expected = attention_knockout(
        model, inputs, "image", "last", window=2, answer="country", layers=[0, 1]
    )
    saved = AttentionKnockout.load(tmp_path / "knockout.safetensors")
    assert torch.allclose(saved.probability, expected.probability, atol=1e-6)
    assert f"is {saved.clean:.3f}; with the attention of last to image cut in 2 layers" in (
        " ".join(out.split())
    )
    assert all(f"{change:+.3f}" in out for change in saved.effect.tolist())
    assert pd.read_csv(tmp_path / "knockout.csv").layer.tolist() == [0, 1]


def test_metrics(run, checkpoint, picture, tmp_path):
    common = (picture, QUESTION, "--model", checkpoint, "--device", "cpu", "--answer", "country")
    code, out, err = run(
        *("knockout", *common, "--layers", "0-1", "--metric", "logit_diff"),
        *("--contrast", "city", "--out", tmp_path),
    )
    assert code == 0, err
    model, inputs = prepared(checkpoint, picture, constraint="this country")
    saved = AttentionKnockout.load(tmp_path / "knockout.safetensors")
    expected = attention_knockout(
        model, inputs, "image", "last", answer="country", layers=[0, 1],
        metric="logit_diff", contrast="city",
    )  # fmt: skip
    assert torch.allclose(saved.values, expected.values, atol=1e-6)
    said = f"The logit of country minus that of city is {saved.clean:.3f}; with the attention"
    assert said in " ".join(out.split())
    assert "logit_diff" in out and "P(" not in out

    options = ("--constraint", "this country", "--metric", "loss", "--sites", "mlp_out")
    code, out, err = run("trace", *common, *options, "--out", tmp_path)
    assert code == 0, err
    trace = mmlens.CausalTrace.load(tmp_path / "trace.safetensors")
    corrupted = mmlens.swap_span(model, inputs, "constraint", "Paris")
    groups = [inputs.span("constraint"), inputs.span("last")]
    expected = mmlens.causal_trace(
        model, inputs, corrupted, sites=("mlp_out",), positions=groups, answer="country",
        metric="loss",
    )  # fmt: skip
    assert torch.allclose(trace.restored, expected.restored, atol=1e-6)
    assert f"The loss of country is {trace.clean:.3f} in the clean run" in " ".join(out.split())
    assert "loss of “country”" in (tmp_path / "trace.html").read_text()


@pytest.mark.parametrize("command", ["knockout", "trace"])
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--metric", "logit_diff"), "--metric logit_diff needs --contrast"),
        (("--contrast", "city"), "--contrast is for --metric logit_diff, not for probability"),
        (("--metric", "accuracy"), "'accuracy' is not one of"),
    ],
)
def test_metrics_that_lack_something(run, checkpoint, picture, command, arguments, why):
    constraint = ("--constraint", "this country")
    code, out, err = run(command, picture, QUESTION, "--model", checkpoint, *constraint, *arguments)
    assert (code, out) == (2, "")
    assert why in " ".join(err.split())


@pytest.mark.parametrize("command", ["contributions", "knockout"])
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--from", "that island"), "--from: the phrase 'that island'"),
        (("--to", "constraint"), "--to constraint needs --constraint"),
        (("--constraint", "that island"), "--constraint: the phrase"),
        (("--to", "last", "--layers", "first"), "--layers: 'first' is neither"),
        (("--to", "last", "--layers", "99"), "layers [99]"),
    ],
)
def test_bad_input_is_one_line(run, checkpoint, picture, command, arguments, why):
    code, out, err = run(command, picture, QUESTION, "--model", checkpoint, *arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and why in lines[0]


def test_layers_as_text():
    assert layer_list(None) is None
    assert layer_list("0,3-5, 4") == [0, 3, 4, 5]
    for text in ("x", "3-", "-1", "1-x", "5-3"):
        with pytest.raises(UserError, match="neither a layer nor a range"):
            layer_list(text)
