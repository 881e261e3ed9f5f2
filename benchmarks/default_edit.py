"""What `multedit(model, inputs, target)` does on the demo, on what it was never told or tuned on.

    python benchmarks/default_edit.py [--edits 20] [--split test] [--out build/default-edit]
                                      [--set layer=20] [--subject]

References are flags of the demo's training countries. The held-out countries are split in two: what
defaults were chosen on ("dev"), and what is reported ("test"). Edits, and the flags of the same
question, are of one half. Other questions about the same image, and unrelated ones, have wordings
that no reference has. Corrections, facts of other countries and invented ones take turns. The
evaluation of an edit is one file, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from mmlens import HookedMultimodalTransformer, multedit
from mmlens.data import demo_edits, demo_questions
from mmlens.data.edits import SAME_IMAGE, SAME_QUESTION, EditCase
from mmlens.data.metrics import answer_alone
from mmlens.demo.phrasings import PHRASINGS
from mmlens.editing import EditEvaluation, EditRequest, evaluate, request_of

N_FLAGS, N_QUESTIONS, N_UNRELATED, N_PHOTOGRAPHS = 6, 6, 5, 2
WANTED = {"efficacy": 0.95, "other images": 0.90, "paraphrases": 0.85}
KEPT = {SAME_QUESTION: 0.93, SAME_IMAGE: 0.85, "unrelated": 0.95}
"""The share of answers that is wanted: right after the edit, or unchanged by it."""


def countries(split: str) -> list[str]:
    """Half of the held-out countries."""
    held_out = sorted({question.subject for question in demo_questions(split="held_out")})
    random.Random(7).shuffle(held_out)
    half = len(held_out) // 2
    return held_out[:half] if split == "dev" else held_out[half:]


def measured(case: EditCase, names: list[str]) -> EditCase:
    """The case with what is asked besides: never what a reference asks."""
    known = {(each.subject, each.relation): each for each in demo_questions(split="held_out")}
    chance = random.Random(case.source)
    own, others = case.question, [name for name in names if name != case.question.subject]

    def asked(subject: str, relation: str):
        return replace(known[subject, relation], source=f"{subject}/{relation}")

    same = [name for name in others if (name, own.relation) in known]
    flags = [asked(name, own.relation) for name in chance.sample(same, min(N_FLAGS, len(same)))]
    relations = [each for each in PHRASINGS if each != own.relation]

    def reworded(name: str, relation: str, image: object):
        """The question in words that no reference has; its answer does not matter."""
        words = chance.choice(PHRASINGS[relation][1:])
        like = next(each for each in known.values() if each.relation == relation)
        phrase = "this country" if "this country" in words else "This country"
        return replace(
            like,
            question=words,
            image=image,
            visual_constraint=phrase,
            text_constraints=(),
            source=f"{name}/{words}",
        )

    about = [
        reworded(own.subject, each, own.image) for each in chance.sample(relations, N_QUESTIONS)
    ]
    unrelated = []
    for name in chance.sample(others, N_UNRELATED):
        relation = chance.choice(relations)
        unrelated.append(reworded(name, relation, known[name, "name"].image))
    neighbours = {SAME_IMAGE: about, SAME_QUESTION: flags, "unrelated": unrelated}
    return replace(case, neighbours={name: tuple(each) for name, each in neighbours.items()})


def cases(split: str, n: int) -> list[EditCase]:
    """Edits of the three kinds, in turns."""
    names = countries(split)
    kinds = [
        [
            case
            for case in demo_edits(kind, n_images=N_PHOTOGRAPHS, seed=1)
            if case.question.subject in names
        ]
        for kind in ("correct", "counterfactual", "invented")
    ]
    return [measured(case, names) for case in list(chain(*zip(*kinds, strict=False)))[:n]]


def by_answer(found: EditEvaluation) -> EditEvaluation:
    """Compare answers alone: not what a base model says after them."""
    pairs = zip(found.said_before, found.said, strict=True)
    same = [answer_alone(old) == answer_alone(new) for old, new in pairs]
    return replace(found, unchanged=torch.tensor(same))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--out", type=Path, default=Path("build/default-edit"))
    parser.add_argument("--set", action="append", default=[], help="NAME=JSON")
    parser.add_argument("--subject", action="store_true", help="say what the image shows")
    given = parser.parse_args()
    pairs = [each.split("=", 1) for each in given.set]
    changes = {name: json.loads(value) for name, value in pairs}
    label = "-".join([given.split, *given.set, *(["subject"] * given.subject)]) or "default"
    folder = given.out / label.replace("/", "_").replace('"', "")
    folder.mkdir(parents=True, exist_ok=True)
    model = HookedMultimodalTransformer.from_pretrained("demo")
    costs: list[float] = []

    def edit_of(case: EditCase):
        request: EditRequest = request_of(model, case)
        if given.subject:
            request = replace(request, subject=case.question.subject)
        began = time.process_time()
        made = multedit(model, request, **changes)
        costs.append(time.process_time() - began)
        return made

    found: list[EditEvaluation] = []
    for index, case in enumerate(cases(given.split, given.edits)):
        file = folder / f"{index}.safetensors"
        if not file.is_file():
            evaluate(model, edit_of, [case]).save(file)
        found.append(EditEvaluation.load(file))
        print(f"{index + 1}: {case.source} -> {case.target}", flush=True)
    joined = by_answer(EditEvaluation.joined(found))
    table = joined.summary().set_index(["group", "measure"])
    print(f"\n{len(found)} edits, {label}; 95 % bootstrap intervals over countries")
    for wanted, measure in ((WANTED, "score"), (KEPT, "unchanged")):
        for group, aim in wanted.items():
            row = table.loc[group, measure]
            print(f"{group:15} {row['mean']:.2f} ({row['low']:.2f}-{row['high']:.2f})  aim {aim}")
    row = table.loc["portability", "score"]
    print(f"{'portability':15} {row['mean']:.2f} ({row['low']:.2f}-{row['high']:.2f})")
    if costs:
        middle = sorted(costs)[len(costs) // 2]
        print(f"median CPU seconds of the {len(costs)} edits made now: {middle:.1f}")


if __name__ == "__main__":
    main()
