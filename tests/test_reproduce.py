"""`mmlens reproduce`: what the figures show equals traces by hand; filters, files, the command."""

from __future__ import annotations

import importlib
import json
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_checkpoint import write_tiny_llava

from mmlens import HookedMultimodalTransformer, causal_trace, swap_span
from mmlens.analyses.attention_contribution import attention_contribution
from mmlens.analyses.attention_knockout import attention_knockout
from mmlens.analyses.contribution_measures import MEASURES, measures
from mmlens.analyses.correctness import auroc
from mmlens.cli import main
from mmlens.cli.reproduce import NAMES
from mmlens.data import VisualQuestion, local_questions
from mmlens.plots import save
from mmlens.reproduce import FIGURES, Settings, Study, is_complete, make, write
from mmlens.utils.resumable import FolderInUse

ONE, TWO = "the capital of this country is", "the river near this country is"
SAID = "Rome"
SETTINGS = Settings(limit=3, asked=24, minimum_gap=-1.0, windows=(1, 3), samples=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and 24 questions: every second with a text constraint, half of them right."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_tiny_llava(folder / "model")
    rows = []
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        two = number % 2 == 1
        rows.append(
            {
                "question": TWO if two else ONE,
                "image": f"{number}.png",
                "visual_constraint": "this country",
                "text_constraints": ["near"] if two else [],
                "answers": [SAID if number % 4 < 2 else "Berlin"],
                "subject": ("man", "picture", "building", "flag", "boat", "road")[number % 6],
            }
        )
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    """What the model says, so that half of its answers are right whatever its weights are."""
    monkeypatch.setattr(
        "mmlens.reproduce.study.answers_rightly",
        lambda _, question, *__: question.is_right(SAID) if question.answers else None,
    )


@pytest.fixture
def study(folder, seed):
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    return Study(replace(SETTINGS, seed=seed % 1000), model, local_questions(folder))


def test_named_questions():
    question = VisualQuestion(
        "This country, is it big?", "x.png", visual_constraint="this country,", subject="the Sudan"
    )
    named = question.named()
    assert named.question == "The Sudan, is it big?"
    assert (named.visual_constraint, named.image) == ("The Sudan", None)
    assert named.spans()["constraint"] == (0, 9)
    with pytest.raises(ValueError, match="subject"):
        VisualQuestion("This country", None, visual_constraint="this country").named()


def traced_by_hand(study, inputs, group, site, window=1):
    model = study.model
    corrupted = swap_span(model, inputs, "constraint", study.settings.replacement)
    trace = causal_trace(
        model, inputs, corrupted, sites=(site,), positions=[group], window=window, method="naive"
    )
    return trace.indirect_effect[0, 0].double().numpy()


def test_layer_profiles_are_means_of_traces(study):
    made = FIGURES["layers"](study)
    chosen, counts = study.choose(("seen", "named"))
    assert made.counts == counts and counts["used"] == 3
    table = made.tables["table"]
    assert set(table["model"].value_counts()) == {3 * 2 * study.model.cfg.n_layers}
    for kind, lines in zip(("seen", "named"), table.groupby("model", sort=False), strict=True):
        asked = [each[kind].inputs for each in chosen]
        assert all((one.pixel_values is None) == (kind == "named") for one in asked)
        for role, span in (("constraint", "constraint"), ("last token", "last")):
            rows = lines[1][(lines[1]["role"] == role) & (lines[1]["site"] == "mlp_out")]
            effects = [traced_by_hand(study, one, one.span(span), "mlp_out") for one in asked]
            np.testing.assert_allclose(rows["mean"], np.mean(effects, axis=0), atol=2e-5)
    peaks = made.tables["peaks"]
    assert len(peaks) == 2 * 3 * 2
    assert (made.tables["tests"]["p_value"].between(0, 1)).all()


def test_windows_are_restored_together(study):
    made = FIGURES["windows"](study)
    chosen, _ = study.choose(("seen", "named"))
    rows = made.tables["table"].query(
        "window == 3 and site == 'mlp_out' and role == 'sees the image'"
    )
    asked = [each["seen"].inputs for each in chosen]
    effects = [traced_by_hand(study, one, one.span("constraint"), "mlp_out", 3) for one in asked]
    np.testing.assert_allclose(rows["mean"], np.mean(effects, axis=0), atol=2e-5)


def test_two_constraints_are_apart(study):
    made = FIGURES["constraints"](study)
    table = made.tables["table"]
    assert set(table.query("model == 'one constraint'")["role"]) == {"constraint", "last token"}
    two = table.query("role == 'text constraint'")
    assert set(two["model"]) == {"two: visual replaced", "two: text replaced"}
    # "near" stands before "this country": what replaces that cannot change it.
    before = two.query("model == 'two: visual replaced'")["mean"]
    np.testing.assert_allclose(before, 0.0, atol=2e-5)
    assert all(counts["used"] == 3 for counts in made.counts.values())


def test_visual_tokens_are_the_contributions(study):
    made = FIGURES["visual-tokens"](study)
    chosen, _ = study.choose(corruptions=())
    values = [
        attention_contribution(study.model, each["seen"].inputs, "image", "constraint")
        .values.double()
        .mean(dim=1)
        for each in chosen
    ]
    shares = torch.stack([one / one.sum(dim=-1, keepdim=True) for one in values]).mean(dim=0)
    np.testing.assert_allclose(made.tables["tokens"].iloc[:, 1:], shares, atol=1e-6)
    totals = made.tables["table"].query("measure == 'total'")
    expected = torch.stack(values).sum(dim=-1).mean(dim=0)
    np.testing.assert_allclose(totals["mean"], expected, rtol=1e-5)


def test_measures_by_hand():
    contribution = torch.ones(2, 32, dtype=torch.float64)
    contribution[1, 3] = 69.0  # of 100
    found = dict(zip(MEASURES, measures(contribution).T.tolist(), strict=True))
    assert found["total"] == [32.0, 100.0]
    assert found["late share"] == [2 / 32, 0.02]
    assert found["largest share"] == [2 / 32, 0.7]
    assert found["tokens for half"] == [16.0, 1.0]
    assert found["layer's part"] == pytest.approx([32 / 132, 100 / 132])


def test_knockout_is_the_mean_of_knockouts(study):
    made = FIGURES["knockout"](study)
    chosen, _ = study.choose(corruptions=())
    asked = [each["seen"].inputs for each in chosen]
    n_layers = study.model.cfg.n_layers
    rows = made.tables["table"].query("model == 'image → last'")["mean"].to_numpy()
    effects = [
        attention_knockout(study.model, one, "image", "last", window=5).relative_effect
        for one in asked
    ]
    np.testing.assert_allclose(rows[:n_layers], torch.stack(effects).mean(dim=0), atol=1e-5)
    everywhere = [
        attention_knockout(
            study.model, one, "image", "last", layers=[1], window=3 * n_layers
        ).relative_effect
        for one in asked
    ]
    np.testing.assert_allclose(rows[n_layers:], torch.stack(everywhere).mean(dim=0), atol=1e-5)


def test_right_and_wrong_answers(study):
    made, scored = FIGURES["correctness"](study), FIGURES["auroc"](study)
    raw = made.raw.query("source == 'constraint' and layer == 1")
    assert len(raw) == made.counts["used"] == 24
    assert raw["right"].sum() == made.counts["right"]
    table = made.tables["table"].query("site == 'constraint → last token' and layer == 1")
    for name, members in (("right", raw["right"]), ("wrong", ~raw["right"])):
        mean = table[table["model"] == name]["mean"].item()
        assert mean == pytest.approx(raw[members]["contribution"].mean())
    layers = scored.tables["layers"].query("source == 'constraint' and layer == 1")
    expected = auroc(raw["contribution"].to_numpy(), raw["right"].to_numpy())
    assert layers["auroc"].item() == pytest.approx(expected)
    confidence = scored.tables["table"].query("predictor == 'confidence'")["auroc"].iloc[0]
    assert confidence == pytest.approx(auroc(raw["confidence"].to_numpy(), raw["right"].to_numpy()))


def test_every_question_that_drops_out_is_counted(study):
    unfit = [
        VisualQuestion(ONE, "no.png", visual_constraint="this country", answers=(SAID,)),
        VisualQuestion(ONE, None, visual_constraint="that river", answers=(SAID,)),
        VisualQuestion(ONE, None, answers=(SAID,)),
        VisualQuestion(ONE, None, visual_constraint="this country", answers=(SAID,), subject=SAID),
    ]
    study.questions = [*unfit, *study.questions]
    chosen, counts = study.choose(limit=4)
    assert len(chosen) == counts["used"] == 4
    assert sum(counts.values()) - counts["considered"] == counts["considered"]
    for reason in (
        "no image, or no subject",
        "constraint not found",
        "no visual constraint",
        "asks for the name of what is seen",
    ):
        assert counts[reason] == 1
    assert all(each["seen"].right for each in chosen)
    study.questions = unfit
    with pytest.raises(ValueError, match="none of 4 questions"):
        study.choose()


def test_gaps_are_what_the_corruption_takes(study):
    (only,), _ = study.choose(limit=1)
    asked = only["seen"]
    probabilities = study.model(asked.inputs)[0, -1].softmax(-1)
    corrupted = swap_span(study.model, asked.inputs, "constraint", "Paris")
    after = study.model(corrupted)[0, -1].softmax(-1)[probabilities.argmax()]
    assert asked.gap(("constraint",)) == pytest.approx(
        (probabilities.max() - after).item(), abs=1e-6
    )


def test_a_figure_is_complete_with_its_settings_only(study, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "render", lambda *_: b"an image")
    made = FIGURES["correctness"](study)
    assert not is_complete("correctness", study.settings, tmp_path)
    written = write(made, study.settings, study.model.device, tmp_path)
    assert is_complete("correctness", study.settings, tmp_path)
    assert not is_complete("correctness", Settings(limit=4), tmp_path)
    record = json.loads((tmp_path / "correctness" / "settings.json").read_text())
    assert record["settings"]["seed"] == study.settings.seed
    assert record["questions"] == made.counts and "torch" in record["versions"]
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "correctness" / "raw.parquet"), made.raw
    )
    random.choice([path for path in written if path.name != "settings.json"]).unlink()
    assert not is_complete("correctness", study.settings, tmp_path)


@pytest.mark.parametrize("name", ["knockout", "windows", "correctness", "visual-tokens"])
def test_a_figure_goes_on_where_it_was_stopped(study, tmp_path, monkeypatch, name):
    """What was found for a question is not computed again, and the numbers are the same."""
    monkeypatch.setattr(save, "render", lambda *_: b"an image")
    module, function = {
        "knockout": ("knockout", "attention_knockout"),
        "windows": ("study", "causal_trace"),
        "correctness": ("correctness", "attention_contribution"),
        "visual-tokens": ("visual_tokens", "attention_contribution"),
    }[name]
    module = importlib.import_module(f"mmlens.reproduce.{module}")
    computed, calls, stops = getattr(module, function), [], []

    def counted(*given, **options):
        if len(calls) == stops[-1]:
            raise KeyboardInterrupt
        calls.append(given)
        return computed(*given, **options)

    expected = FIGURES[name](study).raw.reset_index(drop=True)
    monkeypatch.setattr(module, function, counted)
    for stop in (1, 2):
        stops.append(stop)
        study.shared.clear()
        with pytest.raises(KeyboardInterrupt):
            make(name, study, tmp_path)
        assert not is_complete(name, study.settings, tmp_path)
    unfinished = tmp_path / name / ".unfinished"
    assert len(list(unfinished.iterdir())) == 2
    stops.append(-1)
    make(name, study, tmp_path)
    n_calls, n_values = len(calls), {"knockout": 3 * 2 * 3, "windows": 3 * 2 * 2}
    assert n_calls == n_values.get(name, study.settings.asked * 2 if name == "correctness" else 3)
    assert is_complete(name, study.settings, tmp_path) and not unfinished.exists()
    made = pd.read_parquet(tmp_path / name / "raw.parquet")
    pd.testing.assert_frame_equal(made, expected, rtol=1e-5, atol=1e-5)


def test_two_reproductions_cannot_make_one_figure_in_one_folder(study, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "render", lambda *_: b"an image")
    module = importlib.import_module("mmlens.reproduce.visual_tokens")
    computed, refused = module.attention_contribution, []
    other = Study(study.settings, study.model, study.questions)

    def nested(*given, **options):
        if not refused:
            with pytest.raises(FolderInUse, match="another reproduction is writing") as error:
                make("visual-tokens", other, tmp_path)
            refused.append(str(error.value))
            make("correctness", other, tmp_path)
        return computed(*given, **options)

    monkeypatch.setattr(module, "attention_contribution", nested)
    make("visual-tokens", study, tmp_path)
    assert len(refused) == 1 and str(tmp_path / "visual-tokens") in refused[0]
    for name in ("visual-tokens", "correctness"):
        assert is_complete(name, study.settings, tmp_path)


def test_the_command_makes_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise save.FigureNotSaved("no browser here")

    monkeypatch.setattr(save, "render", fail)
    options = [*("--model", folder / "model", "--data", folder, "--out", tmp_path)]
    options += ["--limit", 2, "--asked", 24, "--minimum-gap", "-1"]

    def run(figures):
        with pytest.raises(SystemExit) as exit:
            main([str(each) for each in ("reproduce", figures, *options)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    code, out, _ = run("correctness")
    assert code == 0 and "raw.parquet" in out and "figure.png" not in out
    settings = json.loads((tmp_path / "correctness" / "settings.json").read_text())
    assert "no browser here" in settings["no figure.png"]
    code, out, err = run("correctness")
    assert code == 0 and out == "" and "complete" in err
    code, out, _ = run("correctness,visual-tokens")
    assert code == 0 and "visual-tokens" in out and "correctness:" not in out
    code, _, err = run("nothing")
    assert code == 2 and "visual-tokens" in err


def test_the_command_knows_all_figures():
    assert tuple(FIGURES) == NAMES
