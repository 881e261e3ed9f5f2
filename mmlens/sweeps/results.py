"""What a sweep has written, read back: `Sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from mmlens.sweeps.folder import Folder, ShardReport, failures_of, read_report
from mmlens.sweeps.summary import Summary, columns_of, summarize


class Sweep:
    """The folder of a sweep, finished or running.

    Example:
        >>> sweep = Sweep("runs/trace")
        >>> sweep.results(["question", "site", "layer", "indirect_effect"])
        >>> sweep.summarize().write("runs/trace/summary")
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Folder(Path(path))
        self.manifest: dict[str, Any] = self.folder.manifest()

    def __repr__(self) -> str:
        done, failed = self.n_done, self.n_failed
        return (
            f"Sweep({str(self.folder.path)!r}: {done} of {self.n_questions} done, {failed} failed)"
        )

    @property
    def n_questions(self) -> int:
        """How many are to be done."""
        return int(self.manifest["n_questions"])

    @property
    def n_done(self) -> int:
        """How many are, the failed ones among them."""
        return sum(report.n_questions for report in self._reports)

    @property
    def n_failed(self) -> int:
        """How many have no results."""
        return sum(len(report.failures) for report in self._reports)

    @cached_property
    def _reports(self) -> list[ShardReport]:
        """Of the files that are there when this is first asked."""
        return [read_report(path) for path in self._files]

    @property
    def _files(self) -> list[Path]:
        return sorted(self.folder.results.glob("shard-*.parquet"))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows that are there, or some of their columns; texts come as dictionaries.

        Raises:
            ValueError: nothing is there yet, or a file has other columns than the rest.
            OSError: a file is damaged.
        """
        files = self._files
        if not files:
            raise ValueError(f"{self.folder.path} has no results yet")
        for path in files:
            schema = pq.read_schema(path)
            there = {field.name: str(field.type) for field in schema}
            if other := there.items() ^ self.manifest["columns"].items():
                names = ", ".join(sorted({name for name, _ in other}))
                raise ValueError(f"{path} has other columns than manifest.json says: {names}")
        texts = [field.name for field in schema if field.type == pa.string()]
        reading = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        format = ds.ParquetFileFormat(
            read_options=ds.ParquetReadOptions(dictionary_columns=texts),
            default_fragment_scan_options=reading,
        )
        found = ds.dataset(files, format=format).to_table(columns=columns)
        return found.unify_dictionaries().replace_schema_metadata(None)

    def results(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The same as a pandas table."""
        return self.table(columns).to_pandas()

    def failures(self) -> pd.DataFrame:
        """One row per question without results: why."""
        return failures_of(self._reports).to_pandas()

    def counts(self) -> dict[str, Any]:
        """Count questions: planned, done, failed, and why those failed."""
        reasons = self.failures()["reason"].value_counts()
        return {
            "planned": self.n_questions,
            "done": self.n_done,
            "failed": self.n_failed,
            "why": {str(reason): int(n) for reason, n in reasons.items()},
        }

    def summarize(self, *, minimum_gap: float | None = None, **options: Any) -> Summary:
        """Means over questions with intervals; see `mmlens.sweeps.summarize`."""
        rows = self.results(columns_of(self.manifest, minimum_gap is not None))
        found = summarize(rows, self.manifest, minimum_gap=minimum_gap, **options)
        return replace(found, counts=self.counts() | found.counts)
