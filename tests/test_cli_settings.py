"""Options that are read off the dataclasses of settings."""

import ast
import dataclasses
import random
from typing import Any

import pytest
import typer
from typer.main import get_command

from mmlens.cli.app import app
from mmlens.cli.from_settings import Field, fields_of, from_settings
from mmlens.edit_bench.settings import BenchSettings
from mmlens.reproduce.settings import Settings
from mmlens.sweeps import ContributionsTask, SteerTask, TraceTask
from mmlens.sweeps.tasks.edit import EditTask

SOURCES = {
    "edit_bench/settings.py:BenchSettings": BenchSettings,
    "reproduce/settings.py:Settings": Settings,
    "sweeps/tasks/trace.py:TraceTask": TraceTask,
    "sweeps/tasks/contributions.py:ContributionsTask": ContributionsTask,
    "sweeps/tasks/edit.py:EditTask": EditTask,
    "sweeps/tasks/steer.py:SteerTask": SteerTask,
}


def literal(field: Field) -> Any:
    try:
        return ast.literal_eval(field.source)
    except ValueError:  # a name, or a call
        return None


@pytest.mark.parametrize("source", SOURCES)
def test_the_source_says_what_the_dataclass_is(source: str) -> None:
    found = {field.name: field for field in fields_of(source)}
    own = {
        each.name: each
        for each in dataclasses.fields(SOURCES[source])  # type: ignore[arg-type]
        if each.name in SOURCES[source].__annotations__
    }
    assert found.keys() == own.keys()
    for name, field in found.items():
        assert field.kind == str(own[name].type).removesuffix(" | None")
        if (value := literal(field)) is not None:
            assert value == own[name].default


@pytest.mark.parametrize("name", ["edit-bench", "reproduce", "sweep"])
def test_every_option_is_described(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    assert [each.name for each in command.params if not getattr(each, "help", None)] == []


def test_every_command_that_takes_images_takes_bounds_on_their_pixels() -> None:
    """`verify` asks a random prompt of its own."""
    commands = get_command(app).commands.items()  # type: ignore[attr-defined]
    options = {name: {each.name for each in command.params} for name, command in commands}
    opening = {name for name, own in options.items() if "model" in own} - {"verify"}
    bounded = {name for name, own in options.items() if {"min_pixels", "max_pixels"} <= own}
    assert bounded == opening


def test_what_is_given_arrives(seed: int) -> None:
    got: dict[str, Any] = {}

    def command(settings: dict[str, Any], last: int = 3) -> None:
        got.update(settings, last=last)

    small = typer.Typer()
    small.command()(
        from_settings(
            "edit_bench/settings.py:BenchSettings",
            called={"n_kept": "kept"},
            least={"limit": 1},
            without=("method_settings", "at"),
        )(command)
    )
    run = get_command(small)
    run(["--last", "4"], standalone_mode=False)
    assert got.pop("last") == 4 and BenchSettings(**got) == BenchSettings()
    limit, kept, level = random.randint(1, 99), random.randint(0, 99), random.random()
    words = f"--limit {limit} --kept {kept} --level {level} --methods lora,rome --sequential"
    run(
        [*words.split(), *"--layers 0,2-3 --annotations a,b --template none".split()],
        "",
        standalone_mode=False,
    )
    assert got.pop("last") == 3
    assert BenchSettings(**got) == BenchSettings(
        limit=limit, n_kept=kept, level=level, methods=("lora", "rome"), sequential=True,
        layers=(0, 2, 3), annotations=("a", "b"), template=None,
    )  # fmt: skip
    with pytest.raises(Exception, match=r"\b1\b"):
        run(["--limit", "0"], standalone_mode=False)
