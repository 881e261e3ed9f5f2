"""The rows of a batch: a text, its images and its spans each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmlens.inputs.templates import Phrase

Spans = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None
"""Names for phrases or positions: of every text, or of each."""


def rows_of(
    text: str | Sequence[str], image: Any, spans: Spans
) -> list[tuple[str, Any, Mapping[str, Phrase]]]:
    """Return texts, images and spans of each row of the batch."""
    if isinstance(text, str):
        one = spans if isinstance(spans, Mapping | None) else one_each("spans", spans, 1)[0]
        return [(text, image, one or {})]
    if not text:
        raise ValueError("the list of texts is empty")
    n = len(text)
    images = [None] * n if image is None else one_each("image", image, n)
    if spans is None or isinstance(spans, Mapping):
        spans = [spans] * n
    phrases = [row or {} for row in one_each("spans", spans, n)]
    return list(zip(text, images, phrases, strict=True))


def one_each(name: str, values: Any, n: int) -> Sequence[Any]:
    """Return a list with one entry for each of n texts, or raise a ValueError that says why not."""
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"for a list of {n} text(s), {name} must be a list with one entry for each (None where "
            f"there is nothing), not {type(values).__name__}"
        )
    if len(values) != n:
        raise ValueError(
            f"{n} text(s), but {name} has {len(values)} entries: give one for each text (None "
            f"where there is nothing; a list for several images of one text)"
        )
    return values
