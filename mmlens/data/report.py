"""What in a set of questions is not as it should be. Nothing is dropped: it is counted and listed.

print(questions.report())
questions.report().to_dataframe().query("what == 'constraint' and how == 'not found'")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.data.questions import VisualQuestion
from mmlens.spans import SpanNotFoundError, find_span, whole_words

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Finding", "Report", "check_questions", "how_found"]


@dataclass(frozen=True)
class Finding:
    """One thing about one question."""

    row: int
    """Counted from 0 within the questions that were checked."""
    source: str
    what: str
    """"constraint", "text constraint", "image" or "answers"."""
    how: str
    """For constraints, see `how_found`; "missing" for the others."""
    question: str
    detail: str
    """The phrase or the file."""


@dataclass(frozen=True)
class Report:
    """All findings of a set of questions; what is exactly as it should be is not among them."""

    name: str
    n_questions: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How many findings of each kind: `counts["constraint", "not found"]`."""
        return Counter((finding.what, finding.how) for finding in self.findings)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per finding."""
        import pandas as pd

        columns = list(Finding.__dataclass_fields__)
        return pd.DataFrame([asdict(finding) for finding in self.findings], columns=columns)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.n_questions} questions"]
        for (what, how), count in sorted(self.counts.items()):
            rows = [
                finding.row
                for finding in self.findings
                if (finding.what, finding.how) == (what, how)
            ]
            shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
            lines.append(f"  {what} {how}: {count} (rows {shown})")
        return "\n".join(lines if self.findings else [*lines, "  nothing to report"])


def how_found(text: str, phrase: str) -> str:
    """How `mmlens.spans.find_span` finds a phrase in a text.

    Returns:
        "exact"; "tolerant", where case, spacing or punctuation differ; "part of a word", where the
        phrase begins or ends inside one (it may be truncated, or be another word altogether); or
        "not found".
    """
    try:
        start, end = find_span(text, phrase)
    except SpanNotFoundError:
        return "not found"
    if not whole_words(text, start, end):
        return "part of a word"
    return "exact" if text[start:end] == phrase else "tolerant"


def check_questions(questions: Iterable[VisualQuestion], name: str = "") -> Report:
    """Look at every question: are its constraints in it, its pictures there, its answers known?

    Pictures are looked for but not opened.
    """
    findings: list[Finding] = []
    row = -1
    for row, question in enumerate(questions):
        for what, how, detail in _findings(question):
            findings.append(Finding(row, question.source, what, how, question.question, detail))
    return Report(name, row + 1, tuple(findings))


def _findings(question: VisualQuestion) -> Iterator[tuple[str, str, str]]:
    constraints = [("constraint", question.visual_constraint)] if question.visual_constraint else []
    constraints += [("text constraint", words) for words in question.text_constraints]
    for what, phrase in constraints:
        if (how := how_found(question.question, phrase)) != "exact":
            yield what, how, phrase
    for image in question.images:
        if _is_missing(image):
            yield "image", "missing", str(image)
    if not question.answers:
        yield "answers", "missing", ""


def _is_missing(image: Any) -> bool:
    return isinstance(image, str | Path) and not Path(image).is_file()
