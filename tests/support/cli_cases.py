"""Every command that writes, on a checkpoint and questions that are full of escape sequences."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sweep_cases import write_image
from test_terminal import MARK, evil_in
from tiny_checkpoint import WORDS, write_tiny_llava

from mmlens.cli import main

QUESTION = f"the [/x] capital {MARK} of this country is"
CONSTRAINT = "this country"


def run(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    answers = right_answers() if arguments[0] == "reproduce" else nullcontext()
    with answers, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    code = exit.value.code
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


def right_answers() -> Any:
    """Let the model say what makes questions good enough for a figure."""
    return patch(
        "mmlens.reproduce.study.answers_rightly",
        lambda _, question, *__: question.is_right("Paris") if question.answers else None,
    )


def one_line(code: int, *arguments: object) -> str:
    """Run what fails with this code, and says so in one line; return it."""
    found, _, err = run(*arguments)
    assert found == code, err
    # A sweep's log says for itself, once, that it cannot be written.
    lines = [line for line in err.splitlines() if line.startswith("mmlens: ")]
    lines = [line for line in lines if "log.txt cannot be written" not in line]
    assert len(lines) == 1 and lines == err.splitlines()[-1:], err
    assert "Traceback" not in err and not evil_in(err)
    return lines[0]


def made_place(place: Path) -> Path:
    """A checkpoint of which every answer is evil, images, and questions about them."""
    model = write_tiny_llava(place / f"model {MARK}", n_layers=2)
    words = (model / "tokenizer.json").read_text()
    for word in set(WORDS) - set("the capital of this country is Paris ? . ,".split()):
        words = words.replace(f'"{word}"', json.dumps(word + MARK))
        words = words.replace(f'"▁{word}"', json.dumps(f"▁{word}{MARK}"))
    (model / "tokenizer.json").write_text(words)
    rows = []
    for number in range(4):
        name = f"{number} {MARK}.png"
        write_image(place / name, number)
        rows.append(
            {
                "question": QUESTION,
                "image": name,
                "visual_constraint": CONSTRAINT,
                "answers": ["Paris", f"Rome{MARK}"],
                "subject": f"{MARK} {number}",
            }
        )
    (place / f"{MARK}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[0]["image"] = f"missing {MARK}.png"
    (place / "one missing.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def folder(place: Path, name: str) -> Path:
    """Where `done` lets a command write to."""
    return place / f"{name} {MARK}"


def command(place: Path, name: str, out: Path) -> list[object]:
    """A command that writes to a folder."""
    model = ("--model", place / f"model {MARK}")
    asked = (place / f"1 {MARK}.png", QUESTION, "--constraint", CONSTRAINT, *model)
    data = (*model, "--data", place / f"{MARK}.jsonl")
    one_step = ("--set", "fine_tune.steps=1")
    options = {
        "trace": (*asked, "--sites", "mlp_out"),
        "contributions": asked,
        "knockout": (*asked, "--to", "constraint", "--layers", "1"),
        "edit": (*asked, "--target", f"Rome{MARK}", "--method", "fine_tune", *one_step),
        "report": (folder(place, "trace"),),
        "sweep": (
            *("trace", *model, "--data", place / "one missing.jsonl"),
            *("--sites", "mlp_out", "--windows", "1"),
        ),
        "summarize": (folder(place, "sweep"), "--samples", "10"),
        "edit-bench": (*data, "--methods", "fine_tune", *one_step, "--limit", "1"),
        "reproduce": ("layers", *data, "--limit", "2", "--minimum-gap", "-1"),
    }[name]
    return [name, *options, "--out", out / "page.html" if name == "report" else out]


WRITING = ("trace", "contributions", "knockout", "edit", "report", "sweep", "summarize",
           "edit-bench", "reproduce")  # fmt: skip
