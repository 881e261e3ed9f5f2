"""The facts of 197 countries that the demo's questions and training prompts are made of.

`mmlens/demo/countries.csv` was written by hand for this project. Cells with several accepted values
separate them by ``|``, the usual one first. `split` says whether a country's facts may be used in
making the demo model (`train`: the phrasings were chosen on them) or only its name (`held_out`).
"""

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

FILE = Path(__file__).parents[2] / "mmlens" / "demo" / "countries.csv"


@dataclass(frozen=True)
class Country:
    """One row of `countries.csv`; a tuple holds every accepted value, or nothing where none is."""

    code: str  #: ISO 3166-1 alpha-2 (and XK)
    name: str  #: as said in a sentence: "the Netherlands"
    region: str  #: the split is stratified by it
    split: str  #: "train" or "held_out"
    aliases: tuple[str, ...]
    capital: tuple[str, ...]
    continent: tuple[str, ...]
    language: tuple[str, ...]
    currency: tuple[str, ...]
    neighbours: tuple[str, ...]
    demonym: tuple[str, ...]
    largest_city: tuple[str, ...]
    religion: tuple[str, ...]
    north: tuple[str, ...]  #: what borders it in the north: a country or a sea
    south: tuple[str, ...]
    east: tuple[str, ...]
    west: tuple[str, ...]


@cache
def read_countries() -> tuple[Country, ...]:
    """Read all countries, in the file's order."""
    single = {"code", "name", "region", "split"}
    with FILE.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))

    def value(row: dict[str, str], name: str) -> str | tuple[str, ...]:
        cell = row.get(name) or ""
        return cell if name in single else tuple(part for part in cell.split("|") if part)

    return tuple(
        Country(**{field.name: value(row, field.name) for field in fields(Country)})  # type: ignore[arg-type]
        for row in rows
    )
