"""`mmlens edit` and `mmlens edit-bench`: files, resuming, what is left out, and bad input."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from question_files import write_mmmu, write_okvqa
from tiny_checkpoint import write_tiny_llava

from mmlens import HookedMultimodalTransformer
from mmlens.cli import main
from mmlens.data import edit_cases, local_questions, mmmu, okvqa, soft_accuracy
from mmlens.data.open import open_cases
from mmlens.edit_bench.bench import EditBench
from mmlens.edit_bench.settings import BenchSettings, Variant, default_layer
from mmlens.editing import METHODS, Edit, multedit
from mmlens.editing.evaluation import Examination, evaluate, request_of
from mmlens.editing.examiner import Examiner
from mmlens.editing.multedit import keys_of
from mmlens.plots import save
from mmlens.utils.resumable import FolderInUse

QUESTION, CONSTRAINT = "the capital of this country is", "this country"
OTHER = "the river near this country is"
FAST = ("--set", "multedit.steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and questions about three images; one image is missing."""
    folder = tmp_path_factory.mktemp("edit-bench")
    write_tiny_llava(folder / "model")
    rows = []
    for number in range(8):
        name = f"{number % 3}.png"
        pixels = np.random.default_rng(number % 3).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        rows.append(
            {
                "question": OTHER if number == 1 else QUESTION,
                "image": "missing.png" if number == 1 else name,
                "visual_constraint": CONSTRAINT,
                "answers": [("Rome", "Berlin", "Paris")[number % 3]],
                "subject": f"country {number}",
            }
        )
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def no_browser(monkeypatch):
    def fail(*_: object) -> bytes:
        raise save.FigureNotSaved("no browser here")

    monkeypatch.setattr(save, "render", fail)


@pytest.fixture
def run(capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def bench_run(run, folder, tmp_path):
    """The benchmark on the folder's questions; returns the code, output and errors."""

    def go(*arguments, out="out"):
        data = ("--model", folder / "model", "--data", folder / "questions.jsonl")
        return run("edit-bench", *data, "--out", tmp_path / out, *FAST, *arguments)

    return go


def test_a_benchmark_is_the_evaluation_of_each_edit(bench_run, folder, tmp_path):
    code, out, err = bench_run("--methods", "multedit", "--layers", "1", "--limit", 3)
    assert code == 0, err
    assert "considered 4, cannot be asked (ValueError) 1, used 3" in err
    written = tmp_path / "out" / "methods"
    names = {"figure.html", "table.csv", "costs.csv", "raw.parquet", "settings.json"}
    assert {path.name for path in written.iterdir()} == names
    assert all(str(written / name) in out for name in names)
    record = json.loads((written / "settings.json").read_text())
    assert record["settings"]["method_settings"] == {"multedit": {"steps": 2}}
    assert record["failed"] == {"multedit@1": {}}

    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    cases = [edit_cases(local_questions(folder))[row] for row in (0, 2, 3)]
    by_hand = evaluate(
        model,
        lambda case: multedit(
            model,
            request_of(model, case),
            layer=1,
            steps=2,
            positions="last",
            references=None,
        ),
        cases,
    ).to_dataframe()
    raw = pd.read_parquet(written / "raw.parquet")
    columns = [name for name in raw.columns if name not in ("method", "said", "said_before")]
    pd.testing.assert_frame_equal(raw[columns], by_hand[columns], check_dtype=False, rtol=1e-4)
    table = pd.read_csv(written / "table.csv").set_index(["group", "measure"])
    mean = by_hand.query("group == 'efficacy'")["probability"].mean()
    assert table.loc[("efficacy", "probability"), "mean"] == pytest.approx(mean, rel=1e-3, abs=2e-6)


def test_a_run_goes_on_where_another_stopped(folder, tmp_path, monkeypatch):
    made = []

    def counted(*arguments, **settings):
        made.append(settings)
        if len(made) == 2:
            raise KeyboardInterrupt
        return multedit(*arguments, references=None, **settings)

    monkeypatch.setitem(METHODS, "multedit", counted)
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    cases = edit_cases(local_questions(folder), n_neighbours=1)

    def run(out="out", **changes):
        chosen = {"limit": 2, "method_settings": {"multedit": {"steps": 1}}, **changes}
        bench = EditBench(BenchSettings(**chosen), model, cases, {})
        return bench.evaluations(tmp_path / out)[Variant("multedit", 1)].to_dataframe()

    with pytest.raises(KeyboardInterrupt):
        run()
    files = list((tmp_path / "out" / "edits" / "multedit@1").iterdir())
    assert len(made) == 2 and len(files) == 1  # a whole one, of the edit before
    first = run()
    assert len(made) == 3 and len(run()) == len(first) and len(made) == 3
    pd.testing.assert_frame_equal(run("again"), first)
    assert len(made) == 5
    assert set(run(limit=3)["case"]) > set(first["case"]) and len(made) == 6
    run(method_settings={"multedit": {"steps": 2}})
    assert len(made) == 8  # other settings: nothing of it is known


@pytest.mark.parametrize("sequential", [False, True])
def test_two_benchmarks_of_one_method_cannot_write_to_one_folder(
    folder, tmp_path, monkeypatch, sequential
):
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    cases = edit_cases(local_questions(folder), n_neighbours=1)
    made = []

    def bench(name):
        chosen = BenchSettings(methods=(name,), layers=(1,), limit=1, sequential=sequential)
        return EditBench(chosen, model, cases, {}).evaluations(tmp_path)

    def nested(*arguments, **settings):
        with pytest.raises(FolderInUse, match="another edit benchmark is writing"):
            bench("multedit")
        bench("other")
        made.append(multedit(*arguments, layer=1, steps=1, references=None))
        return made[-1]

    monkeypatch.setitem(METHODS, "multedit", nested)
    monkeypatch.setitem(
        METHODS, "other", lambda *given, layer: multedit(*given, layer=1, steps=1, references=None)
    )
    assert len(bench("multedit")) == len(made) == 1


def test_layers_and_sequences(bench_run, tmp_path, monkeypatch):
    code, _, err = bench_run("--methods", "multedit", "--layers", "0-1", "--limit", 1)
    assert code == 0, err
    table = pd.read_csv(tmp_path / "out" / "layers" / "table.csv")
    assert set(table["layer"]) == {0, 1} and set(table["method"]) == {"multedit"}
    code, _, err = bench_run("--methods", "multedit", "--sequential", "--limit", 2)
    assert code == 0, err
    table = pd.read_csv(tmp_path / "out" / "sequences" / "table.csv")
    assert set(table["n_edits"]) == {1, 2}
    files = {path.stem for path in (tmp_path / "out" / "sequences" / "multedit@1").iterdir()}
    assert files == {"1", "2"}
    monkeypatch.setitem(METHODS, "multedit", pytest.fail)  # everything is there
    assert bench_run("--methods", "multedit", "--sequential", "--limit", 2)[0] == 0


def test_an_edit_that_cannot_be_made_counts_as_none(folder, tmp_path, monkeypatch):
    def diverged(*_, **__):
        raise ValueError("it has diverged")

    monkeypatch.setitem(METHODS, "multedit", diverged)
    settings = BenchSettings(model=str(folder / "model"), limit=2)
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    cases = edit_cases(local_questions(folder))
    [found] = EditBench(settings, model, cases, {}).evaluations(tmp_path).values()
    assert found.metadata["failed"] == {"it has diverged": 2} and bool(found.unchanged.all())
    assert torch.equal(found.probability[:, 0], found.probability[:, 1])
    assert found.drift.abs().max() < 1e-6


def preserved_file(folder):
    """The questions whose images are there, and a file of them."""
    questions = [each for each in local_questions(folder) if "missing" not in str(each.image)]
    rows = [
        {"question": q.question, "image": q.image.name, "visual_constraint": CONSTRAINT}
        for q in questions
    ]
    path = folder / "preserved.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return questions, path


def test_preserved_questions_are_none_that_is_asked(folder, monkeypatch, tmp_path):
    given = []

    def watched(*arguments, kept, **settings):
        given.append(kept)
        return multedit(*arguments, kept=kept, references=None, **settings)

    monkeypatch.setitem(METHODS, "multedit", watched)
    questions, path = preserved_file(folder)
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    settings = BenchSettings(
        preserved=str(path), limit=1, method_settings={"multedit": {"steps": 1}}
    )
    bench = EditBench(settings, model, edit_cases(questions[:2], n_neighbours=1), {})
    bench.evaluations(tmp_path)
    asked = Examination(Examiner(model), bench.chosen[0][0]).questions
    hidden = {(q.question, q.image) for q in asked}
    others = [q for q in questions if (q.question, q.image) not in hidden]
    assert 0 < len(others) < len(questions)
    expected = keys_of(model, [Examiner(model).prepared(q) for q in others], 1)
    found = {tuple(key.tolist()) for key in given[0].T}
    assert found == {tuple(key.tolist()) for key in expected.T}


def test_methods_are_told_how_targets_end(folder, tmp_path, monkeypatch):
    told = []

    def watched(model, request, **settings):
        told.append(request.target)
        return multedit(model, request, references=None, **settings)

    monkeypatch.setitem(METHODS, "multedit", watched)
    questions, _ = preserved_file(folder)
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    settings = BenchSettings(limit=1, target_end=".", method_settings={"multedit": {"steps": 1}})
    bench = EditBench(settings, model, edit_cases(questions[:2], n_neighbours=1), {})
    [found] = bench.evaluations(tmp_path).values()
    [case] = bench.chosen[0]
    assert told == [f"{case.target}."] and found.target == (case.target,)


def test_a_covariance_that_cannot_be_estimated_stops_the_benchmark(folder, tmp_path):
    """It is no failure of one edit, to be counted."""
    questions, _ = preserved_file(folder)
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    (tmp_path / "empty.txt").write_text("\n\n")
    settings = BenchSettings(methods=("rome@1",), limit=1, texts=str(tmp_path / "empty.txt"))
    bench = EditBench(settings, model, edit_cases(questions[:2], n_neighbours=1), {})
    with pytest.raises(ValueError, match="no texts"):
        bench.evaluations(tmp_path)


def test_the_key_may_be_at_the_last_token(folder, tmp_path):
    questions, path = preserved_file(folder)
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    settings = BenchSettings(
        methods=("multedit", "multedit-last", "multedit-all"),
        layers=(1,),
        limit=1,
        preserved=str(path),
        n_preserved=1,
        n_preserved_whole=1,
        method_settings={"multedit": {"steps": 1}},
    )
    bench = EditBench(settings, model, edit_cases(questions[:2], n_neighbours=1), {})
    [case], _ = bench.chosen
    plain, at_last = (bench.request(case, variant.span) for variant in bench.variants[:2])
    assert plain.span == "constraint" and at_last.span == "last"
    assert at_last.position(at_last.inputs) == at_last.inputs.n_pos - 1
    # One key where the edit's is, and those of all positions of another prompt.
    kept = bench.arguments(bench.variants[1])["kept"]
    prompts = [Examiner(model).prepared(q) for q in bench._preserved.questions]
    rows = bench._preserved.order
    assert torch.equal(kept[:, :1], keys_of(model, [prompts[rows[0]]], 1, span="last"))
    assert torch.equal(kept[:, 1:], keys_of(model, [prompts[rows[1]]], 1, span=None))
    # Every word's of one prompt, and those of all positions of another.
    kept = bench.arguments(bench.variants[2])["kept"]
    words = ~prompts[rows[0]].is_image[0]
    first, second = (keys_of(model, [prompts[row]], 1, span=None) for row in rows[:2])
    assert torch.equal(kept, torch.cat([first[:, words], second], dim=1))
    found = bench.evaluations(tmp_path)
    assert [each.label for each in found] == ["multedit@1", "multedit-last@1", "multedit-all@1"]
    assert [each.metadata["failed"] for each in found.values()] == [{}, {}, {}]


def test_unrelated_questions_are_asked_as_well(bench_run, folder, tmp_path):
    code, _, err = bench_run("--limit", 1, "--methods", "multedit", "--unrelated", "demo")
    assert code == 0, err
    raw = pd.read_parquet(tmp_path / "out" / "methods" / "raw.parquet")
    assert (raw["group"] == "unrelated: demo").sum() == 8


def test_accuracy_on_okvqa_and_mmmu_before_and_after(bench_run, folder, tmp_path):
    """Specificity on the data sets of the paper: their own measures, MMMU's subjects together."""
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")

    def said_about(question):
        inputs = model.prepare(question.prompt(), question.open_images() or None)
        return model.generate(inputs, max_new_tokens=12)

    questions = [("What is this?", 5), ("Who is that?", 7)]
    for _, picture in questions:
        path = tmp_path / "val2014" / f"COCO_val2014_{picture:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (picture, 0, 0)).save(path)
    asked, annotated = write_okvqa(tmp_path, questions)
    answers = [said_about(okvqa(asked, images=tmp_path)[0])] * 2 + ["a cat"] * 8
    write_okvqa(tmp_path, questions, answers)  # the first question is answered as two of ten do
    subjects = [f"mmmu:{write_mmmu(tmp_path / 'mmmu', name) / name}" for name in ("Art", "Law")]
    sets = ("--unrelated", ",".join([f"okvqa:{asked}", *subjects]), "--n-unrelated", 8)
    files = ("--annotations", f"{asked},{annotated}")
    code, _, err = bench_run("--limit", 2, "--methods", "multedit", *sets, *files)
    assert code == 0, err
    raw = pd.read_parquet(tmp_path / "out" / "methods" / "raw.parquet")
    assert raw["group"].value_counts()["unrelated: mmmu"] == 2 * 8
    assert raw["group"].value_counts()["unrelated: okvqa"] == 2 * 2
    known = {q.source: q for q in okvqa(asked, annotated, tmp_path)}
    for name in ("Art", "Law"):
        known |= {q.source: q for q in mmmu(name, path=tmp_path / "mmmu")}
    for row in raw[raw["group"].str.startswith("unrelated")].itertuples():
        question = known[row.question]
        said = said_about(question)
        assert said.startswith(row.said_before)  # as far as decides whether it is right
        if not question.answers:
            assert math.isnan(row.score_before)
        elif row.group == "unrelated: mmmu":
            assert row.score_before == question.is_right(said)
        else:
            said = said.strip().split("\n")[0].removesuffix(".")
            assert row.score_before == pytest.approx(soft_accuracy(said, question.answers))
    first = raw[raw["question"] == okvqa(asked)[0].source]
    assert first["score_before"].tolist() == pytest.approx([2 / 3, 2 / 3])


def test_variants():
    assert Variant.parsed("multedit", [2, 3]) == [Variant("multedit", 2), Variant("multedit", 3)]
    assert [v.label for v in Variant.parsed("memit@2-4", [0])] == ["memit@2-4"]
    assert Variant.parsed("memit@2-4", [0])[0].layer == (2, 3, 4)
    assert Variant.parsed("lora@all", [0]) == [Variant("lora", None)]
    assert Variant.parsed("rome@7", [0]) == [Variant("rome", 7)]
    at_last = Variant("multedit", 5, "last")
    assert (
        Variant.parsed("multedit-last", [5]) == Variant.parsed("multedit-last@5", [0]) == [at_last]
    )
    assert at_last.label == "multedit-last@5" and at_last.arguments == {"positions": "last"}
    [everywhere] = Variant.parsed("multedit-all@5", [0])
    assert (everywhere.label, everywhere.span) == ("multedit-all@5", None)
    assert everywhere.arguments == {"positions": "all"}
    [words] = Variant.parsed("multedit-words@5", [0])
    assert (words.span, words.arguments) == (None, {"positions": "words"})
    with pytest.raises(ValueError, match="only multedit"):
        Variant.parsed("rome-all@5", [0])


def test_cases_by_their_name(folder, tmp_path):
    def named(data, images=None):
        return open_cases(data, images)

    assert named("demo").name == "demo-correct"
    assert named("demo:invented").name == "demo-invented"
    assert len(named(str(folder / "questions.jsonl"))) == 8
    record = {"src": "What is this?", "alt": "a cat", "image": "cat.jpg"}
    (tmp_path / "eval.json").write_text(json.dumps([record]))
    for kind in ("mmedit", "vlkeb"):
        [case] = named(f"{kind}:{tmp_path / 'eval.json'}")
        assert case.question.image == tmp_path / "cat.jpg"
    columns = "question,answer,dataset_name,dataset_image_ids,question_original,question_type,"
    row = "In which country is this island?,Peru,landmarks,abc1|abd2|abe3|abf4,,templated,Foo,test"
    content = f"{columns}wikipedia_title,encyclopedic_vqa_split\n{row}\n"
    (tmp_path / "test.csv").write_text(content)
    [case] = named(f"encyclopedic_vqa:{tmp_path / 'test.csv'}", str(tmp_path))
    pictures = [case.question.image, *(each.image for each in case.other_images)]
    assert len(set(pictures)) == len(pictures) <= 4 and case.target == "Peru"


def test_the_default_layer_is_early(folder):
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    assert default_layer(model) == 1


def test_edit_saves_what_it_shows(run, folder, tmp_path):
    common = (folder / "0.png", QUESTION, "--constraint", CONSTRAINT, "--model", folder / "model")
    code, out, err = run("edit", *common, "--target", "Rome", "--out", tmp_path, "--layer", 2)
    assert code == 0, err
    model = HookedMultimodalTransformer.from_pretrained(folder / "model")
    edit = Edit.load(tmp_path / "edit.safetensors", model)
    assert (edit.metadata["layer"], edit.metadata["target"]) == (2, "Rome")
    inputs = model.prepare(QUESTION, folder / "0.png", spans={"constraint": CONSTRAINT})
    [rome] = model.tokenizer(" Rome", add_special_tokens=False).input_ids
    with torch.no_grad():
        before = model(inputs)[0, -1].softmax(-1)[rome]
        with edit.applied(model):
            after = model(inputs)[0, -1].softmax(-1)[rome]
    shown = next(line for line in out.splitlines() if line.startswith("Rome"))
    assert f"{before:.3f}" in shown and f"{after:.3f}" in shown


class TestBadInput:
    @pytest.fixture
    def rejected(self, run):
        """Run with bad input; returns the one line."""

        def rejected(*arguments):
            code, out, err = run(*arguments)
            assert (code, out) == (2, ""), err
            [line] = [line for line in err.splitlines() if line.strip()]
            assert line.startswith("mmlens: ")
            return line

        return rejected

    def edit(self, folder, *more, constraint=CONSTRAINT, target="Rome"):
        model = ("--model", folder / "model", "--out", folder / "edited")
        text = ("--constraint", constraint, "--target", target)
        return ("edit", folder / "0.png", QUESTION, *text, *model, *more)

    def test_edit(self, rejected, folder):
        assert "that island" in rejected(*self.edit(folder, constraint="that island"))
        assert "--target is empty" in rejected(*self.edit(folder, target=" "))
        assert "unknown 'rome'" in rejected(*self.edit(folder, "--method", "rome"))
        assert "layer" in rejected(*self.edit(folder, "--layer", 9))
        assert "METHOD.NAME=VALUE" in rejected(*self.edit(folder, "--set", "steps=3"))
        assert "none of the methods" in rejected(*self.edit(folder, "--set", "lora.rank=3"))
        assert "steps" in rejected(*self.edit(folder, "--set", "multedit.steps=0"))
        assert "tempo" in rejected(*self.edit(folder, "--set", "multedit.tempo=2"))

    def test_edit_bench(self, rejected, folder, tmp_path):
        common = ("edit-bench", "--out", tmp_path, "--model", folder / "model")
        assert "'magic'" in rejected(*common, "--methods", "magic")
        assert "one layer" in rejected(*common, "--methods", "multedit@all")
        assert "after the @" in rejected(*common, "--methods", "lora@early")
        assert "'easy'" in rejected(*common, "--data", "demo:easy")
        assert "no.json" in rejected(*common, "--data", f"mmedit:{tmp_path / 'no.json'}")
        assert "neither 'demo'" in rejected(*common, "--data", "questions.txt")
        assert "two files" in rejected(*common, "--annotations", "one.json")
        data = ("--data", folder / "questions.jsonl")
        assert "layer 9" in rejected(*common, *data, "--layers", 9)
        assert "texts" in rejected(*common, *data, "--methods", "rome")
