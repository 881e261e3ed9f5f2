"""Sweeps of data sets with bad rows: each is a failure with its reason, all others have results."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sweep_cases import TEXTS, assert_same, in_order, made_model, made_questions, swept

from mmlens.data import VisualQuestion, local_questions, vqa_constraints
from mmlens.data.reading import Refused
from mmlens.sweeps import Task, sweep
from mmlens.sweeps.items import item_at
from mmlens.sweeps.plan import plan
from mmlens.sweeps.task import Columns

N = 3


@pytest.fixture
def model(seed):
    return made_model(seed)


def lines_of(folder: Path, bad: Any) -> Path:
    """Three questions as lines of JSON, one of which has something else in it."""
    questions = made_questions(folder, N, N)
    rows: list[dict[str, Any]] = [
        {"question": each.question, "image": Path(each.image).name, "source": f"mine/{i}",
         "visual_constraint": each.visual_constraint}
        for i, each in enumerate(questions)
    ]  # fmt: skip
    if isinstance(bad, dict):
        rows[1] |= bad
    lines = [json.dumps(row) for row in rows]
    if isinstance(bad, str):
        lines[1] = bad
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def check_one_failure(found: Any, expected: Any, reason: str, why: str) -> None:
    """The second question failed; the others have the rows that they have without it."""
    failures = found.failures().to_dict("records")
    assert [each["question"] for each in failures] == [1]
    assert failures[0]["reason"] == reason and why in failures[0]["message"]
    assert found.n_done == found.n_questions == N
    ours = in_order(found).drop(columns=["source", "cluster"])
    other = in_order(expected)[lambda table: table["question"] != 1]
    other = other.drop(columns=["source", "cluster"]).reset_index(drop=True)
    assert ours.equals(other)


@pytest.mark.parametrize(
    ("bad", "reason", "why"),
    [
        ({"image": 7}, "unusable row", "image must be a text or a list of texts, not 7"),
        ({"image": None}, "unusable row", "image is None"),
        ({"split": 5}, "unusable row", "line 2: split must be a text, not 5"),
        ({"subject": {}}, "unusable row", "subject must be a text, not {}"),
        ({"answers": [["nested"]]}, "unusable row", "answers must be a list of texts"),
        ({"image": "x" * 300 + ".png"}, "unreadable image", "File name too long"),
        ("{", "unusable row", "line 2: no json"),
    ],
)
def test_of_lines(model, tmp_path, bad, reason, why):
    expected = swept(model, local_questions(lines_of(tmp_path, {})), tmp_path / "good")
    questions = local_questions(lines_of(tmp_path, bad))
    out = tmp_path / "out"
    found = swept(model, questions, out)
    check_one_failure(found, expected, reason, why)
    results = {path.name: path.stat().st_mtime_ns for path in found.folder.results.iterdir()}
    again = swept(model, questions, out)  # a restart finds it done, and does not stumble again
    assert_same(again, found)
    assert results == {p.name: p.stat().st_mtime_ns for p in again.folder.results.iterdir()}


def test_of_a_csv_with_a_short_row(model, tmp_path):
    made_questions(tmp_path, N, N)
    rows = [f"{i},{TEXTS[i]},this place,{i}.png" for i in range(N)]
    path = tmp_path / "okvqa.csv"
    header = ",question,main_entity,image_url"
    path.write_text("\n".join([header, *rows]))
    expected = swept(model, vqa_constraints(path), tmp_path / "good")
    path.write_text("\n".join([header, rows[0], "1,who", rows[2]]))
    found = swept(model, vqa_constraints(path), tmp_path / "out")
    check_one_failure(found, expected, "unusable row", "line 3: 2 fields for 4 columns")


class Whatever:
    """A value of a kind that neither JSON nor a parquet file holds."""


@pytest.mark.parametrize(
    ("change", "reason", "why"),
    [
        ({"split": 5}, "unusable row", "split must be a text, not 5"),
        ({"subject": {"a": 1}}, "unusable row", "subject must be a text, not {'a': 1}"),
        ({"source": None}, "unusable row", "source must be a text, not None"),
        ({"relation": Whatever()}, "unusable row", "relation must be a text"),
        ({"image": 7}, "unreadable image", "not int"),
        ({"image": {"a": "b"}}, "unreadable image", "not dict"),
        ({"relation": "\ud800"}, "cannot be asked", "surrogates not allowed"),
        ({"question": 3}, "error", ""),
    ],
)
def test_of_questions_made_in_python(model, tmp_path, monkeypatch, change, reason, why):
    # What runs where no test checks the signature.
    monkeypatch.setattr(VisualQuestion, "__init__", inspect.unwrap(VisualQuestion.__init__))
    questions = made_questions(tmp_path, N, N)
    expected = swept(model, questions, tmp_path / "good")
    questions[1] = replace(questions[1], **change)
    found = swept(model, questions, tmp_path / "out")
    check_one_failure(found, expected, reason, why)
    assert_same(swept(model, questions, tmp_path / "out"), found)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (KeyError("image"), "KeyError: 'image'"),
        (TypeError("no"), "TypeError: no"),
        (
            {"question": "a"},
            "must be a question, a pair of images or an edit, not {'question': 'a'}",
        ),
    ],
)
def test_of_a_reader_that_fails(what, why):
    class Rows(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if isinstance(what, Exception):
                raise what
            return what

    found = item_at(Rows([1, 2]), 1)
    assert isinstance(found, Refused) and found.row == 1
    assert why in found.why


def test_a_task_whose_rows_are_of_another_kind(model, tmp_path):
    """They are a failure of their question, and not the end of the sweep."""

    class Wrong(Task):
        name: ClassVar[str] = "wrong"
        columns: ClassVar[Columns] = {"what": pa.float32()}
        measures: ClassVar[tuple[str, ...]] = ()

        def rows(self, model: Any, asked: Any, carried: Any) -> list[dict[str, Any]]:
            what: Any = "a text" if asked.question.source == "made/1" else 0.5
            return [{"site": "logits", "role": "last", "layer": 0, "window": 1, "what": what}]

    found = sweep(Wrong(), model, made_questions(tmp_path, N, N), tmp_path / "out", progress=False)
    assert found.failures()["question"].tolist() == [1]
    assert found.results()["what"].tolist() == [0.5, 0.5]


def test_what_is_written_holds_no_control_characters(model, tmp_path):
    evil = "\x1b[31m\u202emade\x07"
    questions = made_questions(tmp_path, N, N)
    questions[1] = replace(questions[1], image=tmp_path / f"{evil}.png", source=evil)
    found = swept(model, questions, tmp_path / "out")
    failure = found.failures().to_dict("records")[0]
    log = found.folder.log.read_text(encoding="utf-8")
    for text in (*failure.values(), log):
        assert not set(str(text)) & {"\x1b", "\u202e", "\x07"}
    assert failure["source"] == "␛[31m\ufffdmade␇" and "␛[31m" in log
    pq.read_table(found.folder.failures)


def test_rows_of_a_sample_are_those_of_the_file(tmp_path):
    """A row that cannot be used keeps its place, so that the others keep theirs."""
    good = local_questions(lines_of(tmp_path, {}))
    shards = plan(good, limit=2, seed=3)
    bad = local_questions(lines_of(tmp_path, "{"))
    with_bad = plan(bad, limit=2, seed=3)
    assert [q.row for s in shards for q in s.questions] == [
        q.row for s in with_bad for q in s.questions
    ]
    rows = [q.row for shard in plan(bad) for q in shard.questions]
    assert sorted(rows) == list(range(N))
