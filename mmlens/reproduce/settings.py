"""What a reproduction asks, of which model, and how sure it wants to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmlens.data import VisualQuestion


@dataclass(frozen=True)
class Settings:
    """Everything that a figure's numbers depend on; it is written next to them."""

    model: str = "demo"
    language_model: str | None = None
    """Who is asked in words alone; None is the model's own language model."""
    data: str = "demo"
    """See `mmlens.data.open_questions`."""
    images: str | None = None
    annotations: tuple[str, str] | None = None
    """OK-VQA's questions and annotations, with the answers to `okvqa.csv`."""
    template: str | None = "auto"
    limit: int = 60
    """Questions that are traced, after filtering."""
    asked: int = 180
    """Questions of which right answers are compared with wrong ones."""
    replacement: str = "Paris"
    minimum_gap: float = 0.05
    """Least clean - corrupted probability of a question that is traced."""
    windows: tuple[int, ...] = (1, 3, 5, 6)
    max_new_tokens: int = 6
    """Of the answer that is right or wrong."""
    samples: int = 2000
    """Resamples of the bootstrap."""
    level: float = 0.95
    seed: int = 0


def open_questions(settings: Settings) -> Sequence[VisualQuestion]:
    """The questions that the settings name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind; annotations for something else than a csv.
    """
    from mmlens.data.opening import open_questions as opened

    return opened(settings.data, settings.images, settings.annotations, seed=settings.seed)
