"""What a reproduction asks, of which model, and how sure it wants to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything that a figure's numbers depend on; it is written next to them."""

    model: str = "demo"
    language_model: str | None = None
    """Who is told the name in words; by default the model's own language model."""
    data: str = "demo"
    """"demo", a csv of VQA-Constraints, or a jsonl file or folder of your own (see
    `mmlens.data.open_questions`)."""
    images: str | None = None
    """The folder of the csv's images; by default its own."""
    annotations: tuple[str, str] | None = None
    """OK-VQA's questions and annotations (two files), with the answers to okvqa.csv."""
    template: str | None = "auto"
    min_pixels: int | None = None
    """The least pixels of an image, scaled: of models whose images have as many visual tokens as
    they ask for (see `Processor.bounded`). A model that is given has its own bounds."""
    max_pixels: int | None = None
    """The most; it decides what an image costs."""
    limit: int = 60
    """Questions that are traced, after filtering."""
    asked: int = 180
    """Questions of which right answers are compared with wrong ones; on the command line by default
    three times as many as are traced."""
    replacement: str = "Paris"
    """The word that takes the constraint's place in the corrupted run."""
    minimum_gap: float = 0.05
    """Least clean - corrupted probability of a question that is traced."""
    windows: tuple[int, ...] = (1, 3, 5, 6)
    max_new_tokens: int = 6
    """Of the answer that is right or wrong."""
    samples: int = 2000
    """Resamples of the bootstrap."""
    level: float = 0.95
    seed: int = 0
    """Of the choice of questions and of the resampling."""
