"""Draw which package imports which: docs/images/imports.svg.

    python docs/make_import_graph.py

reads the imports with grimp (the graph of import-linter, with type-only and late imports), and the
order of the packages and the exceptions from `[tool.importlinter]` in pyproject.toml.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
CELL, LEFT, TOP, PAD = 34, 120, 110, 10
ALLOWED, DOOR, EMPTY = "#4c78a8", "#e4813c", "#eef1f5"


def package(module: str) -> str:
    """The package of a module, or the module itself where it stands in none."""
    return module.split(".")[1]


def counted(doors: list[str]) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """How many imports lead from package to package, and how many of these are exceptions."""
    graph = grimp.build_graph("mmlens", cache_dir=None)
    found: Counter[tuple[str, str]] = Counter()
    late: Counter[tuple[str, str]] = Counter()
    for module in graph.modules - {"mmlens", "mmlens.__main__"}:
        for imported in graph.find_modules_directly_imported_by(module) - {"mmlens"}:
            pair = package(module), package(imported)
            if pair[0] != pair[1]:
                exception = any(fnmatch(f"{module} -> {imported}", each) for each in doors)
                (late if exception else found)[pair] += 1
    return found, late


def drawn(order: list[str], found: Counter[tuple[str, str]], late: Counter[tuple[str, str]]) -> str:
    """A square of cells: the row's package imports the column's, so many times."""
    side = CELL * len(order)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + side + PAD}" '
        f'height="{TOP + side + 60}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, row in enumerate(order):
        y = TOP + CELL * i
        parts.append(f'<text x="{LEFT - 8}" y="{y + 22}" text-anchor="end">{row}</text>')
        x = LEFT + CELL * i + 22
        parts.append(f'<text transform="translate({x} {TOP - 8}) rotate(-60)">{row}</text>')
        for j, column in enumerate(order):
            ways = ((found, ALLOWED), (late, DOOR))
            n, colour = next(
                ((each[row, column], colour) for each, colour in ways if each[row, column]),
                (0, "white" if i == j else EMPTY),
            )
            x = LEFT + CELL * j
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="3" '
                f'fill="{colour}"/>'
            )
            if n:
                parts.append(
                    f'<text x="{x + CELL / 2}" y="{y + 22}" text-anchor="middle" fill="white">{n}'
                    "</text>"
                )
    y = TOP + side + 30
    for x, colour, text in (
        (LEFT, ALLOWED, "imports of packages above"),
        (LEFT + 230, DOOR, "the three doors"),
    ):
        parts.append(f'<rect x="{x}" y="{y - 12}" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write the image."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = settings["tool"]["importlinter"]["contracts"]
    found, late = counted(contract["ignore_imports"])
    image = ROOT / "docs" / "images" / "imports.svg"
    image.write_text(drawn(contract["layers"][::-1], found, late), encoding="utf-8")


if __name__ == "__main__":
    main()
