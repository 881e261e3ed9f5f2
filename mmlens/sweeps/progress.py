"""How a sweep is getting on: a live line in a terminal, and a log that is useful without one."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmlens.sweeps.folder import ShardReport
from mmlens.utils.printable import printable
from mmlens.utils.temporary import Changes, Temporary
from mmlens.utils.terminal import SafeConsole, say


class Log:
    """Lines with the time in a file, written when the call returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said = False

    def __call__(self, text: str) -> None:
        """Append a line. A full disk is for the results to complain about; here it is said once."""
        line = f"{datetime.now(UTC).isoformat(' ', 'milliseconds')} {printable(text)}\n"
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            if not self._said:
                say(f"{self.path} cannot be written: {error}")
            self._said = True


class SweepProgress(Temporary["SweepProgress"]):
    """Counts questions, and says how fast they go.

    Args:
        log: where a line per shard goes.
        total: questions of the sweep.
        done, failed: how many of these earlier runs have done, and how many of those failed.
        live: whether to show a line in the terminal; None where stderr is one.
    """

    def __init__(
        self, log: Log, total: int, done: int, failed: int, live: bool | None = None
    ) -> None:
        super().__init__(self._shown)
        self.log, self.total, self.done, self.failed = log, total, done, failed
        self.memory = 0
        self._before = self._written = done
        self._began = time.monotonic()
        console = SafeConsole(stderr=True)
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

    def _shown(self) -> Changes[SweepProgress]:
        """What a `with` block does."""
        yield self._bar.stop
        self._bar.start()
        return self

    def status(self) -> str:
        """Rate of this run, time left, failures and memory."""
        rate = (self.done - self._before) / max(time.monotonic() - self._began, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "unknown time"
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
