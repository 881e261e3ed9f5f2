"""Images and questions for an edit's references: what it must leave as it is.

The photographs are in `reference_images/` (public domain and CC0, see the NOTICE there); the flags
are those of the demo's training countries, so that its held-out countries can be measured.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from mmlens.data.demo import demo_questions
from mmlens.demo.phrasings import PHRASINGS

__all__ = ["DEMO_QUESTIONS", "QUESTIONS", "TEXTS", "reference_flags", "reference_photographs"]

FOLDER = Path(__file__).parent / "reference_images"

QUESTIONS = (
    "What is shown in this image?",
    "What colour is most of this image?",
    "Is this a photograph or a drawing?",
    "Where might this be?",
    "How many objects are in this image?",
    "What is this used for?",
    "What is the name of this?",
    "Is it day or night in this image?",
    "What shape can be seen in this image?",
    "Who might have made this?",
    "What is in the middle of this image?",
    "What material is this made of?",
)
"""About any image."""
DEMO_QUESTIONS = (
    "The name of this country is",
    *(phrasings[0] for phrasings in PHRASINGS.values()),
    "The colours of this flag are",
    "The anthem of this country is called",
    "The population of this country is about",
)
"""About a flag, as the demo's questions are worded."""
TEXTS = (
    "Water boils at a temperature of",
    "The author of Hamlet is",
    "Two and two is",
    "The largest planet of the solar system is",
    "The opposite of hot is",
    "The first month of the year is",
    "Paris is the capital of",
    "Bread is made from flour and",
    "The colour of the sky is",
    "The chemical symbol of gold is",
    "Bees make",
    "The sun rises in the",
)
"""Without an image."""


@cache
def reference_flags() -> tuple[Path, ...]:
    """Return the flags of the demo's training countries, in an order that is always the same."""
    names = demo_questions(split="train", relation="name")
    flags = sorted(Path(question.image) for question in names)
    random.Random("flags").shuffle(flags)
    return tuple(flags)


@cache
def reference_photographs() -> tuple[Path, ...]:
    """Return the photographs that are shipped, in an order that is always the same."""
    photographs = sorted(FOLDER.glob("*.jpg"))
    random.Random("photographs").shuffle(photographs)
    return tuple(photographs)
