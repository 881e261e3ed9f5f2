"""Readers of visual question answering data sets, and the demo's own questions."""

from mmlens.data.demo import demo_questions
from mmlens.data.questions import VisualQuestion, is_right, normalise_answer

__all__ = ["VisualQuestion", "demo_questions", "is_right", "normalise_answer"]
