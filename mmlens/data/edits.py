"""Facts to change in a model, with what is asked to see what an edit has done.

    for case in mmedit("editing-data/vqa/vqa_eval.json", "editing-data"):
        case.question, case.target          # what is to be answered with what
        case.groups()                       # everything that is asked, by what it tells

One `EditCase` per edit. Readers are lazy, as those of questions are.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.data.questions import Rows, VisualQuestion, demonstrative

if TYPE_CHECKING:
    from mmlens.data.report import Report

__all__ = [
    "EFFICACY",
    "OTHER_IMAGES",
    "PARAPHRASES",
    "PORTABILITY",
    "SAME_IMAGE",
    "SAME_QUESTION",
    "EditCase",
    "EditSet",
    "Neighbourhood",
    "edit_cases",
    "mmedit",
]

EFFICACY, PARAPHRASES, OTHER_IMAGES = "efficacy", "paraphrases", "other images"
SAME_IMAGE, SAME_QUESTION = "same image", "same question"
PORTABILITY = "portability"
FIELDS = {"src", "alt", "image"}
"""Of MMEdit's records, those without which there is no edit."""


@dataclass(frozen=True)
class EditCase:
    """One fact to change: a question, the answer it is to get, and what else is asked.

    Example:
        >>> request = EditRequest(model.prepare(case.question.prompt(), case.question.open_images(),
        ...                                     spans=case.question.spans()), case.target)
    """

    question: VisualQuestion
    """With the true answers, where they are known."""
    target: str
    """The new answer."""
    paraphrases: tuple[VisualQuestion, ...] = ()
    """The same in other words, about the same picture."""
    other_images: tuple[VisualQuestion, ...] = ()
    """The same question about other pictures of the same thing."""
    neighbours: Mapping[str, tuple[VisualQuestion, ...]] = field(default_factory=dict)
    """Questions whose answers are to stay, by how they are near: `SAME_IMAGE` (another question),
    `SAME_QUESTION` (another picture), or as the data has them."""
    portability: tuple[VisualQuestion, ...] = ()
    """Questions whose answers follow from the new fact."""
    key_questions: tuple[VisualQuestion, ...] = ()
    """The same fact in other words or pictures, for the method to use: none of them is asked."""
    kept: tuple[VisualQuestion, ...] = ()
    """Neighbours for the method to preserve: none of them is asked."""

    @property
    def truth(self) -> str | None:
        """The true answer, where it is known."""
        return self.question.answers[0] if self.question.answers else None

    @property
    def source(self) -> str:
        """Data set and row of the question."""
        return self.question.source

    @property
    def cluster(self) -> str:
        """What the edit is about: edits of one thing are resampled together."""
        return self.question.subject or self.source

    def groups(self) -> dict[str, tuple[VisualQuestion, ...]]:
        """Everything that is asked, with the answers that are expected after the edit."""

        def wanted(questions: Iterable[VisualQuestion]) -> tuple[VisualQuestion, ...]:
            return tuple(
                replace(question, answers=(self.target,), choice="") for question in questions
            )

        groups = {
            EFFICACY: wanted([self.question]),
            PARAPHRASES: wanted(self.paraphrases),
            OTHER_IMAGES: wanted(self.other_images),
            **self.neighbours,
            PORTABILITY: self.portability,
        }
        return {name: questions for name, questions in groups.items() if questions}


class EditSet(Rows[EditCase]):
    """The edits of a data set, made when they are asked for."""

    def report(self) -> Report:
        """What is not as it should be in any of the questions; see `mmlens.data.report`."""
        from mmlens.data.report import check_questions

        asked = (case.groups().values() for case in self)
        return check_questions((each for groups in asked for g in groups for each in g), self.name)


class Neighbourhood:
    """Questions by their pictures and by their words, to find those near to another one.

    Args:
        questions: which may be chosen. Their answers are to stay, so they are best known to be
            answered rightly.

    Example:
        >>> near = Neighbourhood(demo_questions(answered=True))
        >>> near.of(question, n=3)[SAME_IMAGE]
    """

    def __init__(self, questions: Iterable[VisualQuestion]) -> None:
        self.by_images: dict[Hashable, list[VisualQuestion]] = defaultdict(list)
        self.by_words: dict[str, list[VisualQuestion]] = defaultdict(list)
        for question in questions:
            if question.answers:
                self.by_images[pictures_of(question)].append(question)
                self.by_words[question.prompt()].append(question)

    def of(
        self, question: VisualQuestion, n: int, seed: int = 0, skip: int = 0
    ) -> dict[str, tuple[VisualQuestion, ...]]:
        """Up to `n` neighbours of each kind, the same for the same seed and source.

        Args:
            skip: leave out the first so many, which were taken for something else.
        """
        words, pictures = question.prompt(), pictures_of(question)
        about = [each for each in self.by_images[pictures] if each.prompt() != words]
        others = [
            each
            for each in self.by_words[words]
            if pictures_of(each) != pictures and each.subject not in ("", question.subject)
        ]
        chance = random.Random(f"{seed} {question.source}")
        return {
            kind: tuple(chance.sample(near, len(near))[skip : skip + n])
            for kind, near in ((SAME_IMAGE, about), (SAME_QUESTION, others))
        }


def pictures_of(question: VisualQuestion) -> Hashable:
    """What tells pictures apart without opening them."""
    return tuple(str(x) if isinstance(x, str | Path) else id(x) for x in question.images)


def edit_cases(
    questions: Sequence[VisualQuestion],
    *others: Sequence[VisualQuestion],
    n_neighbours: int = 3,
    seed: int = 0,
) -> EditSet:
    """Edits from any questions with answers: each is to be answered with its target.

    The target is `extra["target"]` (a field "target" of a jsonl of your own), else the first
    answer: what is not known is inserted, what is answered wrongly is corrected. Paraphrases are
    the texts of `extra["paraphrases"]`. Questions without target and answers are left out.

    Args:
        questions: of any reader.
        others: the same questions with other pictures of the same things.
        n_neighbours: how many of each kind are chosen among `questions`.
        seed: of that choice.

    Raises:
        ValueError: one of `others` has another number of questions.

    Example:
        >>> islands = encyclopedic_vqa("test.csv", "pictures", seed=0)    # insertions, as the paper
        >>> edit_cases(islands, encyclopedic_vqa("test.csv", "pictures", seed=1))
    """
    if any(len(other) != len(questions) for other in others):
        sizes = ", ".join(str(len(each)) for each in (questions, *others))
        raise ValueError(f"the same questions with other pictures are as many; these are {sizes}")
    rows = [row for row, each in enumerate(questions) if each.answers or "target" in each.extra]
    near = cache(lambda: Neighbourhood(questions))

    def make(index: int) -> EditCase:
        question = questions[rows[index]]
        pictured = {pictures_of(each): each for each in (other[rows[index]] for other in others)}
        pictured.pop(pictures_of(question), None)
        return EditCase(
            question=question,
            target=str(question.extra.get("target") or question.answers[0]),
            paraphrases=paraphrased(question, question.extra.get("paraphrases", ())),
            other_images=tuple(pictured.values()),
            neighbours=near().of(question, n_neighbours, seed),
            kept=flat(near().of(question, n_neighbours, seed, skip=n_neighbours)),
        )

    return EditSet(getattr(questions, "name", "edits"), len(rows), make)


def flat(groups: Mapping[str, tuple[VisualQuestion, ...]]) -> tuple[VisualQuestion, ...]:
    """All neighbours, of whichever kind."""
    return tuple(each for group in groups.values() for each in group)


def paraphrased(question: VisualQuestion, texts: Iterable[str]) -> tuple[VisualQuestion, ...]:
    """The question in other words."""
    return tuple(
        replace(
            question,
            question=text,
            visual_constraint=constraint_in(text, question.visual_constraint),
            text_constraints=(),
            source=f"{question.source}/paraphrase/{number}",
        )
        for number, text in enumerate(texts)
    )


def constraint_in(text: str, constraint: str = "") -> str:
    """The constraint if it is in the text, else the first "this ..." of it, else nothing."""
    from mmlens.spans import SpanNotFoundError, find_span

    try:
        find_span(text, constraint)
    except SpanNotFoundError:
        return demonstrative(text)
    return constraint


# MMEdit and VLKEB


def mmedit(
    path: str | Path, images: str | Path, *, rephrased_images: str | Path | None = None
) -> EditSet:
    """E-VQA of MMEdit (Cheng et al. 2023), and VLKEB (Huang et al. 2024), which has its fields.

    A record is `src` (the question), `alt` (the new answer), `image`; `rephrase` and
    `image_rephrase` (the same in other words, and in another picture); `loc`, `loc_ans` (a question
    without picture: the neighbours "text"); `m_loc`, `m_loc_q`, `m_loc_a` (a picture of something
    else and its question: "other picture"); and in VLKEB `port_new`, questions that follow from the
    new fact. `pred`, which the data gives as the answer before, goes to `extra["pred"]`: it need
    not be true. As in EasyEdit, records with an empty `alt` are left out (zjunlp/EasyEdit,
    easyeditor/dataset/vqa.py; VLKEB/VLKEB, easyeditor/dataset/coco_caption.py).

    The files name no visual constraint: it is the first "this ..." of a question, or nothing.

    Args:
        path: `vqa_train.json`, `vqa_eval.json`, `eval.json`, `eval_multihop.json`; or the same
            records one per line.
        images: the folder that `image` and `m_loc` are relative to.
        rephrased_images: that of `image_rephrase`, if it is another one.

    Raises:
        ValueError: no list of objects, or a record without its fields; the message has its number.
    """
    path = Path(path)
    records = [each for each in _records(path) if first(each["alt"])]
    root = Path(images)
    rephrased = root if rephrased_images is None else Path(rephrased_images)

    def make(row: int) -> EditCase:
        return _mmedit_case(records[row], f"{path.stem}/{row}", root, rephrased)

    return EditSet(path.stem, len(records), make)


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a json list, or of lines."""
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text)
        else:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a json list nor lines of json: {error}") from error
    for number, record in enumerate(found):
        missing = FIELDS - set(record) if isinstance(record, dict) else FIELDS
        if missing:
            raise ValueError(f"{path}, record {number}: lacks {', '.join(sorted(missing))}")
    return found


def _mmedit_case(record: dict[str, Any], source: str, root: Path, rephrased: Path) -> EditCase:
    target = first(record["alt"])
    image = root / record["image"]

    def asked(kind: str, text: str, picture: Path | None, *answers: str) -> VisualQuestion:
        return VisualQuestion(
            question=text,
            image=picture,
            visual_constraint=demonstrative(text) if picture else "",
            answers=answers,
            source=f"{source}/{kind}" if kind else source,
        )

    question = replace(asked("", record["src"], image), extra={"pred": record.get("pred")})
    neighbours = {}
    if record.get("loc"):
        text, answer = first(record["loc"]), first(record["loc_ans"])
        neighbours["text"] = (asked("text", text, None, answer),)
    if record.get("m_loc"):
        text, answer = first(record["m_loc_q"]), first(record["m_loc_a"])
        neighbours["other picture"] = (asked("other", text, root / record["m_loc"], answer),)
    other = record.get("image_rephrase")
    following = [each["Q&A"] for each in record.get("port_new", ())]
    return EditCase(
        question=question,
        target=target,
        paraphrases=paraphrased(question, every(record.get("rephrase"))),
        other_images=(asked("picture", record["src"], rephrased / other),) if other else (),
        neighbours=neighbours,
        portability=tuple(
            asked(f"portability/{number}", each["Question"], image, first(each["Answer"]))
            for number, each in enumerate(following)
        ),
    )


def every(value: Any) -> list[str]:
    """A text or a list of texts, as a list; nothing where there is none."""
    return [str(each) for each in (value if isinstance(value, list) else [value]) if each]


def first(value: Any) -> str:
    """The text, or the first of several; empty where there is none."""
    return next(iter(every(value)), "")
