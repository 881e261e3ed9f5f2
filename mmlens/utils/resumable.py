"""Runs that may be stopped at any time and go on: one file per item, known again by a stamp.

    with locked(out, "edit benchmark"):
        files = {case: ResultFile(EditEvaluation, out / name(case), stamp) for case in cases}
        found = Resumable(files).each(evaluated)

Sweeps, the edit benchmark and `mmlens reproduce` run in this way. A result is one file, which
appears whole (`mmlens.utils.files`), with a stamp: what its numbers depend on, as `as_json` gives
it. A later run takes what `agrees` with its own stamp. An item that fails is a result, too, which
says why; so the others go on, and a later run does not stop there again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmlens.utils.files import lock, opened
from mmlens.utils.progress import Progress
from mmlens.utils.temporary import Changes, temporary

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


class FolderInUse(ValueError):
    """Another process is writing to the folder."""


def as_json(settings: Any) -> Any:
    """Return settings as they come back from a file: tuples are lists, keys are texts."""
    return json.loads(json.dumps(settings))


def hashed(stamp: Mapping[str, Any]) -> str:
    """Return the hash by which files with the same stamp know each other."""
    return hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:16]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package."""
    return {name: version(name) for name in packages}


def differing(
    was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Give the names and both values where `now` is not what `was` is.

    At the top, what `now` lacks is not compared; further down, what is left out is a difference.
    """
    for name in dict.fromkeys([*now, *(was if prefix else ())]):
        before, value = was.get(name), now.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from differing(before, value, f"{prefix}{name}.")
        elif before != value or (prefix and (name in was) != (name in now)):
            yield f"{prefix}{name}", before, value


def agrees(record: Any, stamp: Mapping[str, Any]) -> bool:
    """Return whether a record, read from a file, says of everything what the stamp says."""
    return isinstance(record, Mapping) and not any(differing(record, stamp))


@dataclass(frozen=True)
class ResultFile(Generic[Result]):
    """Where a result is kept, and what it must have been made with to be taken."""

    kind: type[Result]
    """A frozen dataclass with `metadata`, `save(path)` and `load(path)`, as `SavedResult`s are."""
    path: Path
    stamp: Mapping[str, Any]

    def load(self) -> Result | None:
        """Return the result, if it was made with this stamp; none of a damaged file."""
        try:
            found: Any = self.kind.load(self.path)  # type: ignore[attr-defined]
        except (FileNotFoundError, ValueError):
            return None
        return found if agrees(found.metadata, self.stamp) else None

    def save(self, result: Result) -> Result:
        """Write a result whole; returns it with the stamp, as it will be read."""
        made: Any = result
        found = replace(made, metadata={**made.metadata, **self.stamp})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found.save(self.path)
        return found


class Resumable(Generic[Item, Result]):
    """Items that are done once: what earlier runs have left is read, and the rest is made.

    Args:
        files: of every item, in the order of the results; None where no file is read or written,
            because whoever makes the result does that, or because nothing is kept.
        progress: called with the items done and all.

    Example:
        >>> run = Resumable({case: ResultFile(EditEvaluation, path, stamp)})
        >>> run.missing
        >>> run.each(evaluated)
    """

    def __init__(
        self, files: Mapping[Item, ResultFile[Result] | None], progress: Progress | None = None
    ) -> None:
        self.files = files
        self._moved = progress or (lambda done, total: None)
        loaded = {item: file.load() for item, file in files.items() if file is not None}
        self.found: dict[Item, Result] = {
            item: result for item, result in loaded.items() if result is not None
        }
        self._moved(len(self.found), len(files))

    @property
    def missing(self) -> list[Item]:
        """Those that are not done yet."""
        return [item for item in self.files if item not in self.found]

    def add(self, item: Item, result: Result) -> None:
        """Write the result of an item, and count it."""
        file = self.files[item]
        self.found[item] = result if file is None else file.save(result)
        self._moved(len(self.found), len(self.files))

    def each(self, make: Callable[[Item], Result]) -> dict[Item, Result]:
        """Make what is missing, one after the other; returns all results, in the files' order."""
        for item in self.missing:
            self.add(item, make(item))
        return {item: self.found[item] for item in self.files}


@temporary
def locked(folder: Path, run: str, file: str | None = None) -> Changes[Path]:
    """Make a folder, and keep others from writing to it; the system lets go if we are killed.

    Where a file system has no locks, nobody is kept out. Two runs would still only do the same work
    twice: a file is the same whoever writes it.

    Args:
        run: what is writing, for the message: "edit benchmark".
        file: the name of a file that is locked in the place of the folder: NFS locks no folders.

    Raises:
        FolderInUse: (a ValueError) another process has it.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if file is None:
        descriptor = yield opened(folder)
    else:
        stream = (folder / file).open("a")
        yield stream.close
        descriptor = stream.fileno()
    if not lock(descriptor):
        raise FolderInUse(
            f"another {run} is writing to {folder}: wait for it or choose another folder"
        )
    return folder
