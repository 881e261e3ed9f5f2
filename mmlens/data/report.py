"""Problems of a set of questions, counted and listed.

print(questions.report())
questions.report().to_dataframe().query("what == 'constraint' and how == 'not found'")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlens.data.questions import VisualQuestion
from mmlens.inputs.spans import SpanNotFoundError, find_span, whole_words

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Finding:
    """One problem of one question."""

    row: int
    """Counted from 0 within the questions that were checked; of a row that is left out, in its
    file."""
    source: str
    what: str
    """"row", "part of a row", "constraint", "text constraint", "image" or "answers"."""
    how: str
    """For constraints, see `how_found`; "left out" for rows, "missing" for the others."""
    question: str
    detail: str
    """The phrase, the file, or why something was left out."""


@dataclass(frozen=True)
class Report:
    """All findings of a set of questions. What is exactly as it should be is not among them."""

    name: str
    n_questions: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How many findings of each kind: `counts["constraint", "not found"]`."""
        return Counter((finding.what, finding.how) for finding in self.findings)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per finding."""
        import pandas as pd

        columns = list(Finding.__dataclass_fields__)
        return pd.DataFrame([asdict(finding) for finding in self.findings], columns=columns)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.n_questions} questions"]
        for (what, how), count in sorted(self.counts.items()):
            found = [each for each in self.findings if (each.what, each.how) == (what, how)]
            rows = ", ".join(str(each.row) for each in found[:10])
            lines.append(f"  {what} {how}: {count} (rows {rows}{', ...' if count > 10 else ''})")
            if how == "left out":
                lines += [f"    {each.source}: {each.detail}" for each in found[:10]]
        return "\n".join(lines if self.findings else [*lines, "  nothing to report"])


def how_found(text: str, phrase: str) -> str:
    """Return how `mmlens.inputs.spans.find_span` finds a phrase in a text.

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


def check_questions(
    questions: Iterable[VisualQuestion],
    name: str = "",
    *,
    rows: Sequence[Any] | None = None,
) -> Report:
    """Check every question for its constraints, its images and its answers.

    It checks that image files exist, and does not open them.

    Args:
        rows: the data set of the questions, whose rows and parts that were left out are findings,
            too; by default `questions`.
    """
    read = questions if rows is None else rows
    findings = [
        Finding(each.row, each.source, what, "left out", "", each.why)
        for what, left_out in (("row", "refused"), ("part of a row", "parts"))
        for each in getattr(read, left_out, ())
    ]
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
    try:
        return isinstance(image, str | Path) and not Path(image).is_file()
    except OSError:  # a name that is too long, say
        return True
