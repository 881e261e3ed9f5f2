"""Rows that cannot be used are left out, counted and named; all others are what they would be."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from question_files import write_gqa, write_mmmu, write_okvqa
from test_data import EVQA, write_rows
from test_edit_data import PORTABILITY, RECORD

from mmlens.data import (
    edit_cases,
    encyclopedic_vqa,
    gqa,
    local_questions,
    mmedit,
    mmmu,
    okvqa,
    open_questions,
    vqa_constraints,
)
from mmlens.data.question_sets import QuestionSet, joined_sets
from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import Refused, lines_of, read_text

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""What `str.splitlines` takes for the end of a line, and files do not."""
DATA = Path(__file__).parent / "data"


def write_lines(path: Path, rows: list[Any], end: str = "\n") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(end.join(lines).encode("utf-8", "surrogatepass"))
    return path


def separated(words: str = "one two three") -> str:
    """The words with some separators among them."""
    return "".join(random.choice(SEPARATORS) if c == " " else c for c in words)


class TestLines:
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_they_end_at_line_feeds_only(self, tmp_path, seed, end, mark):
        # Most of the separators are control characters, which JSON has as escapes; U+2028, U+2029
        # and U+0085 it has as they are.
        texts = [separated() for _ in range(5)]
        path = write_lines(tmp_path / "q.jsonl", [{"question": text} for text in texts], end)
        path.write_bytes(mark + path.read_bytes())
        found = local_questions(path)
        assert [each.question for each in found] == texts and not found.refused

    def test_of_mmedit(self, tmp_path, seed):
        sources = [separated() for _ in range(3)]
        path = write_lines(tmp_path / "e.jsonl", [{**RECORD, "src": src} for src in sources])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert [case.question.question for case in mmedit(path, tmp_path)] == sources

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_of_csv(self, tmp_path, seed, end):
        rows = [
            {"": str(i), "question": f"{separated()}\n{separated()}", "main_entity": "two",
             "image_url": "a.jpg"}
            for i in range(4)
        ]  # fmt: skip
        path = tmp_path / "okvqa.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator=end)
            writer.writeheader()
            writer.writerows(rows)
        found = vqa_constraints(path)
        assert [each.question for each in found] == [row["question"] for row in rows]
        assert [each.source for each in found] == [f"okvqa/{i}" for i in range(4)]

    def test_a_mark_before_the_columns(self, tmp_path):
        path = write_rows(tmp_path / "val.csv", [EVQA])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert encyclopedic_vqa(path, tmp_path)[0].question == EVQA["question"]

    def test_of_json(self, tmp_path):
        for path in write_okvqa(tmp_path, [("What is this?", 1)]):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert len(okvqa(tmp_path / "q.json", tmp_path / "a.json")) == 1

    def test_utf_16_with_its_mark(self, tmp_path):
        path = tmp_path / "q.jsonl"
        path.write_bytes('{"question": "Où?"}\r\n{"question": "b"}\r\n'.encode("utf-16"))
        assert [each.question for each in local_questions(path)] == ["Où?", "b"]

    def test_lines_are_those_of_the_text(self, seed):
        parts = [separated("a b c d") for _ in range(4)]
        for end in ("\n", "\r\n"):
            assert lines_of(end.join(parts)) == parts
            assert lines_of(end.join(parts) + end) == parts
        assert lines_of("") == []
        assert lines_of("a\n\nb") == ["a", "", "b"]

    def test_what_is_no_text(self, tmp_path):
        (tmp_path / "x").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=r"x is no text in UTF-8.*0xe9"):
            read_text(tmp_path / "x")


BAD_LINES = [
    ("{", "no json"),
    ('"a text"', "no object with a question: 'a text'"),
    ("[" * 100_000, "nested too deeply"),
    ('{"n": ' + "1" * 5000 + "}", "no json"),
    ('{"question": null}', "no object with a question"),
    ('{"question": "a", "image": 7}', "image must be a text or a list of texts, not 7"),
    ('{"question": "a", "image": [["a.png"]]}', "image must be a text or a list of texts"),
    ('{"question": "a", "image": {"path": "a.png"}}', "image must be"),
    ('{"question": "a", "image": null}', "image is None; a question without an image has no"),
    ('{"question": "a", "image": ""}', "image is ''; a question without an image has no such"),
    ('{"question": "a", "image": []}', "image is []"),
    ('{"question": "a", "split": 5}', "split must be a text, not 5"),
    ('{"question": "a", "subject": {}}', "subject must be a text, not {}"),
    ('{"question": "a", "source": true}', "source must be a text, not True"),
    ('{"question": "a", "answers": [["b"]]}', "answers must be a list of texts"),
    ('{"question": "a", "options": ["b", 2]}', "options must be a list of texts"),
    ('{"question": "a", "extra": []}', "extra must be an object, not []"),
    ('{"question": "\\ud800"}', r"half of a character, '\ud800'"),
]


class TestOneBadRow:
    """Among good ones: these are read, and the report names the bad one."""

    @pytest.mark.parametrize(("bad", "why"), BAD_LINES)
    def test_of_your_own(self, tmp_path, bad, why):
        rows = [{"question": "a", "answers": ["b"]}, bad, {"question": "c", "answers": ["d"]}]
        found = local_questions(write_lines(tmp_path / "mine.jsonl", rows))
        assert [each.question for each in found] == ["a", "c"]
        assert [each.source for each in found] == ["mine/0", "mine/2"]
        refused = found.refused[0]
        assert (refused.row, refused.source) == (1, "mine/1")
        assert refused.why.startswith("line 2: ") and why in refused.why
        assert len(refused.why) < 200 and "\n" not in refused.why
        report = found.report()
        assert report.counts == {("row", "left out"): 1}
        assert f"mine/1: {refused.why}" in str(report)
        assert "1 left out" in repr(found)

    def test_that_is_not_utf_8(self, tmp_path):
        path = tmp_path / "mine.jsonl"
        path.write_bytes(b'{"question": "a"}\n{"question": "caf\xe9"}\n{"question": "c"}\n')
        found = local_questions(path)
        assert [each.question for each in found] == ["a", "c"]
        assert "line 2: no text in UTF-8: it has the byte 0xe9" in found.refused[0].why

    def test_null_is_a_field_that_is_not_given(self, tmp_path):
        nothing = dict.fromkeys(("answers", "source", "split", "subject", "extra", "year"))
        found = local_questions(write_lines(tmp_path / "q.jsonl", [{"question": "a"} | nothing]))
        assert found[0] == local_questions(
            write_lines(tmp_path / "q.jsonl", [{"question": "a"}])
        )[0]  # fmt: skip
        assert not found[0].extra

    def test_a_name_that_no_file_can_have(self, tmp_path):
        names = ["x" * 300 + ".png", "a\0b.png"]
        rows = [{"question": "a", "image": name, "answers": ["b"]} for name in names]
        found = local_questions(write_lines(tmp_path / "q.jsonl", rows))
        assert found.report().counts == {("image", "missing"): 2}
        for question in found:
            with pytest.raises(ValueError, match="png"):
                question.open_images()

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            ("1,What is this", "2 fields for 4 columns"),
            ("1,What,is,this,all", "5 fields for 4 columns"),
            ("1,What is this?,this,", "image_url is empty"),
            ("1,What is \ud800,this,a.jpg", "no text in UTF-8"),
            ("1," + "x" * 140_000 + ",this,a.jpg", "field larger than field limit"),
        ],
    )
    def test_of_vqa_constraints(self, tmp_path, bad, why):
        path = tmp_path / "okvqa.csv"
        rows = [",question,main_entity,image_url", "0,What is this?,this,a.jpg", bad, "",
                "2,What is that?,that,b.jpg,"]  # fmt: skip
        path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
        found = vqa_constraints(path)
        assert [each.source for each in found] == ["okvqa/0", "okvqa/2"]
        assert found[1].visual_constraint == "that"
        assert found.refused[0].row == 1
        assert found.refused[0].why.startswith("line 3: ") and why in found.refused[0].why

    def test_of_a_folder_of_vqa_constraints(self, tmp_path):
        for name, columns in (("okvqa", ""), ("multimodal_known", "subject,")):
            row = "0,What is this?," + "x," * bool(columns) + "this,a.jpg"
            text = f",question,{columns}main_entity,image_url\n{row}\n1,short\n"
            (tmp_path / f"{name}.csv").write_text(text)
        found = open_questions(tmp_path)
        assert [each.source for each in found] == ["okvqa/0", "multimodal_known/0"]
        assert [each.source for each in found.refused] == ["okvqa/1", "multimodal_known/1"]
        assert [each.row for each in found.refused] == [1, 3]
        assert list(found.numbers) == [0, 2]

    def test_of_encyclopedic_vqa(self, tmp_path):
        fish = {"dataset_name": "inaturalist"}
        rows = [EVQA, EVQA | {"dataset_image_ids": "ab"}, EVQA | fish | {"dataset_image_ids": "7"},
                EVQA | fish | {"dataset_image_ids": "8"}]  # fmt: skip
        path = write_rows(tmp_path / "test.csv", rows)
        index = tmp_path / "val.json"
        index.write_text(json.dumps({"images": [{"id": 7, "file_name": "x.jpg"}]}))
        found = encyclopedic_vqa(path, tmp_path, inaturalist=index)
        assert [each.source[-1] for each in found] == ["0", "2"]
        whys = [each.why for each in found.refused]
        assert "'ab' is no image id" in whys[0] and "lacks its image '8'" in whys[1]
        for bad in ("[]", '{"images": [7]}', '{"images": [{"id": 1}]}', "{"):
            index.write_text(bad)
            with pytest.raises(ValueError, match=r"val\.json"):
                encyclopedic_vqa(path, tmp_path, inaturalist=index)

    def test_of_okvqa(self, tmp_path):
        asked, annotated = write_okvqa(tmp_path, [("a?", 1), ("b?", 2), ("c?", 3), ("d?", 4)])
        questions, annotations = json.loads(asked.read_text()), json.loads(annotated.read_text())
        questions["questions"][1]["image_id"] = "2"
        questions["questions"][2] = None
        annotations["annotations"][0]["answers"] = [{"answer": 7}]
        asked.write_text(json.dumps(questions))
        annotated.write_text(json.dumps(annotations))
        found = okvqa(asked, annotated)
        assert [(each.question, len(each.answers)) for each in found] == [("a?", 0), ("d?", 10)]
        assert "image_id must be a whole number, not '2'" in found.refused[0].why
        assert "must be an object, not None" in found.refused[1].why
        assert "annotation 0: answer must be a text, not 7" in str(found.report())

    def test_of_gqa(self, tmp_path):
        path = write_gqa(tmp_path, {str(n): ("Is it?", f"{n}", "yes") for n in range(6)})
        rows = json.loads(path.read_text())
        del rows["0"]["question"]
        rows["1"]["imageId"] = 1
        rows["2"]["answer"] = ["yes"]
        rows["3"] = None
        rows["4"]["types"] = {"semantic": 3}
        path.write_text(json.dumps(rows))
        found = gqa(path)
        assert [each.source for each in found] == ["gqa/5"]
        assert [each.why for each in found.refused] == [
            "question 0: lacks question",
            "question 1: imageId must be a text, not 1",
            "question 2: answer must be a text, not ['yes']",
            "question 3: must be an object, not None",
            "question 4: semantic must be a text, not 3",
        ]

    def test_of_mmmu(self, tmp_path):
        import datasets

        folder = write_mmmu(tmp_path) / "Art"
        file = next(folder.iterdir())
        table = datasets.Dataset.from_parquet(str(file)).to_dict()
        table["options"][0] = "[1, "
        table["answer"][3] = None
        table["options"][2], table["answer"][2] = "[]", "[0, 1)"
        table["image_2"][1] = {"bytes": b"no image", "path": None}
        features = {name: datasets.Value("string") for name in table}
        for name in features:
            if name.startswith("image_"):
                features[name] = datasets.Image()
        changed = datasets.Dataset.from_dict(table, features=datasets.Features(features))
        changed.to_parquet(str(file))
        found = mmmu("Art", path=tmp_path)
        assert [each.source[-1] for each in found] == ["2", "3"]
        assert found[1].answers == ("[0, 1)",)
        assert "options must be a list, not '[1, '" in found.refused[0].why
        assert "answer must be a text, not None" in found.refused[1].why
        with pytest.raises(ValueError, match="not an image"):
            found[0].open_images()


class TestMMEdit:
    @pytest.mark.parametrize("empty", ["", None, [], "missing", " \t", [""], ["", " "]])
    @pytest.mark.parametrize("name", ["loc_ans", "m_loc_a"])
    def test_a_neighbour_without_an_answer_is_asked(self, tmp_path, name, empty):
        record = {**RECORD, name: empty}
        if empty == "missing":
            del record[name]
        path = tmp_path / "vqa_eval.json"
        path.write_text(json.dumps([RECORD, record]))
        whole, case = mmedit(path, tmp_path)
        group = {"loc_ans": "text", "m_loc_a": "unrelated image"}[name]
        assert case.groups().keys() == whole.groups().keys()
        assert case.groups()[group][0].answers == ()
        assert case.groups()[group][0].question == whole.groups()[group][0].question
        report = mmedit(path, tmp_path).report()
        assert report.counts["answers", "missing"] == 1

    @pytest.mark.parametrize("name", ["src", "alt", "image"])
    @pytest.mark.parametrize("lines", [False, True])
    def test_a_record_without_what_it_is_about(self, tmp_path, name, lines):
        bad = [{k: v for k, v in RECORD.items() if k != name}, {**RECORD, name: 7}, 3, None]
        records = [RECORD, *bad, RECORD, {**RECORD, name: " "}]
        path = tmp_path / "vqa_eval.json"
        path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
        found = mmedit(path, tmp_path)
        assert [case.source for case in found] == ["vqa_eval/0", "vqa_eval/5"]
        # As EasyEdit does it, a record with an empty target is left out without a word.
        assert [each.row for each in found.refused] == [1, 2, 3, 4, 6][: 4 + (name != "alt")]
        where = "line 2" if lines else "record 1"
        assert found.refused[0].why == f"{where}: lacks {name}"
        assert f"{name} must be a text" in found.refused[1].why
        assert found.report().counts["row", "left out"] == len(found.refused)

    @pytest.mark.parametrize(
        ("changes", "group", "why"),
        [
            ({"m_loc_q": ""}, "unrelated image", "m_loc without m_loc_q"),
            ({"m_loc_q": " "}, "unrelated image", "m_loc without m_loc_q"),
            ({"m_loc_q": [""]}, "unrelated image", "m_loc without m_loc_q"),
            ({"m_loc": " "}, "unrelated image", "m_loc_q without m_loc"),
            ({"loc": " "}, "text", ""),
            ({"loc": [""]}, "text", ""),
            ({"rephrase": [" "]}, "paraphrases", ""),
            ({"m_loc": None}, "unrelated image", "m_loc_q without m_loc"),
            ({"m_loc": ["a"]}, "unrelated image", "m_loc must be a text, not ['a']"),
            ({"loc": 3}, "text", "loc must be a text or a list of texts, not 3"),
            ({"rephrase": {"a": 1}}, "paraphrases", "rephrase must be"),
            ({"image_rephrase": 1}, "other images", "image_rephrase must be a text"),
            ({"port_new": {}}, "", ""),
            ({"port_new": "x"}, "", "port_new must be a list"),
            ({"port_new": [{}]}, "", "port_new 0: lacks Q&A"),
            (
                {"port_new": [{"Q&A": {"Question": " ", "Answer": "x"}}]},
                "",
                "port_new 0: Question is empty",
            ),
            (
                {"port_new": [{"Q&A": {"Question": "x", "Answer": []}}]},
                "",
                "port_new 0: Answer is empty",
            ),
            (
                {"port_new": [{"Q&A": {"Question": "x", "Answer": 5}}]},
                "",
                "port_new 0: Answer must",
            ),
        ],
    )
    def test_a_part_that_cannot_be_used(self, tmp_path, changes, group, why):
        path = write_lines(tmp_path / "e.jsonl", [RECORD, {**RECORD, **changes}])
        found = mmedit(path, tmp_path)
        whole, case = found
        assert case.groups().keys() == whole.groups().keys() - {group}
        assert [each.row for each in found.parts] == [1] * len(found.parts)
        assert any(why in each.why for each in found.parts) or not why
        assert all(each.why in str(found.report()) for each in found.parts)

    def test_one_bad_question_of_several(self, tmp_path):
        port = [PORTABILITY[0], {"Q&A": {"Question": "x"}}, PORTABILITY[1]]
        path = write_lines(tmp_path / "e.jsonl", [{**RECORD, "port_new": port}])
        found = mmedit(path, tmp_path)
        assert [each.answers for each in found[0].portability] == [("France",), ("French",)]
        assert [each.why for each in found.parts] == ["port_new 1: lacks Answer"]


def test_parts_are_named_after_sets_are_joined():
    """And in the edits that are made of them."""
    one = Refused(1, "one/1", "no box")
    sets = [
        QuestionSet(name, 2, lambda row: VisualQuestion("a", None, answers=("b",)), (), [one])
        for name in ("one", "other")
    ]
    both = joined_sets("both", sets)
    assert [each.row for each in both.parts] == [1, 3]
    assert edit_cases(both).parts == both.parts


def test_targets_and_paraphrases_that_are_none(tmp_path):
    rows = [
        {"question": "a", "target": "b", "paraphrases": ["c"]},
        {"question": "a", "target": 7},
        {"question": "a", "target": ""},
        {"question": "a", "target": "b", "paraphrases": "is one text"},
        {"question": "a"},
        "{",
    ]
    found = edit_cases(local_questions(write_lines(tmp_path / "q.jsonl", rows)))
    assert len(found) == 1 and [each.question for each in found[0].paraphrases] == ["c"]
    assert [each.row for each in found.refused] == [1, 2, 3, 5]
    assert "target must be a text, not 7" in found.refused[0].why
    assert "paraphrases must be a list of texts" in found.refused[2].why


def test_a_part_of_a_set_names_its_own(tmp_path):
    rows = [{"question": str(i)} if i % 3 else "{" for i in range(10)]
    found = local_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert [each.row for each in found.refused] == [0, 3, 6, 9]
    part = found[1:4]
    assert [each.question for each in part] == ["2", "4", "5"]
    assert [each.row for each in part.refused] == [3]
