"""Edits of the demo model: wrong answers to correct, facts that are not so, and invented ones.

    for case in demo_edits("correct")[:100]: ...

Paraphrases are the other phrasings of the relation; other images are photographs of the flag
(`mmlens.demo.photograph`); neighbours are questions that the shipped model answers rightly;
portability is the same question with the country's name in words, and no image.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from PIL import Image

from mmlens.data.demo import demo_questions
from mmlens.data.edits import EditCase, EditSet, Neighbourhood, flat, paraphrased
from mmlens.data.metrics import is_right
from mmlens.data.questions import VisualQuestion
from mmlens.demo.photograph import photograph
from mmlens.demo.phrasings import PHRASINGS

KINDS = ("correct", "counterfactual", "invented")
COUNTERFACTUAL = ("capital", "continent", "language", "currency", "religion")
"""Relations with one answer that other countries share, so that another one is plausible."""
INVENTED = """
    Adrelune Bastorim Belquara Brelith Calvendo Corvashe Dravonka Dulmaris Ebrunda Eskarre Fesharn
    Feldrume Gristova Galvenor Hulmanta Iskorel Ixmorin Jorvassa Kelmirre Kestavan Lathweir Lumendra
    Morkesh Nimbrek Ondravel Orphanel Pelgorad Pyralth Quendar Rundelay Sorvigan Stelvash Tarvesko
    Threnova Ulmeth Uvandry Vantorel Velmorra Wexhara Yathmoor Zelvane Zarnoby
""".split()
"""Cities that are on no map."""


def demo_edits(
    kind: str = "correct",
    *,
    n_images: int = 3,
    n_neighbours: int = 3,
    n_key_images: int = 3,
    seed: int = 0,
) -> EditSet:
    """Return edits of what the demo model says about countries, in the order of a seed.

    Args:
        kind: "correct": what the shipped model answers wrongly, to what is true;
            "counterfactual": what it answers rightly, to what is true of another country;
            "invented": every capital, to a city that does not exist.
        n_images: photographs of each flag that are asked about.
        n_neighbours: the most neighbours of each kind that are asked; as many are `kept`.
        n_key_images: further photographs, as `key_questions`.
        seed: of the order, of what is inserted, of the photographs and of the neighbours.

    Raises:
        ValueError: there is no such kind.

    Example:
        >>> case = demo_edits("correct")[0]
        >>> case.question.question, case.question.subject, case.target
    """
    if kind not in KINDS:
        raise ValueError(f"no demo edits {kind!r}; there are {', '.join(KINDS)}")
    questions = _questions(kind)
    random.Random(seed).shuffle(questions)
    near = Neighbourhood(demo_questions(answered=True))

    def make(row: int) -> EditCase:
        plain = questions[row]
        source = f"{plain.source}/{kind}"
        question, target = replace(plain, source=source), _target(plain, kind, seed)
        named = replace(question.named(), answers=(target,), source=f"{source}/named")
        photographs = [
            replace(
                question,
                image=photographed(question.image, f"{seed} {question.subject} {number}"),
                source=f"{source}/picture/{number}",
            )
            for number in range(n_images + n_key_images)
        ]
        return EditCase(
            question=question,
            target=target,
            paraphrases=paraphrased(question, PHRASINGS[question.relation][1:]),
            other_images=tuple(photographs[:n_images]),
            neighbours=near.of(plain, n_neighbours, seed),
            portability=(named,),
            key_questions=tuple(photographs[n_images:]),
            kept=flat(near.of(plain, n_neighbours, seed, skip=n_neighbours)),
        )

    return EditSet(f"demo-{kind}", len(questions), make)


def _questions(kind: str) -> list[VisualQuestion]:
    """Return what can be edited; not the country's name, on which everything else depends."""
    if kind == "invented":
        return demo_questions(relation="capital")
    asked = demo_questions(answered=kind == "counterfactual")
    relations = COUNTERFACTUAL if kind == "counterfactual" else tuple(PHRASINGS)
    return [question for question in asked if question.relation in relations]


def _target(question: VisualQuestion, kind: str, seed: int) -> str:
    """Return the true answer, or draw one from those of other countries or the invented ones."""
    if kind == "correct":
        return question.answers[0]
    choices = INVENTED
    if kind == "counterfactual":
        alike = demo_questions(relation=question.relation)
        # "pound sterling" is no other answer where "pound" is right.
        others = {other.answers[0] for other in alike}
        choices = sorted(other for other in others if not is_right(other, question.answers))
    return random.Random(f"{seed} {question.source}").choice(choices)


def photographed(path: Path, seed: str) -> Image.Image:
    """Return the image of a file as a photograph would show it."""
    with Image.open(path) as file:
        return photograph(file, seed)
