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

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from mmlens.analyses.result import matches
from mmlens.utils.files import remove_unfinished, write_atomically
from mmlens.utils.resumable import differing, hashed, locked
from mmlens.utils.temporary import Changes, temporary

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

MANIFEST = {
    "identity": dict[str, Any],
    "n_questions": int,
    "model": dict[str, Any],
    "keys": list[str],
    "measures": list[str],
    "columns": dict[str, str],
    "versions": list[dict[str, str]],
}


class OtherSettings(ValueError):
    """The folder holds a sweep with other settings; the message says which."""


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
    """See `Folder.sweep`."""
    shard: int
    n_questions: int
    failures: tuple[Failure, ...] = ()
    n_rows: int = 0
    seconds: float = 0.0
    memory: int = 0
    """Bytes: the most that was allocated on a GPU, or else the process's resident set."""
    worker: str = ""
    """Host and process."""


class Folder:
    """Where a sweep is written to.

    Args:
        path: of the folder.
        sweep: hash of what must be the same in all of its files, once the sweep is begun.

    Example:
        >>> with Folder(path).locked() as folder:
        ...     folder = folder.begin(manifest)
        ...     done, remarks = folder.finished()
    """

    def __init__(self, path: Path, sweep: str = "") -> None:
        self.path, self.sweep = path, sweep
        self.results = path / "results"
        self.unfinished = path / ".unfinished"
        self.failures = path / "failures.parquet"
        self.log = path / "log.txt"

    def shard(self, index: int) -> Path:
        """The file of a shard."""
        return self.results / f"shard-{index:06d}.parquet"

    @temporary
    def locked(self) -> Changes[Folder]:
        """Make the folder, and keep others from writing to it; see `mmlens.utils.resumable`."""
        yield locked(self.path, "sweep", ".lock")
        self.results.mkdir(exist_ok=True)
        self.unfinished.mkdir(exist_ok=True)
        remove_unfinished(self.unfinished)
        return self

    # The manifest

    def manifest(self) -> dict[str, Any]:
        """What the folder holds.

        Raises:
            FileNotFoundError: no sweep was begun here.
            ValueError: what is there is no manifest; the message has the path.
        """
        path = self.path / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} holds no sweep: there is no manifest.json in it")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} is not a JSON object, but a {type(found).__name__}")
        wrong = [name for name, kind in MANIFEST.items() if not matches(found.get(name), kind)]
        wrong = wrong or sorted({*found["keys"], *found["measures"]} - found["columns"].keys())
        if wrong or not isinstance(found["model"].get("name"), str):
            raise ValueError(f"{path} is no manifest of a sweep: see {', '.join(wrong) or 'model'}")
        return found

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

    def begin(self, manifest: Mapping[str, Any]) -> Folder:
        """Write the manifest, or `check` the one that is there; returns the folder of this sweep.

        Versions of other packages may differ; each set of them is noted.
        """
        there = self.check(manifest["identity"])
        content = dict(manifest)
        if there is not None:
            new = [each for each in manifest["versions"] if each not in there["versions"]]
            content = there | {"versions": there["versions"] + new}
        if content != there:
            text = json.dumps(content, indent=2) + "\n"
            write_atomically(self.path / "manifest.json", text, self.unfinished)
        return Folder(self.path, hashed(manifest["identity"]))

    # Shards

    def write(
        self, report: ShardReport, tables: Sequence[pa.Table], schema: pa.Schema
    ) -> ShardReport:
        """Write a shard's rows, a table for each question, and failures: whole or not at all."""
        table = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
        report = replace(report, n_rows=len(table))
        content = as_parquet(table.replace_schema_metadata({KEY: json.dumps(asdict(report))}))
        write_atomically(self.shard(report.shard), content, self.unfinished)
        return report

    def finished(self) -> tuple[dict[int, ShardReport], list[str]]:
        """The shards that are complete, and remarks on files that were thrown away.

        A file is, so that its shard is done again, if it was cut off or is of another sweep.
        """
        reports, remarks = {}, []
        for path in sorted(self.results.glob("shard-*.parquet")):
            try:
                report = read_report(path)
                if report.sweep != self.sweep or self.shard(report.shard) != path:
                    raise ValueError("it belongs to another sweep")
            except PermissionError:
                raise
            except (OSError, ValueError) as error:
                remarks.append(f"{path.name} is thrown away and done again: {error}")
                path.unlink()
                continue
            reports[report.shard] = report
        return reports, remarks

    def write_failures(self, reports: Mapping[int, ShardReport]) -> None:
        """Put the failures of all shards into one file."""
        content = as_parquet(failures_of(reports.values()))
        write_atomically(self.failures, content, self.unfinished)


def failures_of(reports: Iterable[ShardReport]) -> pa.Table:
    """One row per question without results, in the order of the shards."""
    rows = [
        asdict(failure) | {"shard": report.shard}
        for report in sorted(reports, key=lambda report: report.shard)
        for failure in report.failures
    ]
    return pa.Table.from_pylist(rows, schema=FAILURES)


def read_report(path: Path) -> ShardReport:
    """The report in a shard's file; a ValueError says that it is cut off, or no shard."""
    try:
        found = json.loads(pq.read_schema(path).metadata[KEY])
        failures = tuple(Failure(**each) for each in found["failures"])
        report = ShardReport(**found | {"failures": failures})
        for name, kind in get_type_hints(ShardReport).items():
            if not matches(getattr(report, name), kind):
                raise TypeError(f"{name} is {getattr(report, name)!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no shard of a sweep: {error}") from error
    return report


def as_parquet(table: pa.Table) -> bytes:
    """The bytes of the file, with checksums, so that a reader notices flipped bits."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()
