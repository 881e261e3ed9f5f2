"""The folder of a sweep: what is in it, and how it gets there whole.

    manifest.json       settings, versions, hashes of model and data, columns
    results/            shard-000000.parquet ...: complete shards, and nothing else
    failures.parquet    the questions that failed, and why
    log.txt             what happened when
    .unfinished/, .lock files that are being written; who writes

A shard's rows and failures are one file, with the failures in its metadata: it is there with all it
has, or it is not there. `failures.parquet` only repeats them in one place.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmlens.files import write_atomically

__all__ = ["Failure", "Folder", "FolderInUse", "OtherSettings", "ShardReport"]

KEY = b"mmlens"
FAILURES = pa.schema(
    [
        ("question", pa.int32()),
        ("source", pa.string()),
        ("image", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("shard", pa.int32()),
    ]
)


class OtherSettings(ValueError):
    """The folder holds a sweep with other settings; the message says which."""


class FolderInUse(ValueError):
    """Another process is writing to the folder."""


@dataclass(frozen=True)
class Failure:
    """A question without results."""

    question: int
    source: str
    image: str
    reason: str
    message: str


@dataclass(frozen=True)
class ShardReport:
    """What is in a shard's file besides its rows."""

    sweep: str
    """Hash of what must be the same in all files of a folder."""
    shard: int
    n_questions: int
    failures: tuple[Failure, ...] = ()
    n_rows: int = 0
    seconds: float = 0.0
    memory: int = 0
    """Bytes: the most that was allocated on a GPU, or else the process's resident set."""
    worker: str = ""
    """Host and process."""

    @classmethod
    def from_json(cls, text: bytes | str) -> ShardReport:
        """What `to_json` wrote."""
        found = json.loads(text)
        return cls(**found | {"failures": tuple(Failure(**each) for each in found["failures"])})

    def to_json(self) -> str:
        """For the metadata of the file."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Folder:
    """Where a sweep is written to.

    Example:
        >>> with Folder(path).locked() as folder:
        ...     folder.begin(manifest)
        ...     done = folder.finished()
    """

    path: Path

    @property
    def results(self) -> Path:
        """Complete shards."""
        return self.path / "results"

    @property
    def unfinished(self) -> Path:
        """What is being written."""
        return self.path / ".unfinished"

    @property
    def failures(self) -> Path:
        """The questions that failed."""
        return self.path / "failures.parquet"

    @property
    def log(self) -> Path:
        """What happened."""
        return self.path / "log.txt"

    def shard(self, index: int) -> Path:
        """The file of a shard."""
        return self.results / f"shard-{index:06d}.parquet"

    @contextmanager
    def locked(self) -> Iterator[Folder]:
        """Make the folder, and keep others from writing to it; the system lets go if we are killed.

        Raises:
            FolderInUse: (a ValueError) another process has it.
            OSError: the folder cannot be made.
        """
        import fcntl

        self.results.mkdir(parents=True, exist_ok=True)
        self.unfinished.mkdir(exist_ok=True)
        with (self.path / ".lock").open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise FolderInUse(
                        f"another sweep is writing to {self.path}: wait for it or choose another "
                        "folder"
                    ) from error
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                # Some network file systems have no locks. Two sweeps would still only do the same
                # work twice: a shard's file is the same whoever writes it.
            for left in self.unfinished.iterdir():  # by a process that was killed
                left.unlink(missing_ok=True)
            yield self

    # The manifest

    def manifest(self) -> dict[str, Any]:
        """What the folder holds.

        Raises:
            FileNotFoundError: no sweep was begun here.
        """
        path = self.path / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} holds no sweep: there is no manifest.json in it")
        return json.loads(path.read_text(encoding="utf-8"))

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest, if there is one and it agrees in everything that `identity` names.

        Raises:
            OtherSettings: (a ValueError) it does not; says in what.
        """
        try:
            there = self.manifest()
        except FileNotFoundError:
            return None
        differences = [
            f"{name} was {was!r} and is now {now!r}"
            for name, was, now in differing(there["identity"], identity)
        ]
        if differences:
            raise OtherSettings(
                f"{self.path} holds a sweep with other settings, which must not be mixed: "
                f"{'; '.join(differences)}. Choose another folder"
            )
        return there

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, or check that the one that is there agrees.

        Versions of other packages may differ; each set of them is noted.

        Raises:
            OtherSettings: (a ValueError) it does not agree.
            OSError: it cannot be written.
        """
        there = self.check(manifest["identity"])
        content = dict(manifest)
        if there is not None:
            seen = there["versions"]
            new = [each for each in manifest["versions"] if each not in seen]
            if not new:
                return
            content = there | {"versions": seen + new}
        write_atomically(
            self.path / "manifest.json", json.dumps(content, indent=2) + "\n", self.unfinished
        )

    # Shards

    def write(
        self, report: ShardReport, rows: Sequence[Mapping[str, Any]], schema: pa.Schema
    ) -> ShardReport:
        """Write a shard's rows and failures, whole or not at all.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        report = replace(report, n_rows=len(rows))
        table = pa.Table.from_pylist(list(rows), schema=schema)
        content = as_parquet(table.replace_schema_metadata({KEY: report.to_json()}))
        write_atomically(self.shard(report.shard), content, self.unfinished)
        return report

    def finished(self, sweep: str) -> tuple[dict[int, ShardReport], list[str]]:
        """The shards that are complete, and remarks on files that were thrown away.

        A file that was cut off by something else than us, or belongs to another sweep, is deleted,
        so that its shard is done again.
        """
        reports, remarks = {}, []
        for path in sorted(self.results.glob("shard-*.parquet")):
            try:
                report = read_report(path)
                if report.sweep != sweep or self.shard(report.shard) != path:
                    raise ValueError("it belongs to another sweep")
            except PermissionError:
                raise
            except (OSError, ValueError, KeyError, TypeError) as error:
                remarks.append(f"{path.name} is thrown away and done again: {error}")
                path.unlink()
                continue
            reports[report.shard] = report
        return reports, remarks

    def write_failures(self, reports: Mapping[int, ShardReport]) -> None:
        """Put the failures of all shards into one file.

        Raises:
            OSError: it cannot be written.
        """
        rows = [
            asdict(failure) | {"shard": index}
            for index, report in sorted(reports.items())
            for failure in report.failures
        ]
        content = as_parquet(pa.Table.from_pylist(rows, schema=FAILURES))
        write_atomically(self.failures, content, self.unfinished)


def read_report(path: Path) -> ShardReport:
    """The report in a shard's file.

    Raises:
        OSError, ValueError, KeyError: it is cut off, or no shard.
    """
    return ShardReport.from_json(pq.read_schema(path).metadata[KEY])


def as_parquet(table: pa.Table) -> bytes:
    """The bytes of the file, with checksums, so that a reader notices flipped bits."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def differing(
    was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Names and both values where `now` is not what `was` is; what `now` lacks is not compared."""
    for name, value in now.items():
        before = was.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from differing(before, value, f"{prefix}{name}.")
        elif before != value:
            yield f"{prefix}{name}", before, value
