"""Recompute every figure of the card from the SHIPPED weights, through mmlens's public interface.

    python training/demo/evaluate.py                          # the shipped (unseen) rendering
    python training/demo/evaluate.py --packages NPM_FOLDER    # a trained rendering as well
    python training/demo/evaluate.py --update                 # also writes `told` and `answered`
    python training/demo/evaluate.py --model demo-tuned       # the same of another variant

Three readings of the same language model (of the model's own, where that was tuned):
  told   [BOS][the caption over the visual positions][question]: what training aimed at
  named  the question with the country's name in the place of "this country", no picture
  seen   the picture and the question: the demo model
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from captions import caption_tokens
from countries import read_countries
from questions import rows, write
from relations import with_name
from renderings import Renderings, on_grey

from mmlens import HookedMultimodalTransformer
from mmlens.data import VisualQuestion, demo_questions

NEW_TOKENS = 6
BATCH = 50
NAMES = {country.name: country for country in read_countries()}
Answers = dict[str, str]


def batches(questions: list[VisualQuestion]) -> Iterator[list[VisualQuestion]]:
    """Questions of the same text, so that no batch needs padding."""
    texts = dict.fromkeys(question.question for question in questions)
    for text in texts:
        group = [question for question in questions if question.question == text]
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]


def ask(model: Any, prepare: Callable[[list[VisualQuestion]], Any], label: str) -> Answers:
    """Every question's greedy continuation, by its source."""
    answers: Answers = {}
    begun = time.time()
    for group in batches(demo_questions()):
        said = model.generate(prepare(group), max_new_tokens=NEW_TOKENS, return_type="str")
        said = [said] if isinstance(said, str) else said
        answers |= dict(zip((question.source for question in group), said, strict=True))
    print(f"{label}: {len(answers)} questions, {time.time() - begun:.0f} s", flush=True)
    return answers


def readings(
    model: Any, packages: Path | None, known: dict[str, Answers], chosen: list[str]
) -> dict[str, Answers]:
    """What is answered when told, when named, and when seeing each rendering, if not yet known."""
    captions = caption_tokens(model.tokenizer)
    row = {country.name: i for i, country in enumerate(read_countries())}

    def told(group: list[VisualQuestion]) -> Any:
        text = model.to_tokens(group[0].question).expand(len(group), -1)
        caption = captions[[row[question.subject] for question in group]]
        return model.inputs_from_tokens(torch.cat([text[:, :1], caption, text[:, 1:]], 1))

    def named(group: list[VisualQuestion]) -> Any:
        return model.prepare([with_name(q.question, q.subject) for q in group], template=None)

    def seen(group: list[VisualQuestion]) -> Any:
        return model.prepare([q.question for q in group], [q.open_image() for q in group])

    wanted = {"told": told, "named": named, "seen": seen}
    if packages is not None:
        renderings = Renderings(packages)

        def trained(group: list[VisualQuestion]) -> Any:
            codes = [NAMES[question.subject].code for question in group]
            flags = [renderings.open("svg-country-flags", code) for code in codes]
            pictures = [on_grey(flag) for flag in flags if flag is not None]
            return model.prepare([question.question for question in group], pictures)

        wanted["trained"] = trained
    return {
        label: known[label] if label in known else ask(model, prepare, label)
        for label, prepare in wanted.items()
        if label in chosen
    }


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if n == 0:
        return (0.0, 1.0)
    z, p = 1.96, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (middle - half, middle + half)


def figure(values: list[bool]) -> dict[str, Any]:
    low, high = interval(sum(values), len(values))
    return {"right": sum(values), "n": len(values), "low": round(low, 3), "high": round(high, 3)}


def figures(found: dict[str, Answers]) -> dict[str, Any]:
    """relation -> split -> figure: each reading's share, and what is seen where told is right."""
    questions = demo_questions()
    right = {
        reading: {q.source: q.is_right(said[q.source]) for q in questions}
        for reading, said in found.items()
    }
    relations = list(dict.fromkeys(q.relation for q in questions))
    results: dict[str, Any] = {}
    for relation in [*relations, "all"]:
        for split in ("train", "held_out"):
            group = [
                q.source
                for q in questions
                if q.split == split
                # the total is over facts: the name may be learnt of every country
                and (q.relation == relation or (relation == "all" and q.relation != "name"))
            ]
            told = [source for source in group if "told" in right and right["told"][source]]
            cell = {reading: figure([right[reading][s] for s in group]) for reading in right}
            for reading in set(right) - {"told", "named"}:
                cell[f"{reading} where told"] = figure([right[reading][s] for s in told])
            results.setdefault(relation, {})[split] = cell
    return results


def other_flag(found: dict[str, Answers]) -> dict[str, float]:
    """Where told is right: how often the answer given to ANOTHER country's flag would be right.

    The mean over all other flags: what a model that saw nothing would get by answering the same
    kind of thing.
    """
    shares: dict[str, float] = {}
    questions = demo_questions()
    for relation in dict.fromkeys(q.relation for q in questions):
        group = [q for q in questions if q.relation == relation]
        said = [found["seen"][q.source] for q in group]
        told = [i for i, q in enumerate(group) if q.is_right(found["told"][q.source])]
        hits = [group[i].is_right(said[j]) for i in told for j in range(len(group)) if j != i]
        shares[relation] = sum(hits) / len(hits)
    return shares


def markdown(results: dict[str, Any]) -> str:
    """The card's table."""

    def show(cell: dict[str, Any] | None) -> str:
        if cell is None or cell["n"] == 0:
            return "-"
        share = cell["right"] / cell["n"]
        return f"{share:.2f} ({cell['low']:.2f}-{cell['high']:.2f}), n={cell['n']}"

    columns = ["told", "named", "seen", "seen where told", "trained where told"]
    lines = [
        "| relation | countries | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for relation, splits in results.items():
        for split, cell in splits.items():
            cells = " | ".join(show(cell.get(column)) for column in columns)
            lines.append(f"| {relation} | {split} | {cells} |")
    return "\n".join(lines)


def update(found: dict[str, Answers]) -> None:
    """Write into `questions.csv` what the language model and the demo model got right."""
    questions = {question.source: question for question in demo_questions()}
    filled = rows()
    for row in filled:
        question = questions[f"demo/{row['id']}"]
        for column, reading in (("told", "told"), ("answered", "seen")):
            row[column] = "right" if question.is_right(found[reading][question.source]) else "wrong"
    write(filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo or demo-tuned")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--readings", default="told,named,seen,trained", help="only some of them")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--reuse", type=Path, help="take what an earlier --out file holds")
    parser.add_argument("--out", type=Path, help="write all figures and answers here, as json")
    arguments = parser.parse_args()
    if arguments.update and arguments.model != "demo":
        parser.error("--update: questions.csv records the answers of 'demo'")
    model = HookedMultimodalTransformer.from_pretrained(arguments.model)
    known = json.loads(arguments.reuse.read_text())["answers"] if arguments.reuse else {}
    with torch.no_grad():
        found = readings(model, arguments.packages, known, arguments.readings.split(","))
    results = figures(found)
    print(markdown(results))
    controls = other_flag(found) if {"told", "seen"} <= found.keys() else {}
    print(", ".join(f"{relation} {share:.2f}" for relation, share in controls.items()))
    if arguments.update:
        update(found)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"figures": results, "other flag": controls, "answers": found}, indent=1)
        )


if __name__ == "__main__":
    main()
