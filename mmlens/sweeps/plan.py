"""Which questions are swept, and in which shards: the unit that is written whole or repeated."""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmlens.data import VisualQuestion
from mmlens.data.reading import Refused
from mmlens.sweeps.items import (
    Item,
    content,
    image_name,
    item_at,
    question_of,
    rows_of,
    with_absolute_paths,
)


@dataclass(frozen=True)
class Planned:
    """A question of a sweep (or an edit, with its question)."""

    row: int
    """Where it stands in the data set, from 0."""
    item: Item | Refused
    """Or a row that its reader could not use: it is a failure, as a missing image is."""
    images: tuple[str, ...]
    """Names of its images, by which questions about the same ones are found."""

    @property
    def question(self) -> VisualQuestion:
        """The question itself."""
        return question_of(self.item)


@dataclass(frozen=True)
class Shard:
    """Questions whose results are one file."""

    index: int
    questions: tuple[Planned, ...]


def plan(
    items: Sequence[Item], *, limit: int | None = None, seed: int = 0, shard_size: int = 8
) -> list[Shard]:
    """Shards of all questions, or of `limit` that the seed chooses; the same for the same data.

    Questions about the same images follow each other and are in one shard, unless they are more
    than a shard holds. Paths become absolute, so that workers elsewhere find them. Rows that could
    not be read count as questions.

    Raises:
        ValueError: no questions, or a shard of none.
    """
    there = rows_of(items)
    if not len(items) or shard_size < 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"{len(items)} questions, limit {limit}, shards of {shard_size}: nothing to sweep"
        )
    rows: Sequence[int] = range(len(there))
    if limit is not None and limit < len(rows):
        rows = sorted(random.Random(seed).sample(rows, limit))
    together: dict[tuple[str, ...], list[Planned]] = {}
    for row in rows:
        found = there[row]
        item = found if isinstance(found, Refused) else item_at(items, found)
        names = tuple(map(image_name, question_of(item).images))
        each = Planned(row, with_absolute_paths(item), names)
        together.setdefault(names or (f"question {row}",), []).append(each)
    shards: list[list[Planned]] = [[]]
    for group in together.values():
        if len(shards[-1]) + len(group) > shard_size and shards[-1]:
            shards.append([])
        for begin in range(0, len(group), shard_size):
            if len(shards[-1]) == shard_size:
                shards.append([])
            shards[-1] += group[begin : begin + shard_size]
    return [Shard(index, tuple(each)) for index, each in enumerate(shards)]


def data_hash(shards: Iterable[Shard]) -> str:
    """A hash of the questions, their words, answers and names of images, and of their order."""
    digest = hashlib.sha256()
    for shard in shards:
        for each in shard.questions:
            about = [shard.index, each.row, content(each.item)]
            # A field of a kind that JSON has not makes its row a failure, later.
            text = json.dumps(about, default=lambda x: type(x).__name__, skipkeys=True)
            digest.update(text.encode())
    return digest.hexdigest()


class Turns:
    """Which shard is whose turn: workers take from one line, and from each other at its end.

    A worker is told of the shard after its own, to read its images in the meantime. When the
    line is empty, what was only announced to one worker goes to another that has nothing to do.

    Example:
        >>> turns = Turns(shards)
        >>> now, then = turns.take("worker 1")
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._line = deque(shards)
        self._announced: dict[Any, Shard] = {}

    def take(self, worker: Any) -> tuple[Shard, Shard | None] | None:
        """What the worker does now, and probably next; None if there is nothing left to do."""
        now = self._announced.pop(worker, None)
        if now is None and self._line:
            now = self._line.popleft()
        if now is None and self._announced:
            _, now = self._announced.popitem()
        if now is None:
            return None
        then = self._line.popleft() if self._line else None
        if then is not None:
            self._announced[worker] = then
        return now, then

    def give_back(self, worker: Any, shard: Shard | None = None) -> None:
        """Put what a worker had, and was announced, at the head of the line."""
        announced = self._announced.pop(worker, None)
        self._line.extendleft(each for each in (announced, shard) if each is not None)
