"""Files of rows, read so that one bad row never stops the others.

    rows, refused = sift("mine", json_lines(path), check, path)

`json_lines` and `csv_rows` give a value, or a `RowError`, for each row of a file; `sift` keeps the
rows that pass a reader's check, and names the others.
"""

from __future__ import annotations

import ast
import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

SHOWN = 60
"""Characters of a value that an error message repeats."""


class RowError(ValueError):
    """A row that cannot be used; the message says why, in a few words."""


@dataclass(frozen=True)
class Refused:
    """A row of a data set that cannot be used: it is left out, counted and named."""

    row: int
    """Where it stands in the data set, counted from 0."""
    source: str
    """Data set and row, as `VisualQuestion.source`."""
    why: str
    """One line, with the row's place in its file."""


# Texts


def read_text(path: str | Path, *, errors: str = "strict") -> str:
    """Return the text of a UTF-8 file (or UTF-16 with a byte order mark), without that mark.

    Line ends stay as they are in the file.

    Args:
        errors: "strict", or "surrogateescape" to find the bytes that are no UTF-8 row by row.
    """
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16") if wide else data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text, which end at "\n" or "\r\n" and nowhere else.

    `str.splitlines` also splits at characters such as U+2028, which JSON strings may contain.

    Example:
        >>> lines_of("one\u2028still one\r\ntwo\n")
        ['one\u2028still one', 'two']
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


# Files: (place, value or RowError) of every row


def json_file(path: str | Path) -> Any:
    """Return what a JSON file holds."""
    try:
        return parse_json(read_text(path))
    except RowError as error:
        raise ValueError(f"{path}: {error}") from error


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value or `RowError`) of every line of JSON; blank lines are skipped."""
    text = read_text(path, errors="surrogateescape")
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse_json(line)
        except RowError as error:
            yield f"line {number}", error


def csv_rows(path: str | Path) -> tuple[list[str], Iterator[tuple[str, Any]]]:
    """Return the columns of a CSV file, and (place, fields or `RowError`) of its rows."""
    text = read_text(path, errors="surrogateescape")
    reader = csv.reader(StringIO(text, newline=""))
    try:
        columns = next(row for row in reader if row)
    except (StopIteration, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file: it has no header") from error

    def rows() -> Iterator[tuple[str, Any]]:
        while True:
            place = f"line {reader.line_num + 1}"
            try:
                row = next(reader)
                if row:
                    yield place, named_fields(columns, row)
            except StopIteration:
                return
            except (RowError, csv.Error) as error:
                yield place, RowError(str(error))

    return columns, rows()


def named_fields(columns: list[str], row: list[str]) -> dict[str, str]:
    """Return the fields of a CSV row by their columns; empty ones too many are left out."""
    if len(row) < len(columns) or any(row[len(columns) :]):
        raise RowError(f"{len(row)} fields for {len(columns)} columns")
    return dict(zip(columns, row, strict=False))


def parse_json(text: str) -> Any:
    """Return what a JSON text holds."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise RowError("nested too deeply to be read") from error
    except ValueError as error:
        raise RowError(f"no json: {error}") from error


# What a row must be


def sift(
    name: str,
    rows: Iterable[tuple[str, Any]],
    check: Callable[[Any], Any],
    path: str | Path,
) -> tuple[dict[int, Any], tuple[Refused, ...]]:
    """Return what `check` makes of each row, by its number, and the rows that it refuses.

    Args:
        name: of the data set, for `Refused.source`.
        rows: as `json_lines` and `csv_rows` give them.
        check: raises a `RowError` for a row that cannot be used.
        path: of the file, for the message.

    Raises:
        ValueError: not one of the rows can be used: this is another kind of file.
    """
    good: dict[int, Any] = {}
    refused: list[Refused] = []
    for number, (place, value) in enumerate(rows):
        try:
            if isinstance(value, RowError):
                raise value
            check_encoding(value)
            good[number] = check(value)
        except RowError as error:
            refused.append(Refused(number, f"{name}/{number}", f"{place}: {error}"))
    if refused and not good:
        raise ValueError(
            f"{path}: none of {len(refused)} rows can be used; the first: {refused[0].why}"
        )
    return good, tuple(refused)


def check_encoding(value: Any) -> None:
    """Raise a `RowError` where a text of the row has characters that UTF-8 cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise RowError(
            f"no text in UTF-8: it has the byte {ord(found) - 0xDC00:#04x}"
            if 0xDC80 <= ord(found) <= 0xDCFF
            else f"no text: it has half of a character, {found!a}"
        ) from error


KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a list of texts": lambda value: (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    ),
    "a list": lambda value: isinstance(value, list),
    "an object": lambda value: isinstance(value, dict),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
}


def expect(fields: Any, name: str, *kinds: str) -> Any:
    """Return a field of an object, which must be there and of one of the kinds.

    Raises:
        RowError: it is missing, or of another kind; or the row is no object.

    Example:
        >>> expect({"image": "a.png"}, "image", "a text", "a list of texts")
        'a.png'
    """
    if not isinstance(fields, dict):
        raise RowError(f"must be an object, not {shown(fields)}")
    if name not in fields:
        raise RowError(f"lacks {name}")
    value = fields[name]
    if not any(KINDS[kind](value) for kind in kinds):
        raise RowError(f"{name} must be {' or '.join(kinds)}, not {shown(value)}")
    return value


def literal(name: str, text: str) -> list[str]:
    """Return the texts of a Python list, as data sets write one into a field.

    Raises:
        RowError: it is no list.
    """
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise RowError(f"{name} must be a list, not {shown(text)}")
    return list(map(str, found))


def shown(value: Any) -> str:
    """Return a value as a message repeats it: its beginning."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
