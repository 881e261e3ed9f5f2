"""How a sweep is getting on: a live line in a terminal, and a log that is useful without one."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmlens.sweeps.folder import ShardReport

__all__ = ["Log", "SweepProgress", "duration"]


class Log:
    """Lines with the time in a file, written when the call returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str) -> None:
        """Append a line. A full disk is for the results to complain about; here it is only said."""
        line = f"{datetime.now(UTC).isoformat(' ', 'milliseconds')} {text}\n"
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            print(f"mmlens: {self.path} cannot be written ({error}): {line}", file=sys.stderr)


class SweepProgress(AbstractContextManager["SweepProgress"]):
    """Counts questions, and says how fast they go.

    Args:
        log: where a line per shard goes.
        total: questions of the sweep.
        done: of these, by earlier runs.
        failed: of these, without results.
        live: whether to show a line in the terminal; None where stderr is one.
    """

    def __init__(
        self, log: Log, total: int, done: int, failed: int, live: bool | None = None
    ) -> None:
        self.log, self.total, self.done, self.failed = log, total, done, failed
        self.memory = 0
        self._before = done
        self._written = done
        self._began = time.monotonic()
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not (console.is_terminal if live is None else live),
        )
        self._task = self._bar.add_task("questions", total=total, completed=done, status="")

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    @property
    def rate(self) -> float:
        """Questions per second, of this run."""
        return (self.done - self._before) / max(time.monotonic() - self._began, 1e-9)

    def status(self) -> str:
        """Rate, time left, failures and memory."""
        rate = self.rate
        left = duration((self.total - self.done) / rate) if rate else "unknown time"
        memory = f", {self.memory / 2**30:.1f} GiB" if self.memory else ""
        return f"{rate:.3g} questions/s, {left} left, {self.failed} failed{memory}"

    def question(self, worked: bool) -> None:
        """One question more, with or without results."""
        self.done += 1
        self.failed += not worked
        self._bar.update(self._task, completed=self.done, status=self.status())

    def shard(self, report: ShardReport) -> None:
        """A shard's file is there: say so in the log, and why questions failed."""
        self.memory = report.memory
        self._written += report.n_questions
        for each in report.failures:
            where = f"question {each.question} ({each.source})" if each.source else each.question
            self.log(f"{where} failed, {each.reason}: {each.message}")
        self.log(
            f"shard {report.shard} by {report.worker or 'nobody'}: {report.n_questions} questions, "
            f"{report.n_rows} rows, {report.seconds:.1f} s; {self._written} of {self.total}, "
            f"{self.status()}"
        )


def duration(seconds: float) -> str:
    """Seconds as a person says it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
