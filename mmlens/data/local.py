"""Questions of your own: one json object per line, with the fields of `VisualQuestion`.

{"question": "Who built this bridge?", "image": "bridge.jpg",
 "visual_constraint": "this bridge", "answers": ["Gustave Eiffel"]}
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmlens.data.questions import QuestionSet, VisualQuestion, choose_image, pictures_in

__all__ = ["local_questions"]

KNOWN = {field.name for field in fields(VisualQuestion)}
LISTS = ("text_constraints", "answers", "options")


def local_questions(path: str | Path, *, seed: int = 0) -> QuestionSet:
    """Read a `.jsonl` file, or the `questions.jsonl` of a folder.

    Args:
        path: the file or the folder. Paths of pictures are relative to where the file is; one that
            is a folder stands for its pictures, of which one is chosen and recorded in
            `extra["image_choice"]`. Several pictures are a list. What is no field of
            `VisualQuestion` goes to `extra`.
        seed: of the choice.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no json object or has no question; the message has its number.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "questions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    parsed = [_parse(line, f"{path}, line {number}") for number, line in rows]

    def make(row: int) -> VisualQuestion:
        found = parsed[row]
        source = found.get("source", f"{path.stem}/{row}")
        extra = {**found.get("extra", {}), **{k: v for k, v in found.items() if k not in KNOWN}}
        image = found.get("image")
        if isinstance(image, list):
            image = tuple(path.parent / each for each in image)
        elif image is not None:
            image = path.parent / image
            if candidates := pictures_in(image):
                chosen, choice = choose_image(candidates, seed, source)
                image, extra = image / chosen, extra | choice
        given = {name: found[name] for name in KNOWN & found.keys()}
        given |= {name: tuple(given[name]) for name in LISTS if name in given}
        return VisualQuestion(**{**given, "image": image, "source": source, "extra": extra})

    return QuestionSet(path.stem, len(parsed), make)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no json: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("question"), str):
        raise ValueError(f"{where} is no object with a question: {line[:80]}")
    for name in LISTS:
        if not isinstance(found.get(name, []), list):
            raise ValueError(f"{where}: {name} must be a list, not {found[name]!r}")
    return found
