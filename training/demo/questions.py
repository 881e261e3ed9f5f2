"""Write `mmlens/demo/questions.csv`: every relation that is scored, about every country.

    python training/demo/questions.py

`evaluate.py --update` then fills in what the language model (`told`) and the demo model
(`answered`) get right.
"""

import csv
from pathlib import Path

from countries import Country, read_countries
from relations import NAMING, PHRASINGS

FILE = Path(__file__).parents[2] / "mmlens" / "demo" / "questions.csv"
VISUAL_CONSTRAINT = "this country"
DIRECTIONS = ("north", "south", "east", "west")
COLUMNS = [
    "id",
    "question",
    "visual_constraint",
    "text_constraint",
    "subject",
    "main_entity",
    "image_url",
    "answers",
    "relation",
    "split",
    "told",
    "answered",
]


def answers_of(country: Country, relation: str) -> tuple[str, ...]:
    """What counts as right; empty where there is no such fact (an island has no neighbours)."""
    if relation == "name":
        return (country.name, *country.aliases)
    if relation in DIRECTIONS:
        # the questions ask for countries: no seas, no regions
        names = {other.name for other in read_countries()}
        return tuple(place for place in getattr(country, relation) if place in names)
    found: tuple[str, ...] = getattr(country, relation)
    return found


def rows() -> list[dict[str, str]]:
    """All questions, relation by relation."""
    texts = {"name": NAMING[0], **{name: group[0] for name, group in PHRASINGS.items()}}
    found = []
    for relation, text in texts.items():
        for country in read_countries():
            answers = answers_of(country, relation)
            if not answers:
                continue
            found.append(
                {
                    "id": f"{country.code}/{relation}",
                    "question": text,
                    "visual_constraint": VISUAL_CONSTRAINT,
                    "text_constraint": relation if relation in DIRECTIONS else "",
                    "subject": country.name,
                    "main_entity": f"flag of {country.name}",
                    "image_url": f"flags/{country.code.lower()}.png",
                    "answers": "|".join(answers),
                    "relation": relation,
                    "split": country.split,
                    "told": "",
                    "answered": "",
                }
            )
    return found


def write(found: list[dict[str, str]]) -> None:
    """Write the file."""
    with FILE.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    write(rows())
