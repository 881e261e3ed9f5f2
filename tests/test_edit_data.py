"""Edit cases: readers on files as the data sets have them, and the demo's own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmlens.data import VisualQuestion, demo_edits, edit_cases, encyclopedic_vqa, is_right, mmedit
from mmlens.data.edits import SAME_IMAGE, SAME_QUESTION, Neighbourhood, constraint_in
from mmlens.demo.photograph import photograph
from mmlens.demo.phrasings import PHRASINGS

# As in MMEdit's vqa_eval.json (zjunlp/EasyEdit, easyeditor/dataset/vqa.py).
RECORD = {
    "src": "What sport is this man playing?",
    "pred": "soccer",
    "rephrase": "Which sport does this man play?",
    "alt": "tennis",
    "image": "val2014/one.jpg",
    "image_rephrase": "val2014_image_rephrase/one.png",
    "loc": "nq question: who wrote the song",
    "loc_ans": "Nobody",
    "m_loc": "val2014/other.jpg",
    "m_loc_q": "What breed is the dog?",
    "m_loc_a": "poodle",
}
# What VLKEB adds (VLKEB/VLKEB, easyeditor/dataset/coco_caption.py).
PORTABILITY = [
    {"port_type": "1-hop", "Q&A": {"Question": "Where is this sport from?", "Answer": "France"}},
    {
        "port_type": "2-hop",
        "Q&A": {"Question": "What language is spoken there?", "Answer": "French"},
    },
]


def test_the_same_pixels_are_the_same_image(seed):
    """Whichever object holds them: a reader opens an image anew for each of its questions."""
    noise = np.random.default_rng(seed).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    words = ("What is this?", "Where is this?")
    shown = [
        VisualQuestion(text, Image.fromarray(pixels), answers=("x",), subject=str(index))
        for index, pixels in enumerate(noise)
        for text in words
    ]
    near = Neighbourhood(shown).of(shown[0], n=4)
    assert near[SAME_IMAGE] == (shown[1],)
    assert near[SAME_QUESTION] == (shown[2],)
    assert shown[0].image_keys() == replace(shown[0], image=noise[0]).image_keys()


def test_a_record_of_mmedit(tmp_path):
    path = tmp_path / "vqa_eval.json"
    path.write_text(json.dumps([RECORD, {**RECORD, "alt": ""}, {**RECORD, "alt": ["a", "b"]}]))
    cases = mmedit(path, tmp_path / "coco", rephrased_images=tmp_path / "drawn")
    assert len(cases) == 2 and cases[1].target == "a"  # empty targets are left out
    case = cases[0]
    assert (case.target, case.truth, case.question.extra) == ("tennis", None, {"pred": "soccer"})
    assert case.question.question == RECORD["src"]
    assert case.question.visual_constraint == "this man"
    assert case.question.image == tmp_path / "coco" / "val2014" / "one.jpg"
    groups = case.groups()
    assert list(groups) == ["efficacy", "paraphrases", "other images", "text", "unrelated image"]
    assert groups["paraphrases"][0].question == RECORD["rephrase"]
    assert groups["paraphrases"][0].visual_constraint == "this man"
    assert groups["other images"][0].image == tmp_path / "drawn" / RECORD["image_rephrase"]
    for name in ("efficacy", "paraphrases", "other images"):
        assert groups[name][0].answers == ("tennis",)
    assert groups["text"][0].images == () and groups["text"][0].answers == ("Nobody",)
    other = groups["unrelated image"][0]
    assert (other.question, other.answers) == ("What breed is the dog?", ("poodle",))
    assert other.image == tmp_path / "coco" / "val2014" / "other.jpg"
    assert cases.report().counts["image", "missing"] == 2 * 4


def test_vlkeb_by_the_line_adds_portability(tmp_path):
    path = tmp_path / "eval_multihop.jsonl"
    lines = [{**RECORD, "port_new": PORTABILITY}, RECORD, {"src": "?", "alt": "x", "image": "y"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    cases = mmedit(path, tmp_path)
    asked = cases[0].groups()["portability"]
    assert [each.question for each in asked] == [each["Q&A"]["Question"] for each in PORTABILITY]
    assert [each.answers for each in asked] == [("France",), ("French",)]
    assert all(each.image == cases[0].question.image for each in asked)
    assert list(cases[2].groups()) == ["efficacy"]
    assert len({each.source for case in cases for g in case.groups().values() for each in g}) == 13


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "none of 1 rows can be used; the first: line 1: no json"),
        ("[{]", "no json"),
        ('[{"src": "?", "alt": "x"}]', "record 0: lacks image"),
        ("[1]", "record 0: must be an object, not 1"),
    ],
)
def test_files_of_something_else(tmp_path, content, message):
    path = tmp_path / "vqa_eval.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        mmedit(path, tmp_path)


def questions_of(n_things, words=("Who built this house?", "How old is this house?"), **changes):
    return [
        VisualQuestion(
            text,
            f"{thing}.jpg",
            visual_constraint="this house",
            answers=(f"answer {thing} {number}",),
            subject=f"house {thing}",
            source=f"test/{thing}/{number}",
            **changes,
        )
        for thing in range(n_things)
        for number, text in enumerate(words)
    ]


def test_neighbours_share_the_image_or_the_words(seed):
    questions = questions_of(6)
    near = Neighbourhood(questions)
    found = near.of(questions[0], 3, seed)
    assert found == near.of(questions[0], 3, seed)
    assert found[SAME_IMAGE] == (questions[1],)
    assert len(found[SAME_QUESTION]) == 3
    assert all(each.question == questions[0].question for each in found[SAME_QUESTION])
    assert all(each.subject != "house 0" for each in found[SAME_QUESTION])
    rest = near.of(questions[0], 3, seed, skip=3)[SAME_QUESTION]
    assert len(rest) == 2 and not set(map(str, rest)) & set(map(str, found[SAME_QUESTION]))


def test_questions_of_any_reader_become_edits(seed):
    questions = questions_of(5)
    extra = {"target": "Adam", "paraphrases": ["This house, who built it?", "Its builder is"]}
    questions[0] = questions_of(1, extra=extra)[0]
    questions[3] = questions_of(1, ("Who is it?",))[0].__class__("Who is it?", "x.jpg")
    others = [*questions_of(5)]
    others[0] = questions_of(1)[0].__class__("Who built this house?", "elsewhere.jpg")
    cases = edit_cases(questions, others, seed=seed)
    assert len(cases) == 9  # one has neither answer nor target
    case = cases[0]
    assert (case.target, case.truth) == ("Adam", "answer 0 0")
    assert [each.visual_constraint for each in case.paraphrases] == ["this house", ""]
    assert case.other_images[0].image == "elsewhere.jpg"
    assert cases[1].target == "answer 0 1" and cases[1].other_images == ()  # the same image
    asked = {each.source for group in case.neighbours.values() for each in group}
    assert asked and not asked & {each.source for each in case.kept}
    with pytest.raises(ValueError, match="10, 3"):
        edit_cases(questions, others[:3])


def test_insertions_from_encyclopedic_vqa(tmp_path):
    path = tmp_path / "test.csv"
    ids = "|".join(("abc1", "abd2", "abe3", "abf4"))
    path.write_text(
        "question,answer,dataset_name,dataset_image_ids,question_original,question_type,"
        "wikipedia_title,encyclopedic_vqa_split\n"
        f"In which country is this island located?,Peru|the Peru,landmarks,{ids},"
        "In which country is Foo located?,templated,Foo,test\n"
    )
    seen = [encyclopedic_vqa(path, tmp_path, seed=n) for n in range(8)]
    cases = edit_cases(*seen)
    assert (cases[0].target, cases[0].question.visual_constraint) == ("Peru", "this island")
    pictures = {str(each.image) for each in cases[0].other_images}
    assert pictures and str(cases[0].question.image) not in pictures


def test_constraints_are_found_again_or_guessed():
    assert constraint_in("Is this man tall?", "this man") == "this man"
    assert constraint_in("Is that man tall?", "this man") == "that man"
    assert constraint_in("Is he tall?", "this man") == ""
    assert constraint_in("Is he tall?") == ""


@pytest.mark.parametrize("kind", ["correct", "counterfactual", "invented"])
def test_demo_edits_are_enough_and_complete(seed, kind):
    cases = demo_edits(kind, seed=seed)
    assert len(cases) >= 100
    assert len({cases[row].source for row in (0, 50, 99)}) == 3
    for case in cases[:4]:
        truth = case.question.answers
        assert is_right(case.target, truth) == (kind == "correct")
        relation = case.question.relation
        assert {each.question for each in case.paraphrases} == set(PHRASINGS[relation][1:])
        groups = case.groups()
        assert len(groups["paraphrases"]) >= 2 and len(groups["other images"]) == 3
        assert len(groups[SAME_QUESTION]) == 3
        for each in case.neighbours[SAME_QUESTION]:
            assert each.question == case.question.question
            assert each.subject != case.question.subject and each.extra["answered"]
        for each in case.neighbours[SAME_IMAGE]:
            assert each.image == case.question.image
            assert each.relation != relation and each.extra["answered"]
        told = groups["portability"][0]
        assert told.images == () and case.question.subject.lower() in told.question.lower()
        asked = {each.source for group in groups.values() for each in group}
        assert not asked & {each.source for each in (*case.kept, *case.key_questions)}
        shown = [np.asarray(q.image) for q in (*case.other_images, *case.key_questions)]
        assert len({each.tobytes() for each in shown}) == len(shown) == 6
        for question in (question for group in groups.values() for question in group):
            assert question.spans().keys() >= {"constraint"}
    again = demo_edits(kind, seed=seed)[50]
    assert again.target == cases[50].target and again.source == cases[50].source
    with pytest.raises(ValueError, match="correct, counterfactual, invented"):
        demo_edits("wrong")


def test_photographs_follow_from_their_seed(seed):
    flag = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8))
    one, same, other = photograph(flag, seed), photograph(flag, seed), photograph(flag, seed + 1)
    assert one.size == flag.size and one.mode == "RGB"
    assert one.tobytes() == same.tobytes()
    assert other.tobytes() not in (one.tobytes(), flag.tobytes())
