"""Facts to change in a model, with the questions that show what an edit has done.

    for case in demo_edits("correct"):
        case.question, case.target          # the question, and its new answer
        case.groups()                       # all questions, by their group

One `EditCase` per edit. Readers (`mmedit`, `demo_edits`) are lazy, as those of questions are.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from mmlens.data.question_sets import Rows
from mmlens.data.questions import VisualQuestion, demonstrative
from mmlens.data.reading import Refused, shown
from mmlens.data.report import Report, check_questions

EFFICACY, PARAPHRASES, OTHER_IMAGES = "efficacy", "paraphrases", "other images"
SAME_IMAGE, SAME_QUESTION = "same image", "same question"
PORTABILITY = "portability"


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
    """The same in other words, about the same image."""
    other_images: tuple[VisualQuestion, ...] = ()
    """The same question about other images of the same thing."""
    neighbours: Mapping[str, tuple[VisualQuestion, ...]] = field(default_factory=dict)
    """Questions whose answers are to stay, by how they are near: `SAME_IMAGE` (another question),
    `SAME_QUESTION` (another image), or as the data has them."""
    portability: tuple[VisualQuestion, ...] = ()
    """Questions whose answers follow from the new fact."""
    key_questions: tuple[VisualQuestion, ...] = ()
    """The same fact in other words or images, for the method to use: none of them is asked."""
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
        """Return all questions by their group, with the answers expected after the edit."""

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
        """Count and list the problems of rows and questions; see `mmlens.data.report`."""
        asked = (case.groups().values() for case in self)
        questions = (each for groups in asked for group in groups for each in group)
        return check_questions(questions, self.name, rows=self)


class Neighbourhood:
    """Questions by their images and by their words, to find those near to another one.

    Args:
        questions: which may be chosen. Their answers are to stay, so they are best known to be
            answered rightly.

    Example:
        >>> near = Neighbourhood(demo_questions(answered=True))
        >>> near.of(question, n=3)[SAME_IMAGE]
    """

    def __init__(self, questions: Iterable[VisualQuestion]) -> None:
        self.by_images: dict[tuple[str, ...], list[VisualQuestion]] = defaultdict(list)
        self.by_words: dict[str, list[VisualQuestion]] = defaultdict(list)
        for question in questions:
            if question.answers:
                self.by_images[question.image_keys()].append(question)
                self.by_words[question.prompt()].append(question)

    def of(
        self, question: VisualQuestion, n: int, seed: int = 0, skip: int = 0
    ) -> dict[str, tuple[VisualQuestion, ...]]:
        """Return up to `n` neighbours of each kind, the same for the same seed and source.

        Args:
            skip: leave out the first so many, which were taken for something else.
        """
        words, images = question.prompt(), question.image_keys()
        about = [each for each in self.by_images[images] if each.prompt() != words]
        others = [
            each
            for each in self.by_words[words]
            if each.subject not in ("", question.subject) and each.image_keys() != images
        ]
        chance = random.Random(f"{seed} {question.source}")
        return {
            kind: tuple(chance.sample(near, len(near))[skip : skip + n])
            for kind, near in ((SAME_IMAGE, about), (SAME_QUESTION, others))
        }


def edit_cases(
    questions: Sequence[VisualQuestion],
    *others: Sequence[VisualQuestion],
    n_neighbours: int = 3,
    seed: int = 0,
) -> EditSet:
    """Make edits from any questions with answers: each is to be answered with its target.

    The target is `extra["target"]` (a field "target" of a jsonl of your own), else the first
    answer: what is not known is inserted, what is answered wrongly is corrected. Paraphrases are
    the texts of `extra["paraphrases"]`. Questions without target and answers are left out.

    Args:
        questions: of any reader.
        others: the same questions with other images of the same things.
        n_neighbours: how many of each kind are chosen among `questions`.
        seed: of that choice.

    Raises:
        ValueError: one of `others` has another number of questions.

    Example:
        >>> islands = encyclopedic_vqa("test.csv", "images", seed=0)    # insertions, as the paper
        >>> edit_cases(islands, encyclopedic_vqa("test.csv", "images", seed=1))
    """
    if any(len(other) != len(questions) for other in others):
        sizes = ", ".join(str(len(each)) for each in (questions, *others))
        raise ValueError(f"the same questions with other images are as many; these are {sizes}")
    index_of, refused = _requests(questions)
    near = cache(lambda: Neighbourhood(questions))

    def make(number: int) -> EditCase:
        index = index_of[number]
        question = questions[index]
        imaged = {each.image_keys(): each for each in (other[index] for other in others)}
        imaged.pop(question.image_keys(), None)
        return EditCase(
            question=question,
            target=question.extra.get("target") or question.answers[0],
            paraphrases=paraphrased(question, question.extra.get("paraphrases", ())),
            other_images=tuple(imaged.values()),
            neighbours=near().of(question, n_neighbours, seed),
            kept=flat(near().of(question, n_neighbours, seed, skip=n_neighbours)),
        )

    name, parts = getattr(questions, "name", "edits"), getattr(questions, "parts", ())
    return EditSet(name, list(index_of), make, refused, parts)


def _requests(questions: Sequence[VisualQuestion]) -> tuple[dict[int, int], list[Refused]]:
    """Return the questions to edit, by their number in the data set, and those that cannot be."""
    numbers = getattr(questions, "numbers", range(len(questions)))
    refused = [*getattr(questions, "refused", ())]
    index_of = {}
    for index, (number, question) in enumerate(zip(numbers, questions, strict=True)):
        target, paraphrases = question.extra.get("target"), question.extra.get("paraphrases", ())
        if target is None and not question.answers:
            continue
        why = ""
        if not isinstance(target or "", str) or not (target or question.answers):
            why = f"target must be a text, not {shown(target)}"
        if isinstance(paraphrases, str) or not all(isinstance(each, str) for each in paraphrases):
            why = f"paraphrases must be a list of texts, not {shown(paraphrases)}"
        if why:
            refused.append(Refused(number, question.source, why))
        else:
            index_of[number] = index
    return index_of, sorted(refused, key=lambda each: each.row)


def flat(groups: Mapping[str, tuple[VisualQuestion, ...]]) -> tuple[VisualQuestion, ...]:
    """Return all neighbours, of either kind."""
    return tuple(each for group in groups.values() for each in group)


def paraphrased(question: VisualQuestion, texts: Iterable[str]) -> tuple[VisualQuestion, ...]:
    """Return the question in other words."""
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
    """Return the constraint if it is in the text, else the first "this ..." of it, else nothing."""
    from mmlens.inputs.spans import SpanNotFoundError, find_span

    try:
        find_span(text, constraint)
    except SpanNotFoundError:
        return demonstrative(text)
    return constraint
