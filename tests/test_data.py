"""Readers: real rows of VQA-Constraints, files in the published forms of the others; measures."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from question_files import write_gqa, write_mmmu, write_okvqa
from small_tokenizers import KINDS
from small_tokenizers import small_tokenizer as tokenizer_of

from mmlens.data import (
    VisualQuestion,
    check_questions,
    demo_questions,
    encyclopedic_vqa,
    exact_match,
    gqa,
    local_questions,
    mmmu,
    normalise_vqa_answer,
    okvqa,
    open_questions,
    parse_choice,
    soft_accuracy,
    vqa_constraints,
)
from mmlens.data.report import how_found
from mmlens.inputs.spans import SpanNotFoundError, encode

DATA = Path(__file__).parent / "data"


def draw(path, color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), color).save(path)
    return path


def write_rows(path, rows):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


class TestVQAConstraints:
    @pytest.mark.parametrize("name", ["okvqa", "multimodal_known", "multimodal_movies"])
    def test_every_row_is_a_question(self, name):
        path = DATA / f"{name}.csv"
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream))
        questions = vqa_constraints(path, "pictures")
        assert len(questions) == len(rows) - 1
        for question, row in zip(questions, rows[1:], strict=True):
            assert question.source == f"{name}/{row[0]}"
            assert question.question == row[1]
            assert question.visual_constraint == row[-2]
            assert question.image == Path("pictures") / row[-1]
            assert question.subject == ("" if name == "okvqa" else row[2])
            assert question.answers == ()

    def test_the_constraints_are_found_or_reported(self):
        for name in ("okvqa", "multimodal_known", "multimodal_movies"):
            questions = vqa_constraints(DATA / f"{name}.csv")
            report = questions.report()
            assert report.n_questions == len(questions)
            lost = {
                f.row for f in report.findings if (f.what, f.how) == ("constraint", "not found")
            }
            # The words of these two phrases do not stand together in their questions.
            assert {
                (questions[row].question, questions[row].visual_constraint) for row in lost
            } == (
                {
                    ("Name the type of plant this is?", "this plant"),
                    ("What type of bike is on the ground?", "bike on the ground"),
                }
                if name == "okvqa"
                else set()
            )
            for row, question in enumerate(questions):
                if row in lost:
                    with pytest.raises(SpanNotFoundError, match=question.visual_constraint):
                        question.spans()
                    continue
                start, end = question.spans()["constraint"]
                found = question.question[start:end]
                assert found.lower() == question.visual_constraint.strip(",? ").lower()
            assert report.counts["image", "missing"] == len(questions)
            assert report.counts["answers", "missing"] == len(questions)

    def test_noisy_phrases(self):
        by_phrase = {
            question.visual_constraint: question
            for name in ("okvqa", "multimodal_known")
            for question in vqa_constraints(DATA / f"{name}.csv")
        }
        for phrase, found in (
            ("this place,", "this place"),
            ("This operating", "This operating"),
            ("a?", "a"),
            ("This text's", "This text's"),
        ):
            question = by_phrase[phrase]
            start, end = question.spans()["constraint"]
            assert question.question[start:end] == found
        into_a = by_phrase["a?"]
        assert into_a.spans()["constraint"][0] == into_a.question.index("a?")

    @pytest.mark.parametrize("kind", KINDS)
    def test_spans_have_tokens(self, kind):
        tokenizer = tokenizer_of(kind)
        for name in ("okvqa", "multimodal_known", "multimodal_movies"):
            questions = vqa_constraints(DATA / f"{name}.csv")
            lost = {f.row for f in questions.report().findings if f.how == "not found"}
            for question in (q for row, q in enumerate(questions) if row not in lost):
                span = question.spans()["constraint"]
                assert encode(tokenizer, question.question).tokens_in(*span)

    def test_a_folder_of_candidates(self, tmp_path, seed):
        path = DATA / "multimodal_movies.csv"
        folders = [tmp_path / question.image for question in vqa_constraints(path, "")]
        for folder in folders:
            for index in range(8):
                draw(folder / f"{index}.jpg")
            (folder / "readme.txt").write_text("no image")
        questions = vqa_constraints(path, tmp_path, seed=seed)
        again = vqa_constraints(path, tmp_path, seed=seed)
        for question, same, folder in zip(questions, again, folders, strict=True):
            assert question.image == same.image
            assert question.image.parent == folder and question.image.suffix == ".jpg"
            assert question.extra["image_choice"] == {
                "of": 8,
                "seed": seed,
                "chosen": question.image.name,
            }
            assert question.open_image().size == (6, 4)
        assert ("image", "missing") not in questions.report().counts
        # Over 200 seeds each of the 8 is drawn: missing one has a probability below 1e-10.
        drawn = {vqa_constraints(path, tmp_path, seed=s)[0].image.name for s in range(200)}
        assert len(drawn) == 8

    def test_answers_come_from_okvqa(self, tmp_path):
        rows = list(vqa_constraints(DATA / "okvqa.csv"))
        annotated = write_okvqa(tmp_path, [(q.question, int(q.image.stem[-12:])) for q in rows[:4]])
        questions = vqa_constraints(DATA / "okvqa.csv", annotations=okvqa(*annotated))
        assert [bool(question.answers) for question in questions[:6]] == [True] * 4 + [False] * 2
        assert questions[2].answers == okvqa(*annotated)[2].answers
        assert questions.report().counts["answers", "missing"] == len(questions) - 4

    def test_another_file_is_refused(self, tmp_path):
        path = write_rows(tmp_path / "x.csv", [{"": 0, "question": "?", "picture": "x"}])
        with pytest.raises(ValueError, match="columns question, picture"):
            vqa_constraints(path)


def test_how_phrases_are_found():
    text = "What is THIS  building's name, and that thing?"
    for phrase, how in (
        ("name", "exact"),
        ("this building's", "tolerant"),
        ("that-thing", "tolerant"),
        ("this build", "part of a word"),
        ("this tower", "not found"),
    ):
        assert how_found(text, phrase) == how, phrase


def test_the_report_lists_what_it_counts(tmp_path):
    picture = draw(tmp_path / "there.png")
    questions = [
        VisualQuestion("What is this tower?", picture, "this tower", answers=("x",)),
        VisualQuestion("What is this tower?", picture, "this bridge", answers=("x",), source="b"),
        VisualQuestion("What is This tower?", picture, "this tower", ("north",), ("x",)),
        VisualQuestion("What is this?", (picture, tmp_path / "gone.png"), "this"),
    ]
    report = check_questions(questions, "mine")
    assert report.counts == {
        ("constraint", "not found"): 1,
        ("constraint", "tolerant"): 1,
        ("text constraint", "not found"): 1,
        ("image", "missing"): 1,
        ("answers", "missing"): 1,
    }
    table = report.to_dataframe()
    assert table[table.how == "not found"].row.tolist() == [1, 2]
    assert table[table.what == "image"].detail.item() == str(tmp_path / "gone.png")
    assert "constraint not found: 1 (rows 1)" in str(report)
    assert "nothing to report" in str(check_questions(questions[:1]))
    with pytest.raises(SpanNotFoundError, match="this bridge"):
        questions[1].spans()


def test_the_demo_questions_are_as_they_should_be():
    counts = check_questions(demo_questions()).counts
    assert set(counts) == {("constraint", "tolerant")}  # "This country" at the beginning
    question = next(q for q in demo_questions() if q.text_constraints)
    assert set(question.spans()) == {"constraint", "text_constraint"}


class TestOKVQA:
    def test_questions_answers_and_images(self, tmp_path):
        files = write_okvqa(tmp_path, [("What is this?", 297147), ("Who is that?", 339761)])
        draw(tmp_path / "val2014" / "COCO_val2014_000000297147.jpg")
        questions = okvqa(*files, tmp_path)
        assert [q.question for q in questions] == ["What is this?", "Who is that?"]
        first = questions[0]
        assert first.open_image().mode == "RGB"
        assert first.answers[:3] == ("race 0", "race 1", "race 1")
        assert first.extra["raw_answers"][0] == "Races 0"
        assert first.source == "okvqa/2971475" and first.split == "val2014"
        assert soft_accuracy("race 2", first.answers) == pytest.approx(2 / 3)
        report = questions.report()
        assert report.counts == {("image", "missing"): 1}

    def test_questions_alone(self, tmp_path):
        asked, _ = write_okvqa(tmp_path, [("What is this?", 1)])
        assert okvqa(asked)[0].answers == ()

    def test_another_json_is_refused(self, tmp_path):
        asked, annotated = write_okvqa(tmp_path, [("What is this?", 1)])
        with pytest.raises(ValueError, match="lacks 'questions'"):
            okvqa(annotated)
        with pytest.raises(ValueError, match="lacks 'annotations'"):
            okvqa(asked, asked)


class TestGQA:
    def test_questions_answers_and_images(self, tmp_path, seed):
        asked = {
            str(20 * n): (f"Is it {n}?", f"n{n}", random.choice(["no", "ice cream"]))
            for n in range(5)
        }
        path = write_gqa(tmp_path, asked)
        draw(tmp_path / "images" / "n3.jpg")
        questions = open_questions(f"gqa:{path}", tmp_path / "images")
        assert [(q.question, q.image.stem, *q.answers) for q in questions] == list(asked.values())
        assert questions[3].open_image().mode == "RGB" and questions[3].source == "gqa/60"
        assert questions[3].extra["fullAnswer"] == f"It is {asked['60'][2]}."
        assert {(q.relation, q.split) for q in questions} == {("attr", "testdev")}
        assert questions.report().counts == {("image", "missing"): 4}
        assert gqa(path, tmp_path)[0].image == tmp_path / "n0.jpg"

    def test_a_test_split_has_no_answers(self, tmp_path):
        path = tmp_path / "test_balanced_questions.json"
        path.write_text(json.dumps({"1": {"question": "Why?", "imageId": "7", "isBalanced": True}}))
        [question] = gqa(path)
        assert question.answers == () and question.relation == "" and question.split == "test"

    def test_another_json_is_refused(self, tmp_path):
        asked, _ = write_okvqa(tmp_path, [("What is this?", 1)])
        with pytest.raises(ValueError, match="none of 4 rows can be used"):
            gqa(asked)
        asked.write_text("[]")
        with pytest.raises(ValueError, match=r"q\.json is no object of GQA's questions: \[\]"):
            gqa(asked)


EVQA = {
    "question": "In which country is this island located?",
    "answer": "Germany|the Federal Republic of Germany",
    "dataset_name": "landmarks",
    "dataset_image_ids": "abc123|def456|0f9e",
    "dataset_category_id": "7",
    "question_original": "In which country is this island located?",
    "question_type": "templated",
    "wikipedia_title": "Mainau",
    "wikipedia_url": "https://en.wikipedia.org/wiki/Mainau",
    "evidence": "",
    "evidence_section_id": "0",
    "evidence_section_title": "Mainau",
    "encyclopedic_vqa_split": "test",
}


class TestEncyclopedicVQA:
    def test_rows(self, tmp_path, seed):
        rows = [
            EVQA,
            EVQA
            | {
                "question": "Who built this old church?",
                "question_original": "Who built Saint Gallus Church?",
                "wikipedia_title": "Saint Gallus Church",
                "question_type": "automatic",
            },
            EVQA
            | {
                "question": "How large does this fish grow?",
                "question_type": "multi_answer",
                "answer": "1 m&&two feet",
                "dataset_name": "inaturalist",
                "dataset_image_ids": "17",
            },
            EVQA | {"question": "Where is it?", "dataset_image_ids": ""},
        ]
        path = write_rows(tmp_path / "test.csv", rows)
        index = tmp_path / "val.json"
        index.write_text(json.dumps({"images": [{"id": 17, "file_name": "val/0001/x.jpg"}]}))
        questions = encyclopedic_vqa(path, tmp_path, inaturalist=index, seed=seed)
        island, church, fish, nothing = questions
        assert island.visual_constraint == "this island"
        assert island.extra["constraint_from"] == "demonstrative"
        assert island.answers == ("Germany", "the Federal Republic of Germany")
        chosen = island.extra["image_choice"]["chosen"]
        assert chosen in EVQA["dataset_image_ids"].split("|")
        assert island.image == tmp_path.joinpath("landmarks", *chosen[:3], f"{chosen}.jpg")
        assert (
            island.image == encyclopedic_vqa(path, tmp_path, inaturalist=index, seed=seed)[0].image
        )
        assert church.visual_constraint == "this old church"
        assert church.extra["constraint_from"] == "question_original"
        assert fish.answers == ("1 m", "two feet")
        assert fish.extra["answer_lists"] == [["1 m", "two feet"]]
        assert fish.image == tmp_path / "inaturalist/val/0001/x.jpg"
        assert nothing.image is None and nothing.visual_constraint == ""
        assert all(q.subject and q.split == "test" for q in questions)

    def test_what_cannot_be_read(self, tmp_path):
        bird = EVQA | {"dataset_name": "inaturalist", "dataset_image_ids": "18"}
        path = write_rows(tmp_path / "test.csv", [bird])
        with pytest.raises(ValueError, match="give inaturalist="):
            encyclopedic_vqa(path, tmp_path)
        index = tmp_path / "val.json"
        index.write_text(json.dumps({"images": []}))
        with pytest.raises(ValueError, match="lacks its image '18'"):
            encyclopedic_vqa(path, tmp_path, inaturalist=index)
        with pytest.raises(ValueError, match="it lacks"):
            encyclopedic_vqa(DATA / "okvqa.csv", tmp_path)


@pytest.fixture(scope="module")
def mmmu_folder(tmp_path_factory):
    return write_mmmu(tmp_path_factory.mktemp("mmmu"))


class TestMMMU:
    def shades(self, question):
        return [picture.getpixel((0, 0))[0] for picture in question.open_images()]

    def test_options_and_images_in_order(self, mmmu_folder):
        one, several, open_question, hidden = mmmu("Art", path=mmmu_folder)
        assert one.question == "Who painted <image>?" and self.shades(one) == [10]
        assert one.options == ("Goya", "El Greco") and one.answers == ("El Greco",)
        assert one.expected == replace(one, choice="").expected == ("B",)
        assert one.is_right("(B)") and not one.is_right("A")
        assert "(B) El Greco" in one.prompt() and one.prompt().startswith(one.question)
        # Image 3 is mentioned nowhere, 2 is twice.
        assert several.prompt().count("<image>") == 4
        assert self.shades(several) == [40, 30, 20, 30]
        assert several.answers == ("<image>",) and several.expected == ("A",)
        assert several.is_right("(A)") and not several.is_right("(C)")  # both read "<image>"
        assert open_question.expected == ("4", "four") and open_question.is_right("4.")
        assert open_question.prompt() == "<image>\nHow many?"
        assert hidden.answers == () and hidden.images == () and hidden.source.endswith("Art_4")

    def test_what_is_not_there(self, mmmu_folder):
        with pytest.raises(FileNotFoundError, match=r"no test-\*.parquet"):
            mmmu("Art", "test", path=mmmu_folder)


class TestLocal:
    def test_a_folder(self, tmp_path, seed):
        draw(tmp_path / "a.png")
        for index in range(3):
            draw(tmp_path / "many" / f"{index}.png")
        lines = [
            {"question": "Who built this?", "image": "a.png", "visual_constraint": "this"},
            {"question": "And that?", "image": "many", "answers": ["x"], "year": 1889},
            {"question": "Both?", "image": ["a.png", "many/1.png"], "source": "mine"},
            {"question": "None?"},
        ]
        text = "\n\n".join(json.dumps(line) for line in lines)
        (tmp_path / "questions.jsonl").write_text(text)
        questions = local_questions(tmp_path, seed=seed)
        first, chosen, both, none = questions
        assert first.open_image().size == (6, 4) and first.source == "questions/0"
        assert chosen.image.parent == tmp_path / "many" and chosen.answers == ("x",)
        assert chosen.extra["year"] == 1889 and chosen.extra["image_choice"]["seed"] == seed
        assert len(both.open_images()) == 2 and both.source == "mine"
        assert none.images == () and len(questions[1:3]) == 2
        assert questions[1:3][0] == chosen and questions[-1] == none
        with pytest.raises(ValueError, match="2 images"):
            both.open_image()

    def test_bad_lines_have_numbers(self, tmp_path):
        path = tmp_path / "mine.jsonl"
        for bad, why in (
            ("{", "line 2: no json"),
            ("[1]", "line 2: no object"),
            (
                '{"question": "x", "answers": "y"}',
                "line 2: answers must be a list of texts, not 'y'",
            ),
        ):
            path.write_text('{"question": "x"}\n' + bad)
            questions = local_questions(path)
            assert len(questions) == 1
            assert why in questions.refused[0].why
            path.write_text("\n" + bad)
            with pytest.raises(ValueError, match=f"mine.jsonl: none of 1 rows.*{why}"):
                local_questions(path)
        with pytest.raises(FileNotFoundError):
            local_questions(tmp_path / "none.jsonl")


class TestMetrics:
    @pytest.mark.parametrize(
        ("text", "normal"),
        [  # what the published script makes of these
            ("The two-door car, dont you know.", "2 door car don't you know"),
            ("none", "0"),
            ("1,000", "1000"),
            ("3.5", "3.5"),
            ("U.S.", "us"),
            ("2:50 pm", "2:50 pm"),
            ("girl's", "girl's"),
            ("yall'd've", "y'all'd've"),
            ("a/b", "b"),
            ("An apple / a pear", "apple pear"),
            (" Dogs\nand\tcats ", "dogs and cats"),
            ("", ""),
        ],
    )
    def test_normalisation(self, text, normal):
        assert normalise_vqa_answer(text) == normal

    def test_soft_accuracy_by_enumeration(self, seed):
        """min(n / 3, 1); and its mean over all sets of annotators with one left out."""
        for _ in range(200):
            answers = random.choices(
                ["dog", "Dog.", "the cat", "two", "2"], k=random.randint(1, 10)
            )
            said = random.choice(["dog", "cat", "2", "bird"])
            same = [normalise_vqa_answer(a) == said for a in answers]
            assert soft_accuracy(said, answers) == min(sum(same) / 3, 1)
            left = [min(sum(same[:i] + same[i + 1 :]) / 3, 1) for i in range(len(same))]
            assert soft_accuracy(said, answers, leave_one_out=True) == pytest.approx(
                sum(left) / len(left)
            )
        assert soft_accuracy("dog", []) == 0

    def test_exact_match(self):
        assert exact_match("The Eiffel Tower.", ["eiffel tower"])
        assert not exact_match("Eiffel Tower in Paris", ["eiffel tower"])

    @pytest.mark.parametrize(
        ("said", "choice"),
        [
            ("B", 1),
            ("(C)", 2),
            ("The answer is (A), not (B)", 1),
            ("I think that it is B .", 1),
            ("C.", 2),
            ("a dog", 1),
            ("I would say that this shows a bird, surely", 2),
            ("no idea", None),
            ("", None),
        ],
    )
    def test_choices(self, said, choice):
        assert parse_choice(said, ["a cat", "a dog", "a bird"]) == choice


def test_the_rows_are_of_every_kind():
    kinds = Counter(path.stem for path in DATA.glob("*.csv"))
    assert set(kinds) == {"okvqa", "multimodal_known", "multimodal_movies"}
