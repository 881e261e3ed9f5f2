"""Data sets: `Rows` of anything, and a `QuestionSet` of `VisualQuestion`s.

Every reader of a data set gives a `QuestionSet`: an analysis written for one data set runs on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

from mmlens.data.questions import VisualQuestion
from mmlens.data.reading import Refused
from mmlens.data.report import Report, check_questions

Row = TypeVar("Row")
Set = TypeVar("Set")


class Rows(Sequence[Row]):
    """The rows of a data set, made when they are asked for; images stay closed.

    Args:
        name: of the data set.
        rows: how many there are, or the numbers of those that can be used.
        make: gives the row of a number.
        refused: the rows that cannot be used, and why; their numbers are none of `rows`.
        parts: what cannot be used of other rows (a neighbour without a question), and why.
    """

    def __init__(
        self,
        name: str,
        rows: int | Sequence[int],
        make: Callable[[int], Row],
        refused: Sequence[Refused] = (),
        parts: Sequence[Refused] = (),
    ) -> None:
        self.name = name
        self._make = make
        self.numbers: Sequence[int] = range(rows) if isinstance(rows, int) else rows
        """Where each row stands in its file, counted from 0."""
        self.refused = tuple(refused)
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self: Set, index: slice) -> Set: ...

    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return self._make(self.numbers[index])
        kept = self.numbers[index]
        there = range(min(kept), max(kept) + 1) if kept else ()
        refused, parts = (
            [x for x in each if x.row in there] for each in (self.refused, self.parts)
        )
        return type(self)(self.name, kept, self._make, refused, parts)

    def __repr__(self) -> str:
        left_out = f", {len(self.refused)} left out" if self.refused else ""
        return f"{type(self).__name__}({self.name!r}, {len(self)} rows{left_out})"


def joined_sets(name: str, sets: Sequence[QuestionSet]) -> QuestionSet:
    """Return the questions of several sets, one set after the other."""
    numbers: list[int] = []
    refused: list[Refused] = []
    parts: list[Refused] = []
    makers: dict[int, tuple[QuestionSet, int]] = {}
    offset = 0
    for each in sets:
        for index, number in enumerate(each.numbers):
            numbers.append(offset + number)
            makers[offset + number] = (each, index)
        refused += [replace(row, row=offset + row.row) for row in each.refused]
        parts += [replace(row, row=offset + row.row) for row in each.parts]
        rows = [*each.numbers, *(row.row for row in (*each.refused, *each.parts))]
        offset += max(rows, default=-1) + 1

    def make(number: int) -> VisualQuestion:
        questions, index = makers[number]
        return questions[index]

    return QuestionSet(name, numbers, make, refused, parts)


class QuestionSet(Rows[VisualQuestion]):
    """The questions of a data set, made when they are asked for.

    Example:
        >>> questions = vqa_constraints("multimodal_known.csv", "images")
        >>> print(questions.report())
        >>> for question in questions[:100]: ...
    """

    def report(self) -> Report:
        """Count and list the problems of rows and questions; see `mmlens.data.report`."""
        return check_questions(self, self.name)
