"""`mmlens demo`: a question about a flag, asked of the embedded model, and traced."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mmlens.cli import options, trace
from mmlens.cli.console import out as console
from mmlens.cli.console import waiting
from mmlens.cli.errors import UserError, explained

if TYPE_CHECKING:
    from mmlens.data import VisualQuestion

COUNTRY = "Italy"
RELATION = "capital"


def demo(
    country: Annotated[str, typer.Option(help="Whose flag the model sees.")] = COUNTRY,
    relation: Annotated[
        str, typer.Option(help="What it is asked: capital, language, continent, ...")
    ] = RELATION,
    window: options.Window = 1,
    out: Annotated[Path, typer.Option(help="A folder for figure and numbers.")] = Path(
        "mmlens-demo"
    ),
) -> None:
    """Ask the embedded demo model about a country's flag, and trace where the answer comes from.

    The first time, its language model is fetched (93 MB).
    """
    folder = options.writable_folder(out)
    with waiting("loading mmlens ..."):
        question = find_question(country, relation)
    model = trace.open_model("demo")
    constraint = question.visual_constraint
    with explained():
        inputs = model.prepare(question.question, question.image, spans={"constraint": constraint})
    console().print(f"[dim]image[/]   the flag of {escape(question.subject)}")
    trace.trace_prompt(
        model,
        inputs,
        question.question,
        constraint,
        "Paris",
        sites=tuple(trace.SITES.split(",")),
        window=window,
        positions=("constraint", "last"),
        folder=folder,
    )


def find_question(country: str, relation: str) -> VisualQuestion:
    """Return the demo question about a country; the error says which there are."""
    from mmlens import demo_questions

    questions = list(demo_questions())
    about = [question for question in questions if same_country(question.subject, country)]
    if not about:
        names = sorted({question.subject for question in questions})
        raise UserError(f"--country: no demo question about {country!r}; {near(country, names)}")
    for question in about:
        if question.relation == relation:
            return question
    names = sorted({question.relation for question in about})
    raise UserError(
        f"--relation: no demo question about the {relation!r} of {country}; "
        f"there are {', '.join(names)}"
    )


def same_country(name: str, other: str) -> bool:
    """Equal but for case and the article: "the Netherlands" is "netherlands"."""
    first, second = (each.casefold().strip().removeprefix("the ") for each in (name, other))
    return first == second


def near(name: str, names: list[str]) -> str:
    """The names that look most like `name`, or a few of them if none does."""
    from difflib import get_close_matches

    close = get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(names[:8])} ..."
