"""Options of a command, read off the dataclass of its settings: name, type, default and help.

The help is the string below a field. The source is read and not imported, so that `mmlens --help`
does not take the seconds that torch takes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from inspect import Parameter, Signature, cleandoc, signature
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Annotated, Any

import typer

from mmlens.cli import options

PACKAGE = Path(__file__).parents[1]
PLAIN = {"str": str, "int": int, "float": float, "bool": bool}
READERS: dict[str, Callable[[str, str], Any]] = {
    "tuple[str, ...]": options.comma_list,
    "tuple[int, ...]": options.numbers,
    "tuple[float, ...]": options.scales,
    "tuple[str, str]": options.two_files,
    "tuple[tuple[str, str], ...]": options.pair_list,
}
"""What makes a field of the text and the name of an option."""
DECLARED: dict[str, Any] = {
    "model": options.Model,
    "template": options.Template,
    "min_pixels": options.MinPixels,
    "max_pixels": options.MaxPixels,
}
"""Types of options that are the same in every command."""
BY_NAME: dict[str, Callable[[str, str], Any]] = {
    "layers": lambda text, _: tuple(options.layer_list(text) or ()),
    "template": lambda text, _: options.template_of(text),
}


@dataclass(frozen=True)
class Field:
    """A field of a dataclass, as its source has it."""

    name: str
    kind: str
    """Its type, without `| None`."""
    source: ast.expr
    """Its default."""
    help: str

    @property
    def default(self) -> Any:
        """The default as the command line shows it; None for an empty tuple."""
        value = ast.literal_eval(self.source)
        return ",".join(map(str, value)) or None if isinstance(value, tuple) else value

    def read(self, value: Any, option: str) -> Any:
        """Return the field's value for what was given on the command line."""
        reader = BY_NAME.get(self.name) or READERS.get(self.kind)
        return value if reader is None else reader(value, f"--{option.replace('_', '-')}")


def fields_of(source: str) -> Iterator[Field]:
    """Yield the fields of a dataclass like "edit_bench/settings.py:BenchSettings"."""
    file, _, name = source.partition(":")
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    (body,) = (x.body for x in tree.body if isinstance(x, ast.ClassDef) and x.name == name)
    for statement, below in pairwise([*body, ast.Pass()]):
        if not isinstance(statement, ast.AnnAssign) or statement.value is None:
            continue
        kind = ast.unparse(statement.annotation).removesuffix(" | None")
        if not kind.startswith("ClassVar"):
            help = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
            yield Field(ast.unparse(statement.target), kind, statement.value, cleandoc(help))


def from_settings(
    *sources: str,
    called: Mapping[str, str] | None = None,
    declared: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    least: Mapping[str, int] | None = None,
    without: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field, in the place of its parameter `settings`.

    That parameter gets the fields that have a value, by their names. Where there are several
    dataclasses, one per task, options have no default, and their help begins with the task.

    Args:
        sources: the dataclasses, see `fields_of`.
        called: names of options that are not their field's.
        declared: types of options that are written by hand.
        defaults: those that are not the field's.
        least: the smallest number that an option takes.
        without: fields that get no option.
    """
    called, defaults, least = called or {}, defaults or {}, least or {}
    declared = DECLARED | dict(declared or {})
    fields: dict[str, Field] = {}
    parameters = []
    for source in sources:
        task = f"{PurePath(source.partition(':')[0]).stem}: " if len(sources) > 1 else ""
        for field in fields_of(source):
            option = called.get(field.name, field.name)
            if field.name in without or option in fields:
                continue
            fields[option] = field
            default = defaults.get(field.name)
            if not task and field.name not in defaults:
                default = field.default
            kind = PLAIN.get(field.kind, str)
            help = typer.Option(help=task + field.help, min=least.get(field.name))
            annotation = declared.get(field.name, Annotated[kind | None, help])
            parameters.append(
                Parameter(option, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
    return partial(with_options, fields=fields, parameters=parameters)


def with_options(
    command: Callable[..., None], fields: Mapping[str, Field], parameters: Sequence[Parameter]
) -> Callable[..., None]:
    """Return the command with these parameters instead of `settings`."""

    @wraps(command)
    def run(**given: Any) -> None:
        values = {option: given.pop(option) for option in fields}
        settings = {
            fields[option].name: fields[option].read(value, option)
            for option, value in values.items()
            if value is not None
        }
        command(settings=settings, **given)

    every: list[Parameter] = []
    for own in signature(command, eval_str=True).parameters.values():
        is_settings = own.name == "settings"
        every += parameters if is_settings else [own.replace(kind=Parameter.KEYWORD_ONLY)]
    run.__signature__ = Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in every}
    return run
